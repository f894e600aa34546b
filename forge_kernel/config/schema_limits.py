"""What the schema of a plugin's settings may hold: nothing that hangs the check or asks elsewhere.

A schema is followed for every file that names the plugin: a pattern that tries all ways to match
would hang `forge check`, and a reference to an address would have to be fetched.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from re import _constants as codes  # type: ignore[attr-defined]  # Python's own reading of patterns
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any, Final

from forge_kernel.config.document import walk
from forge_kernel.errors import Fault, PluginError

MAX_NODES: Final = 20_000
MAX_PATTERN: Final = 1000
LONGEST_TEXT: Final = 256  # characters of a value that a pattern is asked of
_MANY: Final = 64  # repetitions that count as any number
_OPEN: Final = 4  # repetitions without end in a pattern: the text's length to this power is tried
_ELSEWHERE: Final = ("$id", "$anchor", "$dynamicRef", "$dynamicAnchor", "$recursiveRef")


def check_schema(name: str, parts: Mapping[str, Mapping[str, Any]], local: str) -> None:
    """Refuse a schema that could hang the check of a file, or that asks elsewhere.

    Args:
        name: of the plugin.
        parts: the definitions, by their names.
        local: what a reference to one of them begins with.

    Raises:
        PluginError: saying which part is why refused.
    """
    nodes = 0
    for title, part in parts.items():
        for _, value in walk(part):
            nodes += 1
            if nodes > MAX_NODES:
                raise _refused(name, title, f"it has more than {MAX_NODES} parts")
            if isinstance(value, Mapping):
                _check_part(name, title, value, parts, local)


def _refused(name: str, title: str, why: str) -> PluginError:
    hint = "this is for the plugin's author to mend"
    return PluginError([Fault(f"the schema of {name} ({title}) is refused: {why}", hints=(hint,))])


def _check_part(
    name: str, title: str, value: Mapping[str, Any], parts: Mapping[str, Any], local: str
) -> None:
    reference = value.get("$ref")
    if isinstance(reference, str):
        known = reference.removeprefix(local) in parts and reference.startswith(local)
        if not known and not reference.startswith("#/$defs/use."):
            raise _refused(name, title, f"it refers to {reference[:80]}, which is not in it")
    for word in _ELSEWHERE:
        if isinstance(value.get(word), str):
            raise _refused(name, title, f"{word} is not followed")
    patterns = [value.get("pattern")] if isinstance(value.get("pattern"), str) else []
    inside = value.get("patternProperties")
    patterns += list(inside) if isinstance(inside, Mapping) else []
    for pattern in patterns:
        why = slow_pattern(str(pattern))
        if why is not None:
            raise _refused(name, title, f"the pattern {str(pattern)[:60]!r} {why}")


def slow_pattern(pattern: str) -> str | None:
    """Why a pattern may take for ever on a short text; None: it cannot."""
    if len(pattern) > MAX_PATTERN:
        return f"is longer than {MAX_PATTERN} characters"
    try:
        tree = parser.parse(pattern)
        _ = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return f"is none: {error}"
    todo: list[tuple[Any, bool, int]] = [(tree, False, 1)]
    open_ended = 0
    while todo:
        items, repeated, times = todo.pop()
        for code, value in items:
            most = value[1] if code in _REPEATS else 1
            many = code in _REPEATS and most - value[0] > _MANY
            open_ended += times if many else 0
            if repeated and (code is codes.BRANCH or (code in _REPEATS and value[0] != most)):
                return "repeats what may itself match in several ways"
            if code in (codes.GROUPREF, codes.GROUPREF_EXISTS) or open_ended > _OPEN:
                return "can match in too many ways"
            inside = times * (1 if many else max(1, most))
            todo += [(inner, repeated or many, inside) for inner in _inside(code, value)]
    return None


_REPEATS: Final = (codes.MAX_REPEAT, codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT)


def _inside(code: Any, value: Any) -> list[Any]:
    """The sequences inside an item of a parsed pattern."""
    if code is codes.BRANCH:
        return list(value[1])
    if code in (*_REPEATS, codes.SUBPATTERN):
        return [value[-1]]
    if code in (codes.ASSERT, codes.ASSERT_NOT):
        return [value[1]]
    if code is codes.ATOMIC_GROUP:
        return [value]
    return []
