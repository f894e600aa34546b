"""The tensors of a GGUF file before they are packed: numbers, or levels and what one is worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from forge_plugins.interchange.gguf import GgufTensor, TensorType
from forge_plugins.interchange.grid_weight import need_grid_layers
from forge_plugins.interchange.ternary_blocks import BLOCK, BlockType, pack_blocks
from forge_plugins.mathematics.quantization.ternary_layers import TernaryLayer, check_layers

Other = Literal["f32", "f16"]
FILE_TYPES: Final[dict[BlockType, int]] = {
    "q4_0": 2, "tq1_0": 36, "tq2_0": 37, "q1_0": 40, "q2_0": 41,
}  # fmt: skip
"""llama.cpp's numbers for a file of mostly one type."""
_LARGEST_HALF: Final = torch.finfo(torch.float16).max


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of the file.

    Args:
        values: numbers, or int8 levels.
        kind: what they are written as.
        level: what one level is worth; None: the values are numbers.
    """

    values: Tensor
    kind: TensorType
    level: Tensor | None = None


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Rows of a head from (first half, second half) to pairs one after the other.

    Args:
        rows: a weight (heads * head_width, in) or a bias (heads * head_width,).
        heads: how many heads the rows hold.
    """
    parts = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return parts.transpose(1, 2).reshape(rows.shape)


def check_rows(model: nn.Module, kind: BlockType) -> None:
    """Refuse layers that a type cannot hold.

    Raises:
        ValueError: there is no ternary layer, or one whose rows do not fill blocks or whose levels
            the blocks do not hold; its name, and a type that can hold it.
    """
    shapes = check_layers(model)
    grids = need_grid_layers(model)
    for name, (_, columns) in shapes.items():
        bits = grids[name].scheme.weight_bits
        if kind == "q1_0" and bits != 1:
            raise ValueError(
                f"{name} has weights of {bits:g} bits, which have a level 0: q1_0 holds -1 and 1 "
                "alone (weight_bits: 1); set type: q2_0"
            )
        if columns % BLOCK[kind] == 0:
            continue
        fits = [other for other, block in BLOCK.items() if columns % block == 0 and other != "q1_0"]
        instead = f"set type: {fits[0]} (blocks of {BLOCK[fits[0]]})" if fits else ""
        raise ValueError(
            f"{name} has rows of {columns} weights, which is not a multiple of {BLOCK[kind]}, the "
            f"blocks of {kind}: {instead or 'change the sizes of the model'}, or export with "
            "transformers or packed_ternary"
        )


def number_part(name: str, values: Tensor, other: Other) -> Part:
    """What is not ternary: matrices in the type that is asked for, all else in fp32.

    Raises:
        ValueError: a number is too large for fp16.
    """
    kind: TensorType = other if values.ndim == 2 else "f32"
    numbers = values.detach().cpu().float()
    if kind == "f16" and numbers.numel() and float(numbers.abs().max()) > _LARGEST_HALF:
        raise ValueError(f"{name} holds numbers beyond the range of fp16: set other: f32")
    return Part(numbers, kind)


def level_parts(
    name: str, layer: TernaryLayer, levels: Tensor, kind: BlockType, *, scale_tensors: bool
) -> dict[str, Part]:
    """A ternary weight, and its scale where that has a tensor of its own.

    Args:
        name: of the layer in the file.
        layer: its scale.
        levels: in the order of the file.
        kind: of the blocks.
        scale_tensors: see `gguf_model.gguf_tensors`.
    """
    level = 1.0 / layer.scale
    if not scale_tensors:
        return {f"{name}.weight": Part(levels, kind, level)}
    return {
        f"{name}.weight": Part(levels, kind, torch.ones(())),
        f"{name}.scale": Part(level.reshape(1), "f32"),
    }


def packed(parts: Mapping[str, Part]) -> dict[str, GgufTensor]:
    """The tensors of the file."""
    result: dict[str, GgufTensor] = {}
    for name, part in parts.items():
        if part.level is None:
            result[name] = GgufTensor.plain(part.values, part.kind)
            continue
        kind: Any = part.kind
        blocks = pack_blocks(part.values, part.level, kind)
        result[name] = GgufTensor(tuple(part.values.shape), kind, blocks)
    return result


def numbers(parts: Mapping[str, Part]) -> dict[str, Tensor]:
    """The numbers that the file's tensors stand for, fp32."""
    result: dict[str, Tensor] = {}
    for name, part in parts.items():
        half = part.values.half() if part.kind == "f16" else part.values
        level = 1.0 if part.level is None else part.level.half().float()  # as blocks hold it
        result[name] = half.float() * level
    return result
