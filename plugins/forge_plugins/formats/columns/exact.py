"""Integers that are to become floats: floats of few digits hold few of the large ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from forge_plugins.formats.columns.gather import Column
from forge_plugins.formats.errors import DataError

HINT: Final = (
    "different ones would become the same number: write what is learned from as floats "
    "(a difference, a logarithm), leave out what is a name, or read whole rows as tokens"
)
_DIGITS: Final = np.finfo(np.float32).nmant + 1


def inexact(rows: Column, dtype: np.dtype[Any]) -> NDArray[np.int64]:
    """Places of the integers that are no float of a type.

    A float of p significant bits holds an integer if what is left of it without its trailing zero
    bits has at most p bits.

    Args:
        rows: any numbers, any shape; none but integers are looked at.
        dtype: of the floats.

    Returns:
        Places in the flattened rows, ascending, shape (n,).
    """
    limit = 2 ** (np.finfo(dtype).nmant + 1)
    if rows.dtype.kind not in "iu" or not rows.size or np.iinfo(rows.dtype).max <= limit:
        return np.zeros(0, np.int64)
    if int(rows.max()) <= limit and int(rows.min()) >= -limit:
        return np.zeros(0, np.int64)
    flat = rows.reshape(-1)
    sizes = flat.astype(np.uint64)  # of negative ones, modulo 2**64
    sizes = np.where(flat < 0, ~sizes + np.uint64(1), sizes)
    lowest = np.maximum(sizes & (~sizes + np.uint64(1)), np.uint64(1))
    return np.flatnonzero(sizes // lowest >= np.uint64(limit)).astype(np.int64)


def check_exact(
    file: Path,
    name: str,
    rows: Column,
    dtype: np.dtype[Any],
    begin: int,
    record: Callable[[int], bool] = lambda _: True,
) -> None:
    """Refuse integers that would be rounded.

    Args:
        file: the data file, for the message.
        name: of the column.
        rows: shape (records, ...).
        dtype: of the floats that they become.
        begin: number of the first record.
        record: whether the numbers of a record count.

    Raises:
        DataError: one is no float of the type.
    """
    width = max(1, rows.size // max(1, len(rows)))
    for place in inexact(rows, dtype).tolist():
        number = begin + place // width
        if record(number):
            message = rounded(rows.reshape(-1)[place].item(), dtype.itemsize * 8)
            raise DataError(file, message, record=number, field=name, hint=HINT)


def is_exact(value: int) -> bool:
    """Whether an integer of any length has no more digits than a 32-bit float."""
    return not value or (abs(value) // (value & -value)).bit_length() <= _DIGITS


def rounded(value: int, bits: int = 32) -> str:
    """What to say of an integer that is no float of so many bits."""
    return f"the integer {value} is no {bits}-bit float and would be rounded"
