"""What stands in a JSON text, with all that other writers put there for a number.

Python and pandas write NaN and Infinity, which are not JSON, and integers of any length, which a
fast parser makes floats of. They are of no matter in a field that nobody reads.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

import orjson

from forge_plugins.formats.readers.field_values import NoNumber

_PART: Final = re.compile(
    rb'"(?:[^"\\]|\\.)*+"|-?(?:NaN|Infinity)|-?[0-9]++(?:\.[0-9]++)?+(?:[eE][+-]?[0-9]++)?+',
    re.DOTALL,
)
"""A text, or what stands for a number."""
_DIGITS: Final = 300  # more are beyond all floats


def parsed(raw: bytes) -> Any:
    """The value of a text, with a `NoNumber` for each number that is none.

    Raises:
        orjson.JSONDecodeError: it is no JSON for another reason.
    """
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        plain = _PART.sub(_replaced, raw)
        if plain == raw:
            raise
    orjson.loads(plain)  # all else is JSON
    return exactly(raw)


def exactly(raw: bytes) -> Any:
    """The value of a text that `parsed` has read, with its integers as they are."""
    try:
        return json.loads(
            str(raw, "utf-8"), parse_constant=NoNumber, parse_float=_float, parse_int=_integer
        )
    except RecursionError:  # the other parser goes deeper; what is so deep is no number
        return orjson.loads(raw)


def _replaced(match: re.Match[bytes]) -> bytes:
    """As it is, or a number of the same length, so that places stay what they are."""
    text = match[0]
    if text[:1] == b'"' or (text[-1:] not in b"Ny" and not _beyond(text)):
        return text
    return b"0".ljust(len(text))


def _beyond(text: bytes | str) -> bool:
    return float(text) in (float("inf"), -float("inf"))


def _integer(text: str) -> int | NoNumber:
    return int(text) if len(text) < _DIGITS else NoNumber(text)


def _float(text: str) -> float | NoNumber:
    return NoNumber(text) if _beyond(text) else float(text)
