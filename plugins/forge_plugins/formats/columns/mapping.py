"""A column of a file where it lies: mapped, in chunks, or unpacked."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from forge_plugins.formats.columns.gather import Column, Rows
from forge_plugins.formats.columns.layout import Layout
from forge_plugins.formats.errors import DataError


def map_layout(file: Path, name: str, layout: Layout) -> Column | Rows:
    """The column in place.

    Args:
        file: where it lies.
        name: of the column, for messages.
        layout: of the column.

    Raises:
        DataError: it reaches beyond the file's end.
    """
    from forge_plugins.formats.columns.chunks import MappedChunks, PackedChunks

    size = file.stat().st_size
    if layout.end() > size:
        message = f"ends at byte {layout.end()}, the file at {size}"
        raise DataError(file, message, field=name, hint="it is cut short: copy it anew")
    dtype = np.dtype(layout.dtype)
    if layout.sizes is not None:
        return PackedChunks(file, name, layout)
    if not math.prod(layout.shape):
        return np.zeros(layout.shape, dtype)
    whole = np.memmap(file, np.uint8, "r")
    if layout.starts is not None:
        return MappedChunks(np.asarray(whole), layout)
    result: Column = np.ndarray(
        layout.shape, dtype, whole, layout.offset, layout.strides or None
    )  # fmt: skip
    return result
