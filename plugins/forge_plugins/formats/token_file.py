"""Raw tokens: nothing but integers of one size, read as windows."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from forge_plugins.formats.fault import DataFault
from forge_plugins.formats.table import Column

TYPES: Final = ("uint8", "uint16", "uint32", "int32")
"""What a token may be."""


def map_tokens(file: Path, dtype: str, length: int) -> dict[str, Column]:
    """Windows of tokens and the tokens that follow each, mapped in place.

    Args:
        file: the tokens, little-endian.
        dtype: one of `TYPES`.
        length: tokens in a window; windows do not overlap, a rest at the end is left out.

    Raises:
        DataFault: the file's size is no whole number of tokens, or it has no whole window.
    """
    kind = np.dtype(dtype).newbyteorder("<")
    size = file.stat().st_size
    if size % kind.itemsize:
        hint = "give integers the type that the file was written with"
        raise DataFault(
            file,
            f"{size} bytes are no whole number of {dtype} ({size % kind.itemsize} left over)",
            place=f"byte {size - size % kind.itemsize}",
            hint=hint,
        )
    count = (size // kind.itemsize - 1) // length
    if count < 1:
        hint = "shorten the windows or give a longer file"
        tokens = size // kind.itemsize
        raise DataFault(file, f"{tokens} tokens hold no window of {length} + 1", hint=hint)
    row = np.memmap(file, kind, "r", 0, (count * length + 1,))
    return {
        "input": row[:-1].reshape(count, length),
        "target": row[1:].reshape(count, length),
    }
