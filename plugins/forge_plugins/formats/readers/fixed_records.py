"""The binary format of this project: fixed records behind a header that says what they are.

Layout, integers little-endian: 8 bytes magic `FORGEREC`; 8 bytes length of the header; the header,
UTF-8 JSON `{"version": 1, "records": n, "fields": [{"name": .., "dtype": "<f4", "shape": [8]}]}`,
padded with blanks so that the records begin at a multiple of 64; then the records, packed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from forge_plugins.formats.columns.layout import Layout, field_layout
from forge_plugins.formats.columns.table import Column, check_numeric
from forge_plugins.formats.errors import DataError
from forge_plugins.formats.format import Format, Reading

MAGIC: Final = b"FORGEREC"
VERSION: Final = 1
_MAX_HEADER: Final = 2**20
_HINT: Final = "write it with forge_plugins.formats.readers.fixed_records.write_records"


def write_records(file: Path, columns: Mapping[str, Column]) -> None:
    """Write columns of one length as records."""
    fields = [
        (name, column.dtype.newbyteorder("<"), column.shape[1:]) for name, column in columns.items()
    ]
    rows = np.zeros(len(next(iter(columns.values()))), np.dtype(fields))
    for name, column in columns.items():
        rows[name] = column
    described = [
        {"name": name, "dtype": dtype.str, "shape": list(shape)} for name, dtype, shape in fields
    ]
    text = json.dumps({"version": VERSION, "records": len(rows), "fields": described}).encode()
    text = text.ljust(-(-(len(text) + 16) // 64) * 64 - 16)
    file.write_bytes(MAGIC + len(text).to_bytes(8, "little") + text + rows.tobytes())


def _header(file: Path) -> tuple[dict[str, Any], int]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(16)
        if start[:8] != MAGIC:
            raise DataError(file, f"begins with {start[:8]!r}, not {MAGIC!r}", hint=_HINT)
        length = int.from_bytes(start[8:], "little")
        if len(start) < 16 or length > min(_MAX_HEADER, size - 16):
            raise DataError(file, f"the header's length is {length}", place="byte 8", hint=_HINT)
        text = stream.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        message = f"the header is not JSON: {str(error)[:120]}"
        raise DataError(file, message, place="byte 16", hint=_HINT) from error
    if not isinstance(header, dict) or header.get("version") != VERSION:
        raise DataError(file, f"the header is not of version {VERSION}", hint=_HINT)
    return header, 16 + length


def _field(file: Path, field: Any) -> tuple[str, np.dtype[Any], tuple[int, ...]]:
    if not isinstance(field, dict) or not isinstance(field.get("name"), str):
        raise DataError(file, "the header has a field without a name", hint=_HINT)
    name, shape = field["name"], field.get("shape")
    try:
        dtype = np.dtype(str(field.get("dtype")))
    except (TypeError, ValueError, SyntaxError) as error:
        message = f"the type {str(field.get('dtype'))[:40]!r} is unknown"
        raise DataError(file, message, field=name, hint=_HINT) from error
    if not isinstance(shape, list) or any(type(n) is not int or n < 1 for n in shape):
        raise DataError(file, f"the shape {str(shape)[:40]} is none", field=name, hint=_HINT)
    if len(shape) > 8 or math.prod(shape) * dtype.itemsize > 2**31 - 1:
        message = f"a record of the shape {str(shape)[:60]} is too large"
        raise DataError(file, message, field=name, hint=_HINT)
    return name, dtype, tuple(shape)


def record_layouts(file: Path, reading: Reading) -> dict[str, Layout | None]:
    """The columns in place.

    Raises:
        DataError: the header is broken, or the file is not as long as it says.
    """
    header, offset = _header(file)
    fields, count = header.get("fields"), header.get("records")
    if not isinstance(fields, list) or not fields or type(count) is not int or count < 0:
        raise DataError(file, "the header lacks fields or records", hint=_HINT)
    result = [_field(file, field) for field in fields]
    if len({name for name, _, _ in result}) < len(result):
        raise DataError(file, "the header names a field twice", hint=_HINT)
    types = {name: dtype for name, dtype, _ in result}
    asked = [name for name in reading.names if name in types]
    for name in asked:
        check_numeric(file, name, types[name])
    row = sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in result)
    here = file.stat().st_size - offset
    if here != count * row:
        raise DataError(
            file,
            f"{count} records of {row} bytes need {count * row} bytes; there are {here}",
            record=here // row,
            hint=_HINT,
        )
    if not count:
        raise DataError(file, "there are no records", hint="give at least one")
    record = np.dtype(result)
    return dict.fromkeys(types) | {
        name: field_layout(record, name, (count,), offset) for name in asked
    }


FORMAT: Final = Format(name="binary", suffixes=(".frec",), magic=(MAGIC,), layouts=record_layouts)
"""Records of this project."""
