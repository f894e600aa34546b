"""Tensors written in the safetensors format, hashed in the same pass."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from forge_kernel.errors import CheckpointError
from forge_kernel.storage.hashes import HashedFile

if TYPE_CHECKING:
    from torch import Tensor

_ALIGNMENT: Final = 8  # of the data's beginning, by the format
_NAMES: Final = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
    "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, int | str]:
    """Write a new safetensors file.

    `safetensors.torch.save_file` writes the same (a test compares them), but wants a copy of
    tensors that share memory, and what it writes would have to be read again to hash it.

    Args:
        file: it must not exist yet.
        tensors: by name, in the processor's memory and contiguous.

    Returns:
        Its entry in a manifest.

    Raises:
        CheckpointError: a tensor's type has no name in the format, or the processor orders bytes
            the other way round.
        OSError: it cannot be written.
    """
    import torch

    if sys.byteorder != "little":
        raise CheckpointError(f"{file}: checkpoints are not written on big-endian processors")
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    place = 0
    for name in order:
        tensor = tensors[name]
        dtype = _NAMES.get(str(tensor.dtype).removeprefix("torch."))
        if dtype is None:
            raise CheckpointError(f"{name}: a tensor of {tensor.dtype} cannot be kept")
        end = place + tensor.nbytes
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    stream = HashedFile(file)
    try:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            stream.write(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    finally:
        entry = stream.close()
    return entry
