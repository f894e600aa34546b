"""What a safetensors file says that it holds, read without torch, and whether it is whole."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

LARGEST: Final = 100_000_000
"""Bytes of a header, as the format's own reader bounds them."""
_POINTER: Final = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file.

    Args:
        shape: of the tensor.
        dtype: by the format's name, such as `F32`, `BF16` or `U8`.
        file: that holds it.
    """

    shape: tuple[int, ...]
    dtype: str
    file: str


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name; only its header is read.

    Raises:
        ValueError: it is cut off, or is no such file; the message names it.
        OSError: it cannot be read.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(max(8, len(_POINTER)))
        if start.startswith(_POINTER):
            raise ValueError(
                f"{file.name} is a pointer of Git LFS, not the weights: fetch them with git lfs "
                "pull, or download the file again"
            )
        length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else size
        if not 2 <= length <= min(LARGEST, size - 8):
            raise ValueError(f"{file.name} is no safetensors file, or is cut off: {_AGAIN}")
        stream.seek(8)
        header = stream.read(length)
    try:
        entries: dict[str, Any] = json.loads(header)
        tensors = {
            name: (tuple(map(int, entry["shape"])), str(entry["dtype"]), entry["data_offsets"])
            for name, entry in entries.items()
            if name != "__metadata__"
        }
        end = 8 + length + max((int(place[1]) for _, _, place in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{file.name} has a header that cannot be read: {_AGAIN}") from error
    if size != end:
        raise ValueError(f"{file.name} is not whole, {size} of {end} bytes are there: {_AGAIN}")
    return {
        name: StoredTensor(shape, dtype, file.name) for name, (shape, dtype, _) in tensors.items()
    }


_AGAIN: Final = "copy or download it again"
