"""Checks data against a schema and tells every fault at its place, in the user's words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import jsonschema
from jsonschema.exceptions import ValidationError
from jsonschema.validators import extend

from forge_kernel.config.document import Document, Path, look_up, show_path
from forge_kernel.config.spelling import did_you_mean
from forge_kernel.errors import Fault

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


_Validator: Final = extend(
    jsonschema.Draft202012Validator,
    type_checker=jsonschema.Draft202012Validator.TYPE_CHECKER.redefine("integer", _is_integer),
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


def _leaves(error: ValidationError) -> list[ValidationError]:
    """The faults that an alternative (`anyOf`) hides, from the branch that was meant."""
    found: list[ValidationError] = []
    stack = [error]
    while stack:
        current = stack.pop()
        if current.validator != "anyOf" or not current.context:
            found.append(current)
            continue
        branches: dict[Any, list[ValidationError]] = {}
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
            found.append(current)
    return found


def _type_hints(wanted: set[str], value: Any) -> tuple[str, ...]:
    if "boolean" in wanted and isinstance(value, str):
        words = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false"}
        meant = words.get(value.lower())
        return (f"write {meant}",) if meant else ()
    if wanted & {"number", "integer"} and isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return ()
        return (f"write {value.replace('_', '').strip()} without quotes or underscores",)
    if wanted == {"integer"} and isinstance(value, float) and value.is_integer():
        return (f"write {int(value)}",)
    if wanted == {"array"} and isinstance(value, Mapping):
        return ("start each entry with `- `",)
    return ()


_BOUNDS: Final = {
    "minimum": "must be at least",
    "exclusiveMinimum": "must be above",
    "maximum": "must be at most",
    "exclusiveMaximum": "must be below",
}


def _branch_types(error: ValidationError) -> list[str]:
    branches = error.schema.get("anyOf", [error.schema])
    found: list[str] = []
    for branch in branches:
        types = branch.get("type", [])
        found += types if isinstance(types, list) else [types]
    return found


def _message(error: ValidationError) -> tuple[str, tuple[str, ...]]:
    """What is wrong and how to mend it."""
    value, rule, bound = error.instance, error.validator, error.validator_value
    shown = show_value(value)
    if rule in _BOUNDS:
        return f"{shown} {_BOUNDS[rule]} {bound}", ()
    if rule in ("type", "anyOf"):
        wanted = _branch_types(error)
        words = " or ".join(_TYPES.get(name, name) for name in dict.fromkeys(wanted))
        hints = _type_hints(set(wanted) - {"null"}, value)
        return f"must be {words or 'one of the forms allowed'}, not {shown}", hints
    if rule in ("enum", "const"):
        allowed = [bound] if rule == "const" else list(bound)
        listed = ", ".join(str(choice) for choice in allowed) or "nothing (none is installed)"
        hints = (f"allowed: {listed}",)
        if isinstance(value, str):
            hints = did_you_mean(value, [str(choice) for choice in allowed]) + hints
        return f"{shown} is not known here", hints
    if rule == "pattern":
        return f"{shown} does not have the form {bound}", ()
    if rule in ("minItems", "maxItems", "minLength", "maxLength"):
        sense = "at least" if rule.startswith("min") else "at most"
        what = "entries" if rule.endswith("Items") else "letters"
        return f"must have {sense} {bound} {what}, not {len(value)}", ()
    if rule == "uniqueItems":
        return "has an entry twice", ()
    return error.message, ()


def _about(error: ValidationError) -> str:
    """The description that the schema gives the setting, if any."""
    current: ValidationError | None = error
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

    def tell(self, error: ValidationError) -> list[Fault]:
        path: Path = tuple(error.absolute_path)
        if error.validator == "additionalProperties":
            return [self._unknown(error, path, key) for key in self._extra(error)]
        if error.validator == "required":
            missing = next(name for name in error.validator_value if f"'{name}'" in error.message)
            return [self._missing(error, path, missing)]
        message, hints = _message(error)
        about = _about(error)
        if about and error.validator not in ("const",):
            message = f"{message} ({about})"
        return [Fault(message, show_path(path), self.document.mark(path), hints + self._see(path))]

    @staticmethod
    def _extra(error: ValidationError) -> list[str]:
        known = error.schema.get("properties", {})
        patterns = error.schema.get("patternProperties", {})
        return [
            key
            for key in error.instance
            if key not in known and not any(re.search(pattern, key) for pattern in patterns)
        ]

    def _unknown(self, error: ValidationError, path: Path, key: str) -> Fault:
        known = list(error.schema.get("properties", {}))
        hints = did_you_mean(key, known)
        if not hints and {"use", "with"} == set(known):
            hints = ("a plugin's settings stand under `with`",)
        hints += (f"allowed: {', '.join(known) or 'no settings'}",)
        full = (*path, key)
        return Fault(
            f"the key '{key}' is not known here",
            show_path(full),
            self.document.key_mark(full),
            hints + self._see(path),
        )

    def _missing(self, error: ValidationError, path: Path, key: str) -> Fault:
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
        found = plugin_at(self.document.data, path)
        return (f"see: forge plugins {found[1]}",) if found else ()


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
    errors: Iterable[ValidationError] = _Validator(schema).iter_errors(document.data)
    for error in errors:
        for leaf in _leaves(error):
            for fault in teller.tell(leaf):
                faults.append(_advise(fault, leaf, document, advice, advised))
    return faults


def _advise(
    fault: Fault, error: ValidationError, document: Document, advice: Advice, advised: set[Path]
) -> Fault:
    found = plugin_at(document.data, tuple(error.absolute_path))
    if found is None or found[0] in advised:
        return fault
    advised.add(found[0])
    values = look_up(document.data, (*found[0], "with"))
    hint = advice(found[0], values) if isinstance(values, Mapping) else None
    return Fault(fault.message, fault.path, fault.mark, (hint, *fault.hints)) if hint else fault
