"""Safetensors: one tensor for each column, mapped in place."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Final

import numpy as np

from forge_plugins.formats.columns.layout import Layout
from forge_plugins.formats.errors import DataError
from forge_plugins.formats.format import Format, Reading

TYPES: Final = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip
_MAX_HEADER: Final = 2**24
_HINT: Final = "write it with safetensors.numpy.save_file"


def safetensors_layouts(file: Path, reading: Reading) -> dict[str, Layout | None]:
    """The columns in place.

    Raises:
        DataError: the header is broken, or a tensor does not lie in the file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(_MAX_HEADER, size - 8):
            message = f"the header's length is {length}, the file's {size}"
            raise DataError(file, message, place="byte 0", hint=_HINT)
        text = stream.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        message = f"the header is not JSON: {str(error)[:120]}"
        raise DataError(file, message, place="byte 8", hint=_HINT) from error
    if not isinstance(header, dict):
        raise DataError(file, "the header is no object", place="byte 8", hint=_HINT)
    header.pop("__metadata__", None)
    return dict.fromkeys(header) | {
        name: _layout(file, name, header[name], 8 + length, size)
        for name in reading.names
        if name in header
    }


def _layout(file: Path, name: str, entry: Any, base: int, size: int) -> Layout:
    def refused(message: str) -> DataError:
        return DataError(file, message, field=name, hint=_HINT)

    if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
        raise refused("the header's entry has no shape")
    kind, shape, place = entry.get("dtype"), entry["shape"], entry.get("data_offsets")
    if not isinstance(kind, str) or kind not in TYPES:
        known = "float" if kind == "BF16" else "integer, float or bool"
        raise refused(f"the type {str(kind)[:20]} is none that is read; save it as {known}")
    if any(type(n) is not int or n < 0 for n in shape) or len(shape) > 16:
        raise refused(f"the shape {str(shape)[:60]} is none")
    if not isinstance(place, list) or len(place) != 2 or any(type(n) is not int for n in place):
        raise refused("the header's entry has no place in the file")
    dtype = np.dtype(TYPES[kind])
    wanted = math.prod(shape) * dtype.itemsize
    begin, end = place
    if not 0 <= begin <= end <= size - base or end - begin != wanted:
        raise refused(f"the bytes {begin} to {end} are not {wanted} bytes of this file")
    return Layout(dtype=dtype.str, shape=tuple(shape), offset=base + begin)


FORMAT: Final = Format(name="safetensors", suffixes=(".safetensors",), layouts=safetensors_layouts)
"""Read without the library: the header is JSON, the rest are numbers."""
