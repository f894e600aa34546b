"""Writes GGUF, version 3: the file format of llama.cpp.

The layout is that of ggml's documentation: a head, entries `key -> typed value`, tensor
descriptions, then the tensors' bytes, each at a multiple of 32.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

ALIGNMENT: Final = 32
TensorType = Literal["f32", "f16", "q4_0", "tq1_0", "tq2_0", "q1_0", "q2_0"]
_TENSOR_TYPES: Final[dict[TensorType, int]] = {
    "f32": 0, "f16": 1, "q4_0": 2, "tq1_0": 34, "tq2_0": 35, "q1_0": 41, "q2_0": 42,
}  # fmt: skip
_PLAIN: Final[dict[TensorType, torch.dtype]] = {"f32": torch.float32, "f16": torch.float16}
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of the file.

    Args:
        shape: of the weights (of the blocks' weights, not of their bytes).
        kind: of the values.
        values: fp32 or fp16 values, or the bytes of blocks.
    """

    shape: tuple[int, ...]
    kind: TensorType
    values: Tensor

    @classmethod
    def plain(cls, values: Tensor, kind: TensorType = "f32") -> GgufTensor:
        """Values as they are, in fp32 or fp16."""
        return cls(tuple(values.shape), kind, values.detach().cpu().to(_PLAIN[kind]))

    def to_bytes(self) -> bytes:
        """As they stand in the file."""
        return self.values.contiguous().view(torch.uint8).numpy().tobytes()


def _text(value: str) -> bytes:
    raw = value.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _scalar(value: Any) -> tuple[int, bytes]:
    """The type's number and the bytes of a value."""
    if isinstance(value, bool):
        return _BOOL, struct.pack("<?", value)
    if isinstance(value, int):
        return _UINT32, struct.pack("<I", value)
    if isinstance(value, float):
        return _FLOAT32, struct.pack("<f", value)
    return _STRING, _text(value)


def _entry(key: str, value: Any) -> bytes:
    if not isinstance(value, list):
        kind, raw = _scalar(value)
        return _text(key) + struct.pack("<I", kind) + raw
    texts = not value or isinstance(value[0], str)  # the lists we write hold texts or int32
    kind = _STRING if texts else _INT32
    items = [_text(item) if texts else struct.pack("<i", item) for item in value]
    return _text(key) + struct.pack("<IIQ", _ARRAY, kind, len(items)) + b"".join(items)


def _padding(size: int) -> bytes:
    return b"\0" * (-size % ALIGNMENT)


def write_gguf(
    file: Path,
    entries: Mapping[str, str | float | bool | Sequence[str] | Sequence[int]],
    tensors: Mapping[str, GgufTensor],
) -> None:
    """Write a file.

    Args:
        file: to write.
        entries: metadata; whole numbers become uint32, others float32, lists int32 or texts.
        tensors: by name, in the order of the file.
    """
    head = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(entries))]
    head += [_entry(key, value) for key, value in entries.items()]
    offset = 0
    bodies: list[bytes] = []
    for name, tensor in tensors.items():
        sizes = tensor.shape[::-1]  # the fastest running dimension first
        head.append(_text(name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes))
        head.append(struct.pack("<IQ", _TENSOR_TYPES[tensor.kind], offset))
        raw = tensor.to_bytes()
        assert tensor.kind not in _PLAIN or len(raw) == math.prod(sizes) * (
            4 if tensor.kind == "f32" else 2
        )
        bodies.append(raw + _padding(len(raw)))
        offset += len(bodies[-1])
    begin = b"".join(head)
    with file.open("wb") as stream:
        stream.write(begin + _padding(len(begin)))
        for body in bodies:
            stream.write(body)
