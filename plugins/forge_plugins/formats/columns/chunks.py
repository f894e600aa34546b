"""Columns whose rows lie in chunks of a file, read in place."""

from __future__ import annotations

import math
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from forge_plugins.formats.columns.gather import Column, Numbers, opaque, overlapping
from forge_plugins.formats.columns.layout import Layout
from forge_plugins.formats.errors import DataError

BUDGET: Final = 2**25 + 2**23
"""Bytes of unpacked chunks that one column holds."""
_PIECE: Final = 2**20


class MappedChunks:
    """Rows in chunks that are not packed: one gather from the mapped file.

    Args:
        memory: the file's bytes.
        layout: of the column, with `starts` and without `sizes`.
    """

    def __init__(self, memory: NDArray[np.uint8], layout: Layout) -> None:
        assert layout.starts is not None
        assert layout.sizes is None
        self.shape, self.dtype = layout.shape, np.dtype(layout.dtype)
        self.ndim = len(self.shape)
        self._chunk, row = layout.chunk, layout.row
        # all rows are multiples of this many bytes from the first one
        first = int(layout.starts.min(initial=0))
        step = math.gcd(row, int(np.gcd.reduce(layout.starts - first)))
        self._elements = overlapping(memory[first:], row, step)
        self._starts, self._step = (layout.starts - first) // step, row // step
        self._native = self.dtype.newbyteorder("=")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Column:
        return self.take(np.arange(*rows.indices(len(self)), dtype=np.int64))

    def take(self, index: Numbers) -> Column:
        """Rows by number, shape (n,): a fresh array (n, ...), in native byte order."""
        chunks = index // self._chunk
        places = self._starts[chunks] + (index - chunks * self._chunk) * self._step
        result = self._elements[places].view(self.dtype).reshape((len(index), *self.shape[1:]))
        return result.astype(self._native, copy=False)


