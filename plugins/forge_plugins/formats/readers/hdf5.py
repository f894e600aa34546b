"""HDF5: one data set for each column, at the top of the file or, by its path, in its groups.

The library is asked where the numbers lie, and copies what must be copied, in a process apart:
files made for it crash it. What lies in the file as an array or in whole-row chunks is mapped.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from forge_plugins.formats.columns.column_writer import ColumnFolder
from forge_plugins.formats.columns.gather import Column
from forge_plugins.formats.columns.layout import Layout
from forge_plugins.formats.columns.table import check_numeric
from forge_plugins.formats.errors import DataError
from forge_plugins.formats.format import Format, Reading

MAX_EXPANSION: Final = 1000
"""Numbers' bytes for one stored byte; more is taken for a bomb."""
MAX_CHUNK: Final = 2**24
"""Bytes of a chunk, which HDF5 reads as a whole."""
_BLOCK: Final = 2**22
"""Bytes that are read at a time."""
_FILTERS: Final = {1: "deflate", 2: "shuffle", 3: "fletcher32"}
"""Those that are undone without the library, by their numbers in HDF5."""
_SHUFFLE: Final = 2
_BUILT_IN: Final = {*_FILTERS, 4, 5, 6, 32000}
"""Those of the library and of h5py: szip, n-bit, scale and offset, lzf."""


def _checked(file: Path, opened: Any, name: str) -> Any:
    """A data set whose numbers may be read; None when there is none of this name or path.

    Raises:
        DataError: it is refused.
    """
    try:
        result = _led_to(file, opened, name)
        return None if result is None else _data_set(file, name, result)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        message = f"cannot be opened: {str(error)[:120]}"
        raise DataError(file, message, field=name, hint="write it anew") from error


def _led_to(file: Path, opened: Any, name: str) -> Any:
    """What a name, or a path part by part, leads to inside the file; None when to nothing."""
    import h5py

    result = opened
    for part in name.split("/"):
        link = result.get(part, getlink=True) if isinstance(result, h5py.Group) and part else None
        if link is None:
            return None
        if not isinstance(link, h5py.HardLink):
            kind = type(link).__name__
            hint = "copy the numbers into this file"
            raise DataError(file, f"is a {kind}, which may lead anywhere", field=name, hint=hint)
        result = result[part]
    return result


def _data_set(file: Path, name: str, data_set: Any) -> Any:
    import h5py

    if not isinstance(data_set, h5py.Dataset):
        first = next(iter(data_set), None)
        hint = (
            "name a data set" if first is None else f"name what is in it, such as '{name}/{first}'"
        )
        raise DataError(file, "is a group, not a data set", field=name, hint=hint)
    if data_set.is_virtual or data_set.external:
        hint = "copy the numbers into this file"
        raise DataError(file, "lies in other files", field=name, hint=hint)
    if data_set.shape is None:
        raise DataError(file, "is empty", field=name, hint="give it numbers")
    if data_set.dtype.hasobject:
        hint = "write numbers of one length for each record"
        raise DataError(file, f"holds objects ({data_set.dtype})", field=name, hint=hint)
    check_numeric(file, name, data_set.dtype)
    if not data_set.ndim:
        message = "is a single number, not one for each record"
        hint = "give an array whose first dimension counts the records"
        raise DataError(file, message, field=name, hint=hint)
    foreign = [number for number in _filters(data_set) if number not in _BUILT_IN]
    if foreign:
        hint = "compress with gzip or lzf"
        raise DataError(file, f"uses the filter {foreign[0]}", field=name, hint=hint)
    stored, wanted = data_set.id.get_storage_size(), data_set.size * data_set.dtype.itemsize
    if wanted > MAX_EXPANSION * stored:
        raise DataError(
            file,
            f"says that it has {wanted} bytes and stores {stored}",
            field=name,
            hint="write its numbers, or compress them less",
        )
    return data_set


def _filters(data_set: Any) -> list[int]:
    plan = data_set.id.get_create_plist()
    return [plan.get_filter(number)[0] for number in range(plan.get_nfilters())]


def layouts(file: Path, reading: Reading) -> dict[str, Layout | None]:
    """Where the columns lie; None for one that the library must copy or nobody asks for.

    Raises:
        DataError: the file is broken or a data set is refused.
    """
    with _opened(file) as opened:
        result = dict.fromkeys(_names(file, opened))
        plain = not opened.userblock_size  # else places in it are not places in the file
        for name in reading.names:
            data_set = _checked(file, opened, name)
            if data_set is not None:
                result[name] = _layout(data_set) if plain else None
    return result


