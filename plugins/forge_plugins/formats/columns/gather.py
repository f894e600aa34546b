"""Rows of a column by number, as fresh arrays: one gather of bytes, whatever the bytes are.

A row is moved as one opaque element. So rows of any type, at any alignment and with other fields
between them (records) are gathered as fast as those of a plain array, and nothing but them is read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Column = NDArray[Any]
Numbers = NDArray[np.int64]


@runtime_checkable
class Rows(Protocol):
    """A column that is no array but is read like one."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    ndim: int

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice) -> Column:
        """Rows that follow each other."""
        ...

    def take(self, index: Numbers) -> Column:
        """Rows by number, shape (n,): a fresh array (n, ...), in native byte order."""
        ...


class _View:
    """Elements of another type in the memory of an array, which it keeps."""

    def __init__(
        self, memory: Column, kind: np.dtype[np.void], shape: tuple[int, ...], step: int
    ) -> None:
        place, _ = memory.__array_interface__["data"]
        self.memory = memory
        self.__array_interface__ = {
            "version": 3, "typestr": kind.str, "shape": shape, "strides": (step,),
            "data": (place, True),
        }  # fmt: skip


def opaque(column: Column) -> Column | None:
    """One element for each row, in the same memory; None when a row does not lie in one piece.

    Args:
        column: shape (rows, ...), at least one number in each row.

    Returns:
        Shape (rows,), of a type that is nothing but bytes.
    """
    whole = column.dtype.itemsize
    for size, step in zip(column.shape[:0:-1], column.strides[:0:-1], strict=True):
        if size != 1 and step != whole:
            return None
        whole *= size
    kind = np.dtype((np.void, whole))
    return np.asarray(_View(column, kind, (len(column),), column.strides[0]))


def overlapping(memory: NDArray[np.uint8], size: int, step: int) -> Column:
    """Elements of `size` bytes at each multiple of `step`, as many as there are.

    Args:
        memory: contiguous bytes.
        size: of an element.
        step: from one element to the next; below `size`, they overlap.
    """
    assert memory.flags.c_contiguous
    count = max(0, (len(memory) - size) // step + 1)
    return np.asarray(_View(memory, np.dtype((np.void, size)), (count,), step))


def gatherer(column: Column | Rows) -> Callable[[Numbers], Column]:
    """What reads rows of one column by number; made once, called for each batch.

    Args:
        column: shape (rows, ...).

    Returns:
        A function of numbers, shape (n,), that gives a fresh array of shape (n, ...), in native
        byte order.
    """
    if not isinstance(column, np.ndarray):
        return column.take
    plain = np.asarray(column)  # a memmap's own indexing is slower
    kind, shape = plain.dtype, plain.shape[1:]
    native = kind.newbyteorder("=")
    elements = opaque(plain)
    if elements is None:
        return lambda index: plain[index].astype(native, copy=False)
    if not shape and plain.flags.c_contiguous and plain.flags.aligned and kind.isnative:
        return plain.take
    # a strided array would be copied as a whole by `take`
    rows = elements.take if elements.flags.c_contiguous else elements.__getitem__
    if not kind.isnative:
        return lambda index: rows(index).view(kind).reshape(len(index), *shape).astype(native)
    if not shape:
        return lambda index: rows(index).view(kind)
    return lambda index: rows(index).view(kind).reshape(len(index), *shape)


def take(column: Column | Rows, index: Numbers) -> Column:
    """Rows of a column by number; `gatherer` is faster when asked again and again."""
    return gatherer(column)(index)