class PackedChunks:
    """Rows in chunks that are packed: some chunks are held unpacked, the oldest makes room.

    Args:
        file: the file.
        name: of the column, for messages.
        layout: of the column, with `starts` and `sizes`.
        budget: bytes of unpacked chunks.
    """

    def __init__(self, file: Path, name: str, layout: Layout, budget: int = BUDGET) -> None:
        assert layout.starts is not None
        self._file, self._name, self._layout = file, name, layout
        self.shape, self.dtype = layout.shape, np.dtype(layout.dtype)
        self.ndim = len(self.shape)
        self._native = self.dtype.newbyteorder("=")
        self._bytes = layout.chunk * layout.row
        self.slots = min(len(layout.starts), max(2, budget // self._bytes))
        self._process = -1
        self._forget()

    def _forget(self) -> None:
        """Nothing is held; a forked process opens the file for itself."""
        self._slab: Column = np.zeros((0, 0), np.uint8)
        self._elements: Column = self._slab
        self._held: OrderedDict[int, int] = OrderedDict()
        self._free = list(range(self.slots))
        self._descriptor: int | None = None

    @property
    def row(self) -> int:
        """Bytes of a row."""
        return self._layout.row

    @property
    def block(self) -> int:
        """Rows that are unpacked together."""
        return self._layout.chunk

    def held_blocks(self, length: int) -> int:
        """Blocks of so many rows that can be held unpacked together."""
        chunks = -(-length // self.block) + (length % self.block > 0)
        return max(1, self.slots // chunks)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Column:
        return self.take(np.arange(*rows.indices(len(self)), dtype=np.int64))

    def __del__(self) -> None:
        if self._descriptor is not None and self._process == os.getpid():
            os.close(self._descriptor)

    def pieces(self) -> Iterator[Column]:
        """All rows, a few chunks at a time, each piece in the memory of the one before.

        Raises:
            DataError: a chunk is broken.
        """
        self._ready()
        length, count = self._layout.chunk, len(self)
        together = max(1, min(_PIECE // self._bytes, self.slots))
        self._held.clear()
        self._free = list(range(self.slots))
        for first in range(0, -(-count // length), together):
            last = min(first + together, -(-count // length))
            for chunk in range(first, last):
                self._unpack(chunk, self._slab[chunk - first])
            rows = min(last * length, count) - first * length
            flat = self._slab[: last - first].reshape(-1)[: rows * self._layout.row]
            yield flat.view(self.dtype).reshape((rows, *self.shape[1:]))

    def _ready(self) -> None:
        if self._process != os.getpid():
            self._forget()
            self._open()

    def take(self, index: Numbers) -> Column:
        """Rows by number, shape (n,): a fresh array (n, ...), in native byte order.

        Raises:
            DataError: a chunk is broken.
        """
        self._ready()
        length = self._layout.chunk
        chunks = index // length
        inside = index - chunks * length
        known, back = np.unique(chunks, return_inverse=True)
        if len(known) <= self.slots:
            slots = np.array(self._slots(known.tolist()), np.int64)
            whole = self._elements.take(slots[back] * length + inside)
        else:
            whole = np.empty(len(index), self._elements.dtype)
            for begin in range(0, len(known), self.slots):
                slots = np.array(self._slots(known[begin : begin + self.slots].tolist()), np.int64)
                mine = (back >= begin) & (back < begin + self.slots)
                places = slots[back[mine] - begin] * length + inside[mine]
                whole[mine] = self._elements.take(places)
        result = whole.view(self.dtype).reshape((len(index), *self.shape[1:]))
        return result.astype(self._native, copy=False)

    def _open(self) -> None:
        self._process = os.getpid()
        self._descriptor = os.open(self._file, os.O_RDONLY)
        self._slab = np.empty((self.slots, self._bytes), np.uint8)
        rows = self._slab.reshape(self.slots * self._layout.chunk, self._layout.row)
        elements = opaque(rows)
        assert elements is not None, "a fresh array lies in one piece"
        self._elements = elements

    def _slots(self, chunks: list[int]) -> list[int]:
        """Where chunks are, unpacked now if they were not; as many as there are slots at most."""
        held = self._held
        absent = [chunk for chunk in chunks if chunk not in held]
        for chunk in chunks:
            if chunk in held:
                held.move_to_end(chunk)
        for chunk in absent:
            if not self._free:
                _, slot = held.popitem(last=False)
                self._free.append(slot)
            self._unpack(chunk, self._slab[self._free[-1]])  # which may find it broken
            held[chunk] = self._free.pop()
        return [held[chunk] for chunk in chunks]

    def _unpack(self, chunk: int, target: NDArray[np.uint8]) -> None:
        """Write a chunk's numbers where they are wanted."""
        layout = self._layout
        assert layout.starts is not None
        assert layout.sizes is not None
        assert layout.skipped is not None
        assert self._descriptor is not None
        size, skipped = int(layout.sizes[chunk]), int(layout.skipped[chunk])
        raw: Any = os.pread(self._descriptor, size, int(layout.starts[chunk]))
        if len(raw) != size:
            raise self._fault(chunk, "is cut short")
        shuffled = False
        for number in reversed(range(len(layout.filters))):
            name = layout.filters[number]
            if skipped >> number & 1:
                continue
            if name == "deflate":
                raw = self._inflated(chunk, raw)
            elif name == "fletcher32":
                raw = self._summed(chunk, raw)
            else:
                assert name == "shuffle", "readers name no other filters"
                assert number == 0, "what is shuffled is numbers"
                shuffled = True
        if len(raw) != self._bytes:
            raise self._fault(chunk, f"has {len(raw)} bytes, not {self._bytes}")
        numbers = np.frombuffer(raw, np.uint8)
        if not shuffled:
            target[:] = numbers
            return
        item = self.dtype.itemsize
        planes, places = numbers.reshape(item, -1), target.reshape(-1, item)
        for plane in range(item):  # faster than a transposition
            places[:, plane] = planes[plane]

    def _inflated(self, chunk: int, raw: bytes) -> bytes:
        packed = zlib.decompressobj()
        try:
            result = packed.decompress(raw, self._bytes + 64)
        except zlib.error as error:
            raise self._fault(chunk, f"cannot be unpacked: {error}") from error
        if not packed.eof and len(result) <= self._bytes:
            raise self._fault(chunk, "is cut short")
        return result

    def _summed(self, chunk: int, raw: bytes) -> bytes:
        """What stands before the checksum, which must be that of it."""
        body = raw[:-4]
        if len(raw) < 4 or int.from_bytes(raw[-4:], "little") != fletcher32(body):
            raise self._fault(chunk, "is not what its checksum says")
        return body

    def _fault(self, chunk: int, what: str) -> DataError:
        record = chunk * self._layout.chunk
        return DataError(
            self._file, f"a chunk {what}", field=self._name, record=record, hint="copy it anew"
        )


def fletcher32(raw: bytes) -> int:
    """HDF5's checksum of a chunk: two sums modulo 65535 over big-endian 16-bit words.

    Source: H5_checksum_fletcher32 of HDF5, which swaps nothing on any machine.
    """
    words = np.frombuffer(raw[: len(raw) // 2 * 2], ">u2").astype(np.uint64)
    if len(raw) % 2:
        words = np.append(words, np.uint64(raw[-1] << 8))
    count = len(words)
    weights = np.arange(count, 0, -1, dtype=np.uint64) % 65535
    if not words.any():
        return 0
    # sums in ones' complement: a multiple of 65535 is 65535, not 0
    low = int(words.sum()) % 65535 or 65535
    high = int((words * weights % 65535).sum()) % 65535 or 65535
    return (high << 16) | low