def _layout(data_set: Any) -> Layout | None:
    import h5py

    if not data_set.size or not data_set.id.get_type().equal(h5py.h5t.py_create(data_set.dtype)):
        return None  # numbers of a width or form of their own are converted by the library
    if data_set.chunks is None:
        offset = data_set.id.get_offset()
        contiguous = data_set.id.get_create_plist().get_layout() == h5py.h5d.CONTIGUOUS
        whole = contiguous and offset is not None
        return (
            Layout(dtype=data_set.dtype.str, shape=data_set.shape, offset=offset) if whole else None
        )
    filters = _filters(data_set)
    row = math.prod(data_set.shape[1:]) * data_set.dtype.itemsize
    if data_set.chunks[1:] != data_set.shape[1:] or data_set.chunks[0] * row > MAX_CHUNK:
        return None
    if not set(filters) <= set(_FILTERS) or _SHUFFLE in filters[1:]:
        return None
    return _chunks(data_set, filters)


def _chunks(data_set: Any, filters: list[int]) -> Layout | None:
    """The places of the chunks; None when some are not written."""
    count = -(-data_set.shape[0] // data_set.chunks[0])
    places = np.full((3, count), -1, np.int64)

    def note(info: Any) -> None:
        number = info.chunk_offset[0] // data_set.chunks[0]
        if 0 <= number < count and info.byte_offset is not None:
            places[:, number] = info.byte_offset, info.size, info.filter_mask

    data_set.id.chunk_iter(note)
    if (places[0] < 0).any():
        return None
    packed = {"sizes": places[1], "skipped": places[2]} if filters else {}
    return Layout(
        dtype=data_set.dtype.str, shape=data_set.shape, chunk=data_set.chunks[0], starts=places[0],
        filters=tuple(_FILTERS[number] for number in filters), **packed,
    )  # fmt: skip


def read_hdf5(file: Path, columns: ColumnFolder, reading: Reading, names: Collection[str]) -> None:
    """Write columns, some chunks at a time.

    Args:
        file: the file.
        columns: where they are written.
        reading: not asked.
        names: of the columns that are copied.

    Raises:
        DataError: the file is broken or a data set is refused.
    """
    del reading
    with _opened(file) as opened:
        for name in names:
            result = _checked(file, opened, name)
            if result is None:  # the file lists a name that leads nowhere
                raise DataError(file, "is listed and not there", field=name, hint="write it anew")
            step = _block_rows(file, name, result)
            for begin in range(0, max(1, len(result)), step):
                columns.append(name, _rows(file, name, result, begin, begin + step))


def _block_rows(file: Path, name: str, data_set: Any) -> int:
    """Rows that are read at a time: whole chunks, about `_BLOCK` bytes.

    Raises:
        DataError: a chunk is too large to be held.
    """
    row = max(1, data_set.size // max(1, len(data_set)) * data_set.dtype.itemsize)
    chunk = data_set.chunks[0] if data_set.chunks else 1
    if data_set.chunks and int(np.prod(data_set.chunks)) * data_set.dtype.itemsize > MAX_CHUNK:
        message = f"a chunk of the shape {list(data_set.chunks)} has more than {MAX_CHUNK} bytes"
        raise DataError(file, message, field=name, hint="write it with smaller chunks")
    return int(max(chunk, _BLOCK // row // chunk * chunk))


def _rows(file: Path, name: str, data_set: Any, begin: int, end: int) -> Column:
    try:
        rows: Column = data_set[begin:end]
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            file,
            f"a chunk cannot be read: {str(error)[:120]}",
            field=name,
            record=begin,
            hint="copy the file anew",
        ) from error
    return rows


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """The file, opened by the library.

    Raises:
        DataError: it cannot be.
    """
    import h5py

    try:
        opened = h5py.File(file, "r")
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        hint = "it is cut short or no HDF5 file: write it anew"
        raise DataError(file, f"cannot be opened: {str(error)[:120]}", hint=hint) from error
    with opened:
        yield opened


def _names(file: Path, opened: Any) -> list[str]:
    try:
        return list(opened)
    except (RuntimeError, OSError, ValueError) as error:
        message = f"cannot be listed: {str(error)[:120]}"
        raise DataError(file, message, hint="write it anew") from error


FORMAT: Final = Format(
    name="hdf5",
    suffixes=(".h5", ".hdf5"),
    magic=(b"\x89HDF\r\n\x1a\n",),
    layouts=layouts,
    read=read_hdf5,
    sandboxed=True,
)
"""Read by h5py."""
