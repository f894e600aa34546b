"""Ternary weights and int8 activations (BitNet b1.58), with straight-through gradients.

Reference: Ma et al. 2024, "The Era of 1-bit LLMs", arXiv 2402.17764, equations 1 to 3; the exact
arithmetic (order of operations, rounding, clamps) is that of the `AutoBitLinear` layer of the
transformers library, so that a network trained here gives the same bits there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

EPSILON = 1e-5
"""Smallest mean or maximum that a scale is taken from."""


def ternary_scale(weight: Tensor) -> Tensor:
    """`s = 1 / max(mean |W|, 1e-5)` over the whole tensor (0-d, fp32)."""
    return 1.0 / weight.float().abs().mean().clamp_(min=EPSILON)


def ternary_levels(weight: Tensor, scale: Tensor) -> Tensor:
    """`clamp(round(W * s), -1, 1)`, half to even; the shape of the weight, fp32."""
    return torch.mul(weight.float(), scale).round_().clamp_(-1, 1)


def quantize_weight(weight: Tensor) -> Tensor:
    """The weight that is applied: ternary levels divided by the scale.

    Args:
        weight: latent weight of any shape.

    Returns:
        A tensor of the weight's shape and dtype with values in {-1/s, 0, 1/s}.
    """
    scale = ternary_scale(weight)
    return ternary_levels(weight, scale).div_(scale).to(weight.dtype)


def activation_scale(inputs: Tensor) -> Tensor:
    """`s = 127 / max(max |x|, 1e-5)` per token: shape (..., 1), fp32.

    `max(max x, max -x)` is the same number as `max |x|` without the copy, several times faster.
    """
    largest = torch.maximum(inputs.amax(-1, keepdim=True), inputs.amin(-1, keepdim=True).neg_())
    return 127.0 / largest.clamp_(min=EPSILON)


def quantize_activation(inputs: Tensor) -> Tensor:
    """Activations on a grid of 255 levels per token (last dimension).

    The clamp to [-128, 127] of the reference never acts: |x * s| is at most 127 by construction.

    Args:
        inputs: shape (..., features).

    Returns:
        `round(x * s) / s` of the same shape and dtype.
    """
    values = inputs.float()
    scale = activation_scale(values)
    return torch.mul(values, scale).round_().div_(scale).to(inputs.dtype)


class _Applied(torch.autograd.Function):
    """Forward: the quantized tensor; backward: the gradient passes to the latent one as it is."""

    @staticmethod
    def forward(latent: Tensor, applied: Tensor) -> Tensor:
        del latent
        return applied.view_as(applied)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        del ctx, inputs, output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        del ctx
        return gradient, None


def straight_through(latent: Tensor, applied: Tensor) -> Tensor:
    """`applied` with the gradient of the identity towards `latent` (Bengio et al. 2013).

    Args:
        latent: the tensor that is trained.
        applied: what takes its place, the same shape and dtype, without gradient.
    """
    found: Tensor = _Applied.apply(latent, applied)  # type: ignore[no-untyped-call]
    return found
