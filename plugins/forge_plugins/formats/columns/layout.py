"""Where in a file the numbers of a column lie, so that they are mapped and not read."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One column in place: an array, or rows in chunks.

    Args:
        dtype: numpy's code of the numbers.
        shape: of the column; the first dimension counts rows.
        offset: of the first number in the file, in bytes.
        strides: from number to number in each dimension, in bytes; None: one after the other.
        chunk: rows in a chunk; 0: the column is an array.
        starts: offset of each chunk, shape (chunks,).
        sizes: bytes of each packed chunk, shape (chunks,); None: chunks are not packed.
        filters: what was done to a packed chunk, in this order: `shuffle`, `deflate`, `fletcher32`.
        skipped: filters that a chunk was spared, as bits in the order of `filters`.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int = 0
    strides: tuple[int, ...] | None = None
    chunk: int = 0
    starts: NDArray[np.int64] | None = None
    sizes: NDArray[np.int64] | None = None
    filters: tuple[str, ...] = ()
    skipped: NDArray[np.int64] | None = None

    @property
    def row(self) -> int:
        """Bytes of a row."""
        return math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize

    def end(self) -> int:
        """The place after the last byte that is read."""
        if self.starts is not None:
            sizes = self.chunk * self.row if self.sizes is None else self.sizes
            return int((self.starts + sizes).max(initial=0))
        if not math.prod(self.shape):
            return self.offset
        item = np.dtype(self.dtype).itemsize
        if self.strides is None:
            return self.offset + math.prod(self.shape) * item
        steps = zip(self.shape, self.strides, strict=True)
        return self.offset + sum((size - 1) * step for size, step in steps) + item

    def to_data(self) -> dict[str, Any]:
        """For JSON."""
        result: dict[str, Any] = {
            "dtype": self.dtype, "shape": list(self.shape), "offset": self.offset,
            "strides": None if self.strides is None else list(self.strides),
            "chunk": self.chunk, "filters": list(self.filters),
        }  # fmt: skip
        for name in ("starts", "sizes", "skipped"):
            numbers = getattr(self, name)
            if numbers is not None:
                result[name] = base64.b64encode(numbers.astype("<i8").tobytes()).decode()
        return result

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Layout:
        """From what `told` gave."""
        packed = {
            name: np.frombuffer(base64.b64decode(data[name]), "<i8").astype(np.int64)
            for name in ("starts", "sizes", "skipped")
            if name in data
        }
        strides = None if data["strides"] is None else tuple(data["strides"])
        return cls(
            dtype=data["dtype"], shape=tuple(data["shape"]), offset=data["offset"],
            strides=strides, chunk=data["chunk"], filters=tuple(data["filters"]), **packed,
        )  # fmt: skip


def strides_of(shape: tuple[int, ...], item: int, *, fortran: bool = False) -> tuple[int, ...]:
    """From number to number in each dimension of an array without gaps, in bytes.

    Args:
        shape: of the array.
        item: bytes of a number.
        fortran: the first dimension is the fastest, not the last.
    """
    places = range(len(shape))
    return tuple(item * math.prod(shape[:at] if fortran else shape[at + 1 :]) for at in places)


def field_layout(
    record: np.dtype[Any], name: str, shape: tuple[int, ...], offset: int, *, fortran: bool = False
) -> Layout:
    """One field of an array of records.

    Args:
        record: type of a record.
        name: of the field.
        shape: of the array.
        offset: of the first record in the file.
        fortran: whether the array's first dimension is the fastest.
    """
    assert record.fields is not None
    kind, place = record.fields[name][:2]
    base, inner = (kind.base, kind.shape) if kind.subdtype else (kind, ())
    steps = strides_of(shape, record.itemsize, fortran=fortran)
    return Layout(
        dtype=base.str, shape=(*shape, *inner), offset=offset + place,
        strides=(*steps, *strides_of(inner, base.itemsize)),
    )  # fmt: skip
