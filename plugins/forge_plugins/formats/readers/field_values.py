"""The values of a field: numbers and nested lists of them, brought into arrays.

Each becomes int64 or float32, the types that samples have. What cannot is a `DefectError`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import chain
from typing import Any, Final

import numpy as np

from forge_plugins.formats.columns import exact
from forge_plugins.formats.columns.table import PROBLEMS, Column

MAX_DEPTH: Final = 8
"""Of lists in each other."""
_EXACT: Final = 2**24  # integers beyond are not all 32-bit floats
_LONG: Final = 2.0**64  # a parser that has no longer integers makes floats of them
_NUMBERS: Final = frozenset({int, float, bool})
"""Types of what is a number: true and false are 1 and 0, as arrays of any format have them."""


class NoNumber:
    """What stands for a number in a file and is none.

    Args:
        text: as it stands there.
    """

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


_ABSENT: Final = (type(None), NoNumber)


def type_name(value: Any) -> str:
    """What a value is, for messages."""
    if isinstance(value, NoNumber):
        return value.text[:40]
    return "null" if value is None else type(value).__name__


class DefectError(Exception):
    """A value that cannot be used; a lenient reading leaves its record out.

    Args:
        kind: its place in `PROBLEMS`.
        message: what is wrong.
        hint: how to mend it.
    """

    def __init__(self, kind: int, message: str, hint: str) -> None:
        self.kind, self.hint = kind, hint
        super().__init__(message)


def missing(message: str) -> DefectError:
    """A field that a record lacks, or has alone."""
    return DefectError(0, message, "give every record the same fields")


def wrong_type(message: str, hint: str = "give a number or lists of numbers") -> DefectError:
    """A value that is no number."""
    return DefectError(1, message, hint)


def wrong_shape(message: str) -> DefectError:
    """Numbers of another shape than the other records have."""
    return DefectError(2, message, "give every record as many numbers")


def wrong_length(message: str) -> DefectError:
    """A list of another length than the other records have."""
    return DefectError(3, message, "give every record a list of one length, or cut and fill them")


def _leaves(value: Any, found: list[Any], budget: int, depth: int = 0) -> tuple[int, ...]:
    """Append the leaves of nested lists; their shape."""
    if not isinstance(value, list | tuple):
        found.append(value)
        return ()
    if depth >= MAX_DEPTH:
        raise wrong_shape(f"lists are nested deeper than {MAX_DEPTH}")
    if not any(issubclass(kind, list | tuple) for kind in set(map(type, value))):
        found.extend(value)
        shape: tuple[int, ...] = ()
    else:
        shapes = set()
        for part in value:
            shapes.add(_leaves(part, found, budget, depth + 1))
            if len(shapes) > 1:
                raise wrong_shape("is ragged: its lists are not of one length")
        shape = shapes.pop()
    if len(found) > budget:
        raise wrong_shape(f"holds more than {budget} numbers, more than the file has bytes")
    return (len(value), *shape)


def _array_row(value: Column) -> Column:
    """An array as int64 or float32."""
    if value.dtype.kind not in "iufb":
        raise wrong_type(f"is an array of {value.dtype}, not of numbers")
    if value.dtype.kind == "u" and value.dtype.itemsize == 8 and (value > 2**63 - 1).any():
        raise wrong_type("an integer does not fit 64 bits")
    if value.dtype.kind != "f":
        return value.astype(np.int64)
    with np.errstate(over="ignore"):
        narrow = value.astype(np.float32)
    if (np.isfinite(value) & ~np.isfinite(narrow)).any():
        raise wrong_type("a number is too large for 32-bit floats")
    return narrow


def row_of(value: Any, budget: int, *, lenient: bool) -> Column:
    """One field of one record as an array.

    Args:
        value: a number, lists of numbers in each other, or an array.
        budget: numbers that it may hold at most.
        lenient: null among floats becomes NaN.

    Returns:
        int64, or float32 when one number is a float.

    Raises:
        DefectError: it holds what is no number, or is ragged.
    """
    if isinstance(value, np.ndarray):
        return _array_row(value)
    leaves: list[Any] = []
    shape = _leaves(value, leaves, budget)
    kinds = set(map(type, leaves))
    if lenient and not kinds.isdisjoint({type(None), NoNumber}):
        leaves = [float("nan") if isinstance(leaf, _ABSENT) else leaf for leaf in leaves]
        kinds = kinds - {type(None), NoNumber} | {float}
    if not kinds <= _NUMBERS:
        raise _no_number(leaves, kinds)
    if float not in kinds:
        try:
            return np.array(leaves, np.int64).reshape(shape)
        except OverflowError:
            raise wrong_type("an integer does not fit 64 bits") from None
    for leaf in leaves if int in kinds else ():
        if type(leaf) is int and not exact.is_exact(leaf):
            raise wrong_type(exact.rounded(leaf), exact.HINT)
    wide = np.array(leaves, np.float64)
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float32)
    strange_numbers = ~np.isfinite(narrow)
    if strange_numbers.any() and np.isfinite(wide[strange_numbers]).any():
        raise wrong_type("a number is too large for 32-bit floats")
    return narrow.reshape(shape)


def _no_number(leaves: Sequence[Any], kinds: set[type]) -> DefectError:
    """What to say of values that are no numbers."""
    if NoNumber in kinds:
        text = next(leaf.text for leaf in leaves if type(leaf) is NoNumber)
        named = text.lstrip("-") in ("NaN", "Infinity")
        message = "NaN and Infinity are not JSON" if named else f"{text[:40]} is beyond all floats"
        hint = "mend it, or set quality_threshold above 0 to leave such samples out"
        return wrong_type(message, hint)
    strange = min(kind.__name__ for kind in kinds - _NUMBERS)
    message = "null" if strange == "NoneType" else strange
    return wrong_type(f"holds a value of the type {message}, not a number")


def rows_of(values: Sequence[Any], dots: int | None = None) -> Column | None:
    """Many records' values of one field at once, as `row_of` gives them one by one.

    Args:
        values: of the records.
        dots: in the values' JSON text; when they are as many as the numbers, all are floats.

    Returns:
        int64 or float32, shape (values, ...); None when they are not all alike or one may have a
        defect, so that each must be looked at.
    """
    flat, inner, kinds = _flat(values, dots)
    if kinds == {np.ndarray} and not inner:
        return _stacked(values)
    if not kinds or not kinds <= _NUMBERS or -1 in inner:
        return None
    if float not in kinds:
        try:
            return np.array(flat, np.int64).reshape(len(values), *inner)
        except OverflowError:
            return None
    # struct is three times as fast as numpy, and takes the same numbers
    try:
        wide = np.frombuffer(struct.pack(f"{len(flat)}d", *flat), np.float64)
    except struct.error:  # the dots were those of other things
        return None
    sizes = np.abs(wide)
    doubtful = (sizes >= _LONG) | ((sizes > _EXACT) if int in kinds else False)
    narrow = None if doubtful.any() else _narrowed(wide)
    return None if narrow is None else narrow.reshape(len(values), *inner)


def _flat(values: Sequence[Any], dots: int | None) -> tuple[Sequence[Any], list[int], set[type]]:
    """The leaves of nested lists, their shape (-1: ragged) and types."""
    inner: list[int] = []
    flat, kinds = values, set(map(type, values))
    for _ in range(MAX_DEPTH):
        if kinds != {list}:
            break
        widths = set(map(len, flat))
        inner.append(widths.pop() if len(widths) == 1 else -1)
        flat = list(chain.from_iterable(flat))
        plain = dots == len(flat) and bool(flat) and type(flat[0]) is float
        kinds = {float} if plain else set(map(type, flat))
    return flat, inner, kinds


def _stacked(values: Sequence[Column]) -> Column | None:
    if len({(part.dtype, part.shape) for part in values}) != 1:
        return None
    numbers = np.stack(values)
    if numbers.dtype.kind == "f":
        return _narrowed(numbers)
    whole = numbers.dtype.kind in "iub" and numbers.dtype != np.uint64
    return numbers.astype(np.int64) if whole else None


def _narrowed(wide: Column) -> Column | None:
    """As 32-bit floats; None when a finite number becomes infinite."""
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float32)
    strange = ~np.isfinite(narrow)
    return None if strange.any() and np.isfinite(wide[strange]).any() else narrow


assert len(PROBLEMS) == 4, "the kinds of DefectError are places in PROBLEMS"
