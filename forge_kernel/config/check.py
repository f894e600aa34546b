"""Checks data against a schema and tells every fault at its place, in the user's words."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

import jsonschema
from jsonschema import validators

from forge_kernel.config.document import Document, Path, look_up, show_path, show_word
from forge_kernel.config.schema_limits import LONGEST_TEXT
from forge_kernel.config.spelling import did_you_mean, nearest
from forge_kernel.config.yaml_file import resolve
from forge_kernel.errors import Fault

Error = Any
"""jsonschema's ValidationError, whose parts are of any type."""

_TYPES: Final = {
    "number": "a number",
    "integer": "a whole number",
    "string": "text",
    "boolean": "true or false",
    "null": "null",
    "array": "a list",
    "object": "a mapping",
}


def _is_integer(_: Any, value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)  # 4.0 is no integer, as bound


def _is_number(_: Any, value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _pattern(_: Any, pattern: str, value: Any, __: Any) -> Iterator[Error]:
    """`$` is the end of the text, as JSON Schema has it; Python's stands before a last line end."""
    if not isinstance(value, str):
        return
    if len(value) > LONGEST_TEXT:
        message = f"{value!r} is longer than {LONGEST_TEXT} characters"
        yield jsonschema.ValidationError(message)
    elif not re.search(re.sub(r"\$$", r"\\Z", pattern), value):
        yield jsonschema.ValidationError(f"{value!r} does not match {pattern!r}")


_extend: Final[Callable[..., Any]] = validators.extend
_Validator: Final = _extend(
    jsonschema.Draft202012Validator,
    {"pattern": _pattern},
    type_checker=jsonschema.Draft202012Validator.TYPE_CHECKER.redefine(
        "integer", _is_integer
    ).redefine("number", _is_number),
)


def show_value(value: Any) -> str:
    """A value in a message, shortened."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _leaves(error: Error) -> list[Error]:
    """The faults that an alternative (`anyOf`) hides, from the branch that was meant."""
    result: list[Error] = []
    stack = [error]
    while stack:
        current = stack.pop()
        if current.validator != "anyOf" or not current.context:
            result.append(current)
            continue
        branches: dict[Any, list[Error]] = {}
        for inner in current.context:
            branches.setdefault(inner.relative_schema_path[0], []).append(inner)
        meant = [
            branch
            for branch in branches.values()
            if not any(inner.validator == "type" and not inner.relative_path for inner in branch)
        ]
        if len(meant) == 1:
            stack.extend(meant[0])
        else:
            result.append(current)
    return result


def _type_hints(wanted: set[str], value: Any) -> tuple[str, ...]:
    meant: str | None = None
    if "boolean" in wanted and isinstance(value, str | int | float):
        meant = _TRUTHS.get(str(value).lower())
    elif wanted & {"number", "integer"} and isinstance(value, str):
        meant = _number_meant(value)
    elif wanted == {"integer"} and isinstance(value, float) and value.is_integer():
        meant = str(int(value))
    elif wanted == {"string"} and isinstance(value, int | float):
        meant = "it in quotes"
    elif wanted == {"array"}:
        meant = "`- ` before each entry" if isinstance(value, Mapping) else "a list: [a, b]"
    return (f"write {meant}",) if meant else ()


_TRUTHS: Final = {
    "yes": "true", "on": "true", "y": "true", "1": "true", "true": "true without quotes",
    "no": "false", "off": "false", "n": "false", "0": "false", "false": "false without quotes",
}  # fmt: skip


def _number_meant(text: str) -> str | None:
    """How a number that was written as text is to be written, if it is one at all."""
    meant = text.replace("_", "").strip()
    try:
        result = resolve(meant)
    except ValueError:
        return None
    is_number = isinstance(result, int | float) and not isinstance(result, bool)
    return f"{meant} without quotes or underscores" if is_number else None


_BOUNDS: Final = {
    "minimum": "must be at least",
    "exclusiveMinimum": "must be above",
    "maximum": "must be at most",
    "exclusiveMaximum": "must be below",
}


def _branch_types(error: Error) -> list[str]:
    branches = error.schema.get("anyOf", [error.schema])
    result: list[str] = []
    for branch in branches:
        types = branch.get("type", [])
        result += types if isinstance(types, list) else [types]
    return result


def _use_hints(error: Error) -> tuple[str, ...]:
    """What to write where a plugin is named in another form."""
    if error.validator != "type" or "use" not in error.schema.get("properties", ()):
        return ()
    if isinstance(error.instance, list):
        return ("there is one of this kind only: {use: name, with: {...}}, without `- `",)
    name = error.instance if isinstance(error.instance, str) else "name"
    return (f"write {{use: {show_word(name)}}}",)


def _message(error: Error) -> tuple[str, tuple[str, ...]]:
    """What is wrong and how to mend it."""
    value, rule, bound = error.instance, error.validator, error.validator_value
    shown = show_value(value)
    if rule in _BOUNDS:
        return f"{shown} {_BOUNDS[rule]} {bound}", ()
    if rule in ("type", "anyOf"):
        wanted = _branch_types(error)
        words = " or ".join(_TYPES.get(name, name) for name in dict.fromkeys(wanted))
        hints = _use_hints(error) or _type_hints(set(wanted) - {"null"}, value)
        return f"must be {words or 'one of the forms allowed'}, not {shown}", hints
    if rule in ("enum", "const"):
        allowed = [bound] if rule == "const" else list(bound)
        listed = ", ".join(str(choice) for choice in allowed) or "nothing (none is installed)"
        hints = (f"allowed: {listed}",)
        today = error.schema.get("x-renamed", {}).get(value) if isinstance(value, str) else None
        if today is not None:
            hints = ()
        elif isinstance(value, str) and value in [str(choice) for choice in allowed]:
            hints = (f"write {value} without quotes", *hints)  # a number was meant
        elif isinstance(value, str):
            hints = did_you_mean(value, [str(choice) for choice in allowed]) + hints
        return f"{shown} is {f'renamed to {today}' if today else 'not known here'}", hints
    if rule == "pattern":
        return f"{shown} does not have the form {bound}", ()
    if rule in ("minItems", "maxItems", "minLength", "maxLength"):
        sense = "at least" if rule.startswith("min") else "at most"
        what = "entries" if rule.endswith("Items") else "letters"
        return f"must have {sense} {bound} {what}, not {len(value)}", ()
    return "has an entry twice" if rule == "uniqueItems" else str(error.message), ()


def _about(error: Error) -> str:
    """The description that the schema gives the setting, if any."""
    current: Error = error
    while current is not None:
        if isinstance(current.schema, Mapping) and current.schema.get("description"):
            inside_use = "use" in current.schema.get("properties", ())
            return "" if inside_use else str(current.schema["description"])
        parent = current.parent
        current = parent if parent is not None and not current.relative_path else None
    return ""


def plugin_at(data: Any, path: Path) -> tuple[Path, str] | None:
    """The innermost plugin whose settings hold `path`: its own path and its name."""
    for end in range(len(path), 0, -1):
        if path[end - 1] == "with":
            try:
                return path[: end - 1], str(look_up(data, (*path[: end - 1], "use")))
            except KeyError:
                return None
    return None


Advice = Callable[[Path, Mapping[str, Any]], str | None]


class _Teller:
    """Turns the validator's errors into faults of one document."""

    def __init__(self, document: Document) -> None:
        self.document = document

    def faults_of(self, error: Error) -> list[Fault]:
        path: Path = tuple(error.absolute_path)
        if error.validator == "additionalProperties":
            return [self._unknown(error, path, key) for key in self._extra(error)]
        if error.validator == "required":
            missing = next(name for name in error.validator_value if f"'{name}'" in error.message)
            if self._is_misspelt(error, missing):
                return []
            return [self._missing(error, path, missing)]
        message, hints = _message(error)
        about = _about(error)
        if about and error.validator not in ("const",):
            message = f"{message} ({about})"
        return [Fault(message, show_path(path), self.document.mark(path), hints + self._see(path))]

    @classmethod
    def _is_misspelt(cls, error: Error, missing: str) -> bool:
        """Whether the missing key stands there under a misspelt name, which is told as such."""
        known = list(error.schema.get("properties", {}))
        return any(nearest(key, known, 1) == [missing] for key in cls._extra(error))

    @staticmethod
    def _extra(error: Error) -> list[str]:
        known = error.schema.get("properties", {})
        patterns = error.schema.get("patternProperties", {})
        return [
            key
            for key in error.instance
            if key not in known and not any(re.search(pattern, key) for pattern in patterns)
        ]

    def _unknown(self, error: Error, path: Path, key: str) -> Fault:
        known = list(error.schema.get("properties", {}))
        renamed = error.schema.get("x-renamed", {}).get(key)
        if renamed is not None:
            full = (*path, key)
            message = f"'{show_word(key)}' is renamed to {renamed}"
            return Fault(message, show_path(full), self.document.key_mark(full), self._see(path))
        hints = did_you_mean(key, known)
        if {"use", "with"} == set(known):
            hints += ("a plugin's settings stand under `with`",)
        hints += (f"allowed: {', '.join(known) or 'no settings'}",)
        full = (*path, key)
        return Fault(
            f"the key '{show_word(key)}' is not known here",
            show_path(full),
            self.document.key_mark(full),
            hints + self._see(path),
        )

    def _missing(self, error: Error, path: Path, key: str) -> Fault:
        schema = error.schema.get("properties", {}).get(key, {})
        about = schema.get("description", "") if isinstance(schema, Mapping) else ""
        hints = (f"{key}: {about}",) if about else ()
        return Fault(
            f"the key '{key}' is missing",
            show_path((*path, key)),
            self.document.mark(path),
            hints + self._see(path),
        )

    def _see(self, path: Path) -> tuple[str, ...]:
        result = plugin_at(self.document.data, path)
        return (f"see: forge plugins {result[1]}",) if result else ()


def check(document: Document, schema: Mapping[str, Any], advice: Advice) -> list[Fault]:
    """All faults of a document's data.

    Args:
        document: data with marks.
        schema: the composed schema of the pipeline.
        advice: asked once for each plugin with faulty settings; what it answers becomes a hint.
    """
    teller = _Teller(document)
    faults: list[Fault] = []
    advised: set[Path] = set()
    for error in _one_for_each_value(_Validator(schema).iter_errors(document.data)):
        found = teller.faults_of(error)
        faults += [_advise(fault, error, document, advice, advised) for fault in found]
    return faults


def _one_for_each_value(errors: Iterable[Error]) -> list[Error]:
    """One error for each value, that of its type before others; every error of its keys."""
    result: list[Error] = []
    at: dict[Path, int] = {}
    for leaf in [leaf for error in errors for leaf in _leaves(error)]:
        path = tuple(leaf.absolute_path)
        if leaf.validator in ("additionalProperties", "required"):
            result.append(leaf)
        elif path not in at:
            at[path] = len(result)
            result.append(leaf)
        elif leaf.validator == "type" and result[at[path]].validator != "type":
            result[at[path]] = leaf
    return result


def _advise(
    fault: Fault, error: Error, document: Document, advice: Advice, advised: set[Path]
) -> Fault:
    result = plugin_at(document.data, tuple(error.absolute_path))
    if result is None or result[0] in advised:
        return fault
    advised.add(result[0])
    values = look_up(document.data, (*result[0], "with"))
    hint = advice(result[0], values) if isinstance(values, Mapping) else None
    return Fault(fault.message, fault.path, fault.mark, (hint, *fault.hints)) if hint else fault
