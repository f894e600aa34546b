"""HDF5: one data set for each column, at the top of the file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np

from forge_plugins.formats.column_file import ColumnFolder
from forge_plugins.formats.fault import DataFault
from forge_plugins.formats.table import Column, check_numeric

MAX_EXPANSION: Final = 1000
"""Numbers' bytes for one stored byte; more is taken for a bomb."""
MAX_CHUNK: Final = 2**24
"""Bytes of a chunk, which HDF5 reads as a whole."""
_BLOCK: Final = 2**22
"""Bytes that are read at a time."""
_FILTERS: Final = {"gzip", "lzf", None}


def _checked(file: Path, group: Any, name: str) -> Any:
    link = group.get(name, getlink=True)
    if not isinstance(link, h5py.HardLink):
        kind = type(link).__name__
        hint = "copy the numbers into this file"
        raise DataFault(file, f"is a {kind}, which may lead anywhere", field=name, hint=hint)
    found = group[name]
    if not isinstance(found, h5py.Dataset):
        hint = "put the data sets at the top of the file"
        raise DataFault(file, "is a group, not a data set", field=name, hint=hint)
    if found.is_virtual or found.external:
        hint = "copy the numbers into this file"
        raise DataFault(file, "lies in other files", field=name, hint=hint)
    if found.shape is None:
        raise DataFault(file, "is empty", field=name, hint="give it numbers")
    if found.dtype.hasobject:
        hint = "write numbers of one length for each record"
        raise DataFault(file, f"holds objects ({found.dtype})", field=name, hint=hint)
    check_numeric(file, name, found.dtype)
    if found.compression not in _FILTERS:
        hint = "compress with gzip or lzf"
        raise DataFault(file, f"uses the filter {found.compression}", field=name, hint=hint)
    stored, wanted = found.id.get_storage_size(), found.size * found.dtype.itemsize
    if wanted > MAX_EXPANSION * stored:
        raise DataFault(
            file,
            f"says that it has {wanted} bytes and stores {stored}",
            field=name,
            hint="write its numbers, or compress them less",
        )
    return found


def _in_one_piece(found: Any) -> int | None:
    """Where the numbers lie in the file, if they lie as an array does."""
    if found.chunks is not None or found.compression is not None or found.size == 0:
        return None
    offset: int | None = found.id.get_offset()
    return offset


def map_hdf5(file: Path) -> dict[str, Column] | None:
    """The columns mapped in place; None when one is in chunks and must be copied.

    Raises:
        DataFault: the file is broken or a data set is refused.
    """
    columns: dict[str, Column] = {}
    size = file.stat().st_size
    for name, found in _data_sets(file):
        offset = _in_one_piece(found)
        if offset is None or not found.ndim:
            return None
        if offset + found.size * found.dtype.itemsize > size:
            raise DataFault(file, "ends within the numbers", field=name, hint="copy it anew")
        columns[name] = np.memmap(file, found.dtype, "r", offset, found.shape)
    return columns


def read_hdf5(file: Path, columns: ColumnFolder) -> None:
    """Write the columns, some chunks at a time.

    Raises:
        DataFault: the file is broken or a data set is refused.
    """
    for name, found in _data_sets(file):
        if not found.ndim:
            told = "is a single number, not one for each record"
            hint = "give an array whose first dimension counts the records"
            raise DataFault(file, told, field=name, hint=hint)
        step = block_rows(file, name, found)
        for begin in range(0, max(1, len(found)), step):
            columns.append(name, read_rows(file, name, found, begin, begin + step))


def block_rows(file: Path, name: str, found: Any) -> int:
    """Rows that are read at a time: whole chunks, about `_BLOCK` bytes.

    Raises:
        DataFault: a chunk is too large to be held.
    """
    row = max(1, found.size // max(1, len(found)) * found.dtype.itemsize)
    chunk = found.chunks[0] if found.chunks else 1
    if found.chunks and int(np.prod(found.chunks)) * found.dtype.itemsize > MAX_CHUNK:
        told = f"a chunk of the shape {list(found.chunks)} has more than {MAX_CHUNK} bytes"
        raise DataFault(file, told, field=name, hint="write it with smaller chunks")
    return int(max(chunk, _BLOCK // row // chunk * chunk))


def read_rows(file: Path, name: str, found: Any, begin: int, end: int) -> Column:
    """Some rows of a data set.

    Raises:
        DataFault: a chunk is broken.
    """
    try:
        rows: Column = found[begin:end]
    except (OSError, ValueError, RuntimeError) as error:
        raise DataFault(
            file,
            f"a chunk cannot be read: {str(error)[:120]}",
            field=name,
            record=begin,
            hint="copy the file anew",
        ) from error
    return rows


def _data_sets(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        opened = h5py.File(file, "r")
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        hint = "it is cut short or no HDF5 file: write it anew"
        raise DataFault(file, f"cannot be opened: {str(error)[:120]}", hint=hint) from error
    with opened:
        try:
            names = list(opened)
        except (RuntimeError, OSError, ValueError) as error:
            told = f"cannot be listed: {str(error)[:120]}"
            raise DataFault(file, told, hint="write it anew") from error
        for name in names:
            try:
                found = _checked(file, opened, name)
            except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
                told = f"cannot be opened: {str(error)[:120]}"
                raise DataFault(file, told, field=name, hint="write it anew") from error
            yield name, found
