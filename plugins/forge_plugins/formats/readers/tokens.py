"""Raw tokens: nothing but integers of one size, read as windows."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from forge_plugins.formats.columns.layout import Layout
from forge_plugins.formats.errors import DataError
from forge_plugins.formats.format import Format, Reading

TYPES: Final = ("uint8", "uint16", "uint32", "int32")
"""What a token may be."""


def token_layouts(file: Path, reading: Reading) -> dict[str, Layout | None]:
    """Sequences of tokens, each with the token that follows it, in place.

    A window is one row of `length` + 1 tokens: the inputs, and, one place on, their targets. It
    shares its last token with the next window; a rest at the end is left out.

    Args:
        file: the tokens, little-endian.
        reading: their type and the length of a window.

    Raises:
        DataError: the file's size is no whole number of tokens, or it has no whole window.
    """
    if reading.integers not in TYPES:
        hint = f"there are: {', '.join(TYPES)}"
        raise DataError(file, f"tokens of the type {reading.integers} are unknown", hint=hint)
    kind = np.dtype(reading.integers).newbyteorder("<")
    size, length = file.stat().st_size, reading.length
    if size % kind.itemsize:
        hint = "name the type that the tokens were written with, or write them anew"
        raise DataError(
            file,
            f"{size} bytes are no whole number of {reading.integers} "
            f"({size % kind.itemsize} left over)",
            place=f"byte {size - size % kind.itemsize}",
            hint=hint,
        )
    count = (size // kind.itemsize - 1) // length
    if count < 1:
        hint = "shorten the windows or give a longer file"
        tokens = size // kind.itemsize
        raise DataError(file, f"{tokens} tokens hold no window of {length} + 1", hint=hint)
    strides = (length * kind.itemsize, kind.itemsize)
    return {"input": Layout(dtype=kind.str, shape=(count, length + 1), strides=strides)}


FORMAT: Final = Format(name="tokens", layouts=token_layouts, shaped_by=("integers", "length"))
"""It has no sign of its own and must be named."""
