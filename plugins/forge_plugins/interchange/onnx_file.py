"""Writes ONNX: graphs of nodes in the protocol-buffer encoding of `onnx.proto`.

Only the handful of messages that a graph with constants needs; field numbers are those of the
published `onnx.proto` (stable since IR version 3).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

IR_VERSION: Final = 11
INT2: Final = 26
_TYPES: Final = {
    torch.float32: 1,
    torch.uint8: 2,
    torch.int8: 3,
    torch.int64: 7,
}
MICROSOFT: Final = "com.microsoft"
Attribute = int | float | str


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers are written in two's complement
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes | str) -> bytes:
    raw = value.encode("utf-8") if isinstance(value, str) else value
    return _varint(field << 3 | 2) + _varint(len(raw)) + raw


def _tensor(name: str, shape: Sequence[int], kind: int, raw: bytes) -> bytes:
    sizes = b"".join(_number(1, size) for size in shape)
    return sizes + _number(2, kind) + _bytes(8, name) + _bytes(9, raw)


def _attribute(name: str, value: Attribute) -> bytes:
    head = _bytes(1, name)
    if isinstance(value, float):
        return head + _varint(2 << 3 | 5) + struct.pack("<f", value) + _number(20, 1)
    if isinstance(value, int):
        return head + _number(3, value) + _number(20, 2)
    return head + _bytes(4, value) + _number(20, 3)


def _value(name: str, kind: int, sizes: Sequence[int | str]) -> bytes:
    shape = b"".join(
        _bytes(1, _number(1, size) if isinstance(size, int) else _bytes(2, size)) for size in sizes
    )
    return _bytes(1, name) + _bytes(2, _bytes(1, _number(1, kind) + _bytes(2, shape)))


class OnnxGraph:
    """A graph in the making: constants and nodes in the order of their use."""

    def __init__(self) -> None:
        self._nodes: list[bytes] = []
        self._constants: dict[str, bytes] = {}

    def constant(self, name: str, value: Tensor) -> str:
        """A tensor of the file, given once under its name."""
        raw = value.detach().cpu().contiguous()
        self._constants[name] = _tensor(name, raw.shape, _TYPES[raw.dtype], raw.numpy().tobytes())
        return name

    def int2(self, name: str, packed: Tensor, shape: Sequence[int]) -> str:
        """Signed two-bit numbers, four to a byte, lowest bits first."""
        self._constants[name] = _tensor(name, shape, INT2, packed.numpy().tobytes())
        return name

    def node(
        self, operator: str, inputs: Sequence[str], domain: str = "", **attributes: Attribute
    ) -> str:
        """Add a node; its one output's name."""
        output = f"{operator}_{len(self._nodes)}"
        body = b"".join(_bytes(1, name) for name in inputs) + _bytes(2, output)
        body += _bytes(3, output) + _bytes(4, operator)
        body += b"".join(_bytes(5, _attribute(*item)) for item in attributes.items())
        self._nodes.append(body + (_bytes(7, domain) if domain else b""))
        return output

    def write(
        self,
        file: Path,
        inputs: Mapping[str, tuple[torch.dtype, Sequence[int | str]]],
        output: str,
        sizes: Sequence[int | str],
        opset: int,
    ) -> None:
        """Write the file.

        Args:
            file: to write.
            inputs: type and sizes of each input; a size is a number or the name of a free one.
            output: name of the fp32 result.
            sizes: of the result.
            opset: version of the standard operators.
        """
        last = _bytes(1, output) + _bytes(2, "logits") + _bytes(3, "last") + _bytes(4, "Identity")
        graph = [_bytes(1, node) for node in (*self._nodes, last)]
        graph.append(_bytes(2, "forge"))
        graph += [_bytes(5, constant) for constant in self._constants.values()]
        for name, (dtype, shape) in inputs.items():
            graph.append(_bytes(11, _value(name, _TYPES[dtype], shape)))
        graph.append(_bytes(12, _value("logits", 1, sizes)))
        sets = [_bytes(1, "") + _number(2, opset), _bytes(1, MICROSOFT) + _number(2, 1)]
        model = _number(1, IR_VERSION) + _bytes(2, "forge-kernel") + _bytes(7, b"".join(graph))
        file.write_bytes(model + b"".join(_bytes(8, result) for result in sets))
