"""A network as llama.cpp computes it: its forward pass under that program's own rounding.

llama.cpp multiplies integers. Before a product it rounds activations to 8 bits by blocks, 256
values for TQ1_0 and TQ2_0 (`quantize_row_q8_K`), 32 for the others (`quantize_row_q8_0`, whose
scale is then fp16), whatever the training did; what is not quantized multiplies in the type of its
file. Everything else is fp32 here and there.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from forge_plugins.interchange.gguf_parts import Other
from forge_plugins.interchange.ternary_blocks import BlockType
from forge_plugins.mathematics.quantization.ternary_layers import read_layers

_LONG_BLOCKS: Final = ("tq1_0", "tq2_0")


def round_activations(inputs: Tensor, kind: BlockType) -> Tensor:
    """What is multiplied with a weight of a type.

    Args:
        inputs: fp32, shape (..., columns); columns fill blocks.
        kind: of the weight's blocks.

    Returns:
        The same shape, fp32.
    """
    if kind in _LONG_BLOCKS:
        blocks = _blocks(inputs, 256)
        high, low = blocks.amax(-1, keepdim=True), blocks.amin(-1, keepdim=True)
        largest = torch.where(high > -low, high, low)  # with its sign
        factor = -127.0 / largest
        levels = torch.round(factor * blocks).clamp(max=127.0)
        return torch.where(largest == 0, 0.0, levels * (1.0 / factor)).flatten(-2)
    blocks = _blocks(inputs, 32)
    largest = blocks.abs().amax(-1, keepdim=True)
    scale = largest / 127.0
    levels = torch.round(blocks * torch.where(largest == 0, 0.0, 127.0 / largest))
    return (levels * scale.half().to(inputs.dtype)).flatten(-2)


def _blocks(inputs: Tensor, size: int) -> Tensor:
    return inputs.reshape(*inputs.shape[:-1], -1, size)


class _BlockLinear(nn.Module):
    """A layer with a weight in blocks."""

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, kind: BlockType) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.linear(round_activations(inputs, self.kind), self.weight, self.bias)


class _HalfLinear(nn.Module):
    """A layer with a weight in fp16, in which products of fp16 values are added in fp32."""

    def __init__(self, weight: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.half().float(), requires_grad=False)
        self.bias = bias

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.linear(inputs.half().to(inputs.dtype), self.weight, self.bias)


class _TableGelu(nn.Module):
    """GELU by the table that llama.cpp has of it on the CPU: fp16 in, fp16 out."""

    def forward(self, inputs: Tensor) -> Tensor:
        table = functional.gelu(inputs.half().float(), approximate="tanh").half()
        return torch.where(
            inputs <= -10, 0.0, torch.where(inputs >= 10, inputs, table.to(inputs.dtype))
        )


def as_llama_cpp(
    model: nn.Module, kind: BlockType, *, scale_tensors: bool, other: Other
) -> nn.Module:
    """A copy of a model, on the CPU in evaluation, that rounds as llama.cpp does.

    Arguments as of `gguf_model.gguf_tensors`.

    Raises:
        ValueError: the model has no ternary layer, or one that no file holds.
    """
    copy = deepcopy(model).to("cpu", torch.float32).eval()
    layers = read_layers(copy)
    for name, module in list(copy.named_modules()):
        if name in layers:
            level = 1.0 / layers[name].scale
            level = level if scale_tensors else level.half().float()
            weight = layers[name].levels.float() * level
            copy.set_submodule(name, _BlockLinear(weight, module.bias, kind))
        elif isinstance(module, nn.Linear) and other == "f16":
            copy.set_submodule(name, _HalfLinear(module.weight.detach(), module.bias))
        elif isinstance(module, nn.Embedding) and other == "f16":
            module.weight = nn.Parameter(module.weight.detach().half().float(), requires_grad=False)
        elif type(module).__name__ == "GELUTanh":  # of transformers
            copy.set_submodule(name, _TableGelu())
    return copy
