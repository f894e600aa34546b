"""Files of numpy: `.npy`, one array, and `.npz`, one array for each column."""

from __future__ import annotations

import math
import shutil
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from forge_plugins.formats.columns.column_writer import ColumnFolder
from forge_plugins.formats.columns.layout import Layout, field_layout, strides_of
from forge_plugins.formats.columns.table import check_numeric
from forge_plugins.formats.errors import DataError
from forge_plugins.formats.format import Format, Reading

MAX_EXPANSION: Final = 1000
"""Bytes that one stored byte may become; more is taken for a bomb."""
_HINT: Final = "write it with numpy.save or numpy.savez"
_READERS: Final = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def _header(
    file: Path, stream: IO[bytes], size: int, name: str | None
) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, order, type and place of the numbers, which must be as many as there are bytes."""
    try:
        version = np.lib.format.read_magic(stream)
        shape, fortran, dtype = _READERS[version](stream)
        offset = stream.tell()
    except Exception as error:
        message = f"the header is broken: {str(error)[:120]}"
        raise DataError(file, message, field=name, place="header", hint=_HINT) from error
    if dtype.hasobject:
        raise DataError(file, "holds objects", field=name, hint="save arrays of numbers")
    if any(type(n) is not int or n < 0 for n in shape):
        raise DataError(file, f"the shape {shape} is none", field=name, hint=_HINT)
    wanted = math.prod(shape) * dtype.itemsize
    if offset + wanted != size:
        message = f"the shape {shape} needs {wanted} bytes; there are {size - offset}"
        raise DataError(file, message, field=name, hint=_HINT)
    return shape, fortran, dtype, offset


def npy_layouts(file: Path, reading: Reading) -> dict[str, Layout | None]:
    """The column `input` in place, or the fields that are asked for of a structured array.

    Raises:
        DataError: the header is broken, or the file is not as long as it says.
    """
    with file.open("rb") as stream:
        shape, fortran, dtype, offset = _header(file, stream, file.stat().st_size, None)
    fields = dtype.names or ()
    asked = [name for name in reading.names if name in fields]
    for name in asked:
        check_numeric(file, name, dtype[name].base)
    if dtype.names is None:
        check_numeric(file, "input", dtype)
    if not shape:
        message = "is a single number, not one for each record"
        raise DataError(file, message, field="input", hint=_HINT)
    if not math.prod(shape):
        raise DataError(file, "there are no records", hint="give at least one")
    if dtype.names is None:
        strides = strides_of(shape, dtype.itemsize, fortran=True) if fortran else None
        return {"input": Layout(dtype=dtype.str, shape=shape, offset=offset, strides=strides)}
    return dict.fromkeys(fields) | {
        name: field_layout(dtype, name, shape, offset, fortran=fortran) for name in asked
    }


def read_npz(file: Path, columns: ColumnFolder, reading: Reading, names: Collection[str]) -> None:
    """Write columns, each copied out of the archive as it is.

    Args:
        file: the archive.
        columns: where they are written.
        reading: not asked.
        names: of the columns that are written.

    Raises:
        DataError: the archive is broken or expands beyond bounds, or a header is broken.
    """
    del reading
    try:
        with zipfile.ZipFile(file) as archive:
            members = {member.filename: member for member in archive.infolist()}
            if len(members) < len(archive.infolist()):
                raise DataError(file, "the archive names a member twice", hint=_HINT)
            for member in members.values():
                name = member.filename.removesuffix(".npy")
                if name not in names:
                    columns.pass_over([name])
                else:
                    _copy(file, archive, member, columns)
    except (
        zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError,
    ) as error:  # fmt: skip
        message = f"the archive is broken: {str(error)[:120]}"
        raise DataError(file, message, hint=_HINT) from error


def _copy(
    file: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, columns: ColumnFolder
) -> None:
    """One member, which must be an array of numbers as long as it says."""
    name = member.filename.removesuffix(".npy")
    if not member.filename.endswith(".npy"):
        raise DataError(file, "is no array", field=member.filename, hint=_HINT)
    if member.file_size > MAX_EXPANSION * max(member.compress_size, 2**10):
        message = f"{member.compress_size} bytes expand to {member.file_size}"
        raise DataError(file, message, field=name, hint="save it uncompressed if it is meant")
    with archive.open(member) as stream:
        _, _, dtype, _ = _header(file, stream, member.file_size, name)
    check_numeric(file, name, dtype)
    with archive.open(member) as stream, columns.path(name).open("wb") as target:
        shutil.copyfileobj(stream, target, 2**20)  # the archive's checksum is looked at on the way


NPY: Final = Format(name="npy", suffixes=(".npy",), magic=(b"\x93NUMPY",), layouts=npy_layouts)
NPZ: Final = Format(
    name="npz", suffixes=(".npz",), magic=(b"PK\x03\x04", b"PK\x05\x06"), read=read_npz
)
