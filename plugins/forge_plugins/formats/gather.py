"""Rows of a column by number, as fresh arrays: one gather of bytes, whatever the bytes are.

A row is moved as one opaque element. So rows of any type, at any alignment and with other fields
between them (records) are gathered as fast as those of a plain array, and nothing but them is read.
"""

from __future__ import annotations

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
        """Rows by number, as a fresh array in native byte order."""
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


class Gather:
    """Reads rows of one column; made once, called for each batch.

    Args:
        column: shape (rows, ...).
    """

    def __init__(self, column: Column | Rows) -> None:
        self._column = column
        self._shape, self._kind = column.shape[1:], column.dtype
        self._native = self._kind.newbyteorder("=")
        self._elements = None
        if isinstance(column, np.ndarray):
            self._elements = opaque(np.asarray(column))
        # a strided array would be copied as a whole by `take`
        self._dense = self._elements is not None and self._elements.flags.c_contiguous
        plain = (
            column.ndim == 1 and self._native == self._kind and column.flags.aligned
            if isinstance(column, np.ndarray)
            else False
        )
        self._numbers = np.asarray(column) if plain and self._dense else None

    def __call__(self, index: Numbers) -> Column:
        """Rows by number, as a fresh array in native byte order.

        Args:
            index: shape (n,).

        Returns:
            Shape (n, ...).
        """
        if self._numbers is not None:
            return self._numbers.take(index)
        elements = self._elements
        if elements is None:
            column = self._column
            if not isinstance(column, np.ndarray):
                return column.take(index)
            return np.asarray(column)[index].astype(self._native, copy=False)
        found = elements.take(index) if self._dense else elements[index]
        rows = found.view(self._kind)
        rows = rows.reshape((len(index), *self._shape)) if self._shape else rows
        return rows if self._native is self._kind else rows.astype(self._native, copy=False)


def take(column: Column | Rows, index: Numbers) -> Column:
    """Rows of a column by number; see `Gather`, which is faster when called again and again."""
    return Gather(column)(index)
