"""Weights and activations on few levels (BitNet), and their straight-through gradients.

References: Wang et al. 2023, "BitNet", arXiv 2310.11453 (1 bit); Ma et al. 2024, "The Era of 1-bit
LLMs", arXiv 2402.17764, equations 1 to 3 (1.58 bits); Nielsen and Schneider-Kamp 2024, "BitNet
b1.58 Reloaded", arXiv 2407.09527 (median). The exact arithmetic of the default (order of
operations, rounding, clamps) is that of the `AutoBitLinear` layer of the transformers library, so
that a network trained here gives the same bits there.

A *scale* `s` is the number of levels in 1: `applied = level / s`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from forge_plugins.mathematics.quantization.device_kernels import kernels
from forge_plugins.mathematics.quantization.scheme import Scheme

EPSILON = 1e-5
"""Smallest mean or maximum that a scale is taken from."""


def ternary_scale(weight: Tensor) -> Tensor:
    """`s = 1 / max(mean |W|, 1e-5)` over the whole tensor (0-d, fp32)."""
    return 1.0 / weight.float().abs().mean().clamp_(min=EPSILON)


def ternary_levels(weight: Tensor, scale: Tensor) -> Tensor:
    """`clamp(round(W * s), -1, 1)`, half to even; the shape of the weight, fp32."""
    return torch.mul(weight.float(), scale).round_().clamp_(-1, 1)


def quantize_weight(weight: Tensor) -> Tensor:
    """The weight that the default scheme applies: ternary levels divided by the scale.

    Args:
        weight: latent weight of any shape.

    Returns:
        A tensor of the weight's shape and dtype with values in {-1/s, 0, 1/s}.
    """
    scale = ternary_scale(weight)
    return ternary_levels(weight, scale).div_(scale).to(weight.dtype)


# -- any scheme ------------------------------------------------------------------------------------


def arranged(weight: Tensor, scheme: Scheme) -> Tensor:
    """The weight with what shares a scale along the last dimension.

    Returns:
        The weight itself (per tensor), shape (out, rest) (per row) or (out, groups, group_size).

    Raises:
        ValueError: the rows are not made of whole groups.
    """
    if scheme.granularity == "tensor":
        return weight
    rows = weight.reshape(weight.shape[0], -1)
    if scheme.granularity == "row":
        return rows
    size = scheme.group_size
    if rows.shape[1] % size:
        raise ValueError(
            f"rows of {rows.shape[1]} weights are not made of groups of {size}: choose a "
            "group_size that divides them, or granularity row"
        )
    return rows.view(rows.shape[0], -1, size)


def _over(values: Tensor, scheme: Scheme, reduce: str) -> Tensor:
    """A reduction over what shares a scale: 0-d per tensor, else (..., 1)."""
    if scheme.granularity == "tensor":
        if reduce == "largest":
            return torch.maximum(values.amax(), values.amin().neg_())
        return values.mean() if reduce == "mean" else values.median()
    if reduce == "largest":
        return torch.maximum(values.amax(-1, keepdim=True), values.amin(-1, keepdim=True).neg_())
    if reduce == "mean":
        return values.mean(-1, keepdim=True)
    return values.median(-1, keepdim=True).values


def unclamped_measure(weight: Tensor, scheme: Scheme) -> Tensor:
    """Mean, median or maximum of |W|, fp32: 0-d, (out, 1) or (out, groups, 1).

    Args:
        weight: latent weight of any shape.
        scheme: says which, and what shares one.
    """
    values = arranged(weight.detach(), scheme).float()
    if scheme.step_from == "absmax":
        return _over(values, scheme, "largest")
    return _over(values.abs(), scheme, "mean" if scheme.step_from == "absmean" else "median")


def weight_scale(weight: Tensor, scheme: Scheme) -> Tensor:
    """`s = qmax / max(measure, 1e-5)`, fp32: 0-d, (out, 1) or (out, groups, 1).

    With the arithmetic of torchao the floor acts on the rounding alone, not on what is applied.
    """
    if scheme.parity == "torchao":
        tiny = torch.finfo(torch.float32).tiny
        return 1.0 / unclamped_measure(weight, scheme).clamp_(min=tiny)
    return float(scheme.qmax) / unclamped_measure(weight, scheme).clamp_(min=EPSILON)


def in_levels(weight: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """The latent weight in units of the step, arranged, fp32, a new tensor.

    For one bit the mean of what shares a scale is taken away first (arXiv 2310.11453, eq. 1-3).

    Args:
        weight: shape (out, ...).
        scale: of `weight_scale`: 0-d, (out, 1) or (out, groups, 1).
        scheme: of the layer.

    Returns:
        The weight's shape; (out, in) by row; (out, groups, group_size) by group.
    """
    values = arranged(weight.detach(), scheme).float()
    if scheme.weight_bits == 1:
        return (values - _over(values, scheme, "mean")).mul_(scale)
    if scheme.parity == "torchao":
        return torch.div(values, unclamped_measure(weight, scheme).clamp_(min=EPSILON))
    return torch.mul(values, scale)


def nearest_levels(values: Tensor, scheme: Scheme, threshold: Tensor | None = None) -> Tensor:
    """Round to levels, in place.

    Args:
        values: in units of the step, from `in_levels`; overwritten.
        scheme: the grid.
        threshold: where the border between levels lies, in units of the step (0-d): |v| above it
            leaves zero (1.58 bits; 0.5 is rounding), v above it is +1 (1 bit; 0 is the sign).
            None: rounding to the nearest.

    Returns:
        Whole numbers in [-qmax, qmax], fp32.
    """
    if scheme.weight_bits == 1:
        border = 0.0 if threshold is None else threshold
        return torch.ge(values, border, out=values).mul_(2).sub_(1)
    if threshold is not None:
        inside = values.abs() <= threshold
        return values.sign_().masked_fill_(inside, 0.0)
    return values.round_().clamp_(-scheme.qmax, scheme.qmax)


def drawn_levels(values: Tensor, scheme: Scheme, seed: int | None = None) -> Tensor:
    """Round to a neighbouring level at random, in place: the mean over draws is `values`.

    Values beyond the grid go to its end, so that the mean is the clipped value.

    Args:
        values: in steps between levels, overwritten.
        scheme: of the levels.
        seed: of this draw; None: torch's stream of the tensor's device goes on.
    """
    qmax = float(scheme.qmax)
    values.clamp_(-qmax, qmax)
    generator = None if seed is None else torch.Generator(values.device).manual_seed(seed)
    noise = torch.rand(values.shape, generator=generator, device=values.device, dtype=values.dtype)
    if scheme.weight_bits == 1:
        up = values.add_(1).mul_(0.5)
        return torch.lt(noise, up, out=values).mul_(2).sub_(1)
    return values.add_(noise).floor_().clamp_(-qmax, qmax)


def smallest(values: Tensor, share: float) -> Tensor:
    """Which are the smallest in magnitude: exactly `floor(share * n)` of them.

    Args:
        values: any shape.
        share: in [0, 1].

    Returns:
        A mask of the shape; among equal ones the first count as smaller.
    """
    count = math.floor(share * values.numel())
    sizes = values.abs().reshape(-1)
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    border = sizes.kthvalue(count).values
    below = sizes < border
    equal = sizes == border
    missing = count - below.sum()
    below |= equal & (equal.cumsum(0) <= missing)
    return below.view(values.shape)


def dequantize(levels: Tensor, scale: Tensor) -> Tensor:
    """`level / s` in fp32, a new tensor of the levels' shape; the scale is broadcast to it."""
    return levels.to(torch.float32, copy=True).div_(scale)


# -- activations -----------------------------------------------------------------------------------


def activation_scale(inputs: Tensor) -> Tensor:
    """`s = 127 / max(max |x|, 1e-5)` per token: shape (..., 1), fp32.

    `max(max x, max -x)` is the same number as `max |x|` without the copy, several times faster.
    """
    largest = torch.maximum(inputs.amax(-1, keepdim=True), inputs.amin(-1, keepdim=True).neg_())
    return 127.0 / largest.clamp_(min=EPSILON)


def activation_grid(
    inputs: Tensor, scheme: Scheme, *, channels: bool = False
) -> tuple[Tensor, Tensor]:
    """Activations as whole numbers and their scale.

    Args:
        inputs: shape (..., features), or (batch, channels, ...) with `channels`; not overwritten.
        scheme: bits, and what shares a scale.
        channels: a convolution's input: what stands for a token is a sample.

    Returns:
        `round(x * s)` in fp32 and `s`, which broadcasts against it. No clamp is needed: |x * s|
        is at most the highest level by construction, within one rounding.
    """
    values = inputs.float()
    qmax = float(scheme.activation_qmax)
    if scheme.activation_granularity == "tensor":
        largest = torch.maximum(values.amax(), values.amin().neg_())
    else:
        dims = list(range(1, values.dim())) if channels else [-1]
        largest = torch.maximum(
            values.amax(dims, keepdim=True), values.amin(dims, keepdim=True).neg_()
        )
    if scheme.parity == "torchao":
        # the step is rounded to the input's dtype; the floor is on the step, not on the maximum
        step = (largest.to(inputs.dtype) / qmax).float()
        levels = torch.mul(values, 1.0 / step.clip(EPSILON)).round_().clamp_(-128, 127)
        return levels, 1.0 / step.clamp_(min=torch.finfo(torch.float32).tiny)
    scale = qmax / largest.clamp_(min=EPSILON)
    return torch.mul(values, scale).round_(), scale


CACHED = 1 << 18
"""Numbers whose fp32 stays in a processor's cache."""


def activation_levels(inputs: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Activations as int8, shape (rows, features), and their scale, (rows, 1) or 0-d."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    fused = _row_kernels(rows, scheme)
    if fused is not None:
        result: tuple[Tensor, Tensor, None] = fused.quantized_rows(
            rows, scheme.activation_qmax, as_int8=True, dtype=None
        )
        return result[:2]
    size = _rows_at_once(rows, scheme)
    if not size:
        levels, scale = activation_grid(rows, scheme)
        return levels.to(torch.int8), scale
    levels = torch.empty(rows.shape, dtype=torch.int8)
    scale = torch.empty(rows.shape[0], 1)
    parts = zip(*(torch.split(item, size) for item in (rows, levels, scale)), strict=True)
    for part, into, scale_into in parts:
        grid, factors = activation_grid(part, scheme)
        into.copy_(grid)
        scale_into.copy_(factors)
    return levels, scale


def activation_levels_and_values(
    inputs: Tensor, scheme: Scheme, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`activation_levels`, and `activation_values` where the device gives both in one pass.

    The values have the shape (rows, features); None: whoever needs them takes them from the levels.
    """
    rows = inputs.reshape(-1, inputs.shape[-1])
    fused = _row_kernels(rows, scheme)
    if fused is None:
        return *activation_levels(rows, scheme), None
    result: tuple[Tensor, Tensor, Tensor] = fused.quantized_rows(
        rows, scheme.activation_qmax, as_int8=True, dtype=dtype
    )
    return result


def activation_values(inputs: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """Activations on their grid, dequantized, rounded to their own dtype and then to `dtype`.

    Args:
        inputs: shape (..., features); a token is a row of the last dimension.
        scheme: of the layer.
        dtype: of the result, which has the shape of the inputs.
    """
    rows = inputs.reshape(-1, inputs.shape[-1])
    fused = _row_kernels(rows, scheme)
    if fused is not None:
        result: Tensor = fused.quantized_rows(
            inputs, scheme.activation_qmax, as_int8=False, dtype=dtype
        )[2]
        return result
    size = 0 if dtype is torch.float32 else _rows_at_once(rows, scheme)
    if not size:
        levels, scale = activation_grid(inputs, scheme)
        return levels.div_(scale).to(inputs.dtype).to(dtype)
    values = torch.empty(rows.shape, dtype=dtype)
    for part, into in zip(torch.split(rows, size), torch.split(values, size), strict=True):
        levels, scale = activation_grid(part, scheme)
        into.copy_(levels.div_(scale).to(inputs.dtype))
    return values.view(inputs.shape)


def _row_kernels(rows: Tensor, scheme: Scheme) -> Any:
    """The device's kernels, if it has some that do this."""
    if scheme.activation_granularity == "tensor" or scheme.parity != "hf" or not rows.numel():
        return None
    fused = kernels(rows.device)
    return fused if fused is not None and rows.shape[1] <= fused.WIDEST else None


def _rows_at_once(rows: Tensor, scheme: Scheme) -> int:
    """How many rows to quantize at a time; 0: all.

    On a CPU, fresh memory for the whole of the fp32 in between costs more than the arithmetic.
    """
    small = rows.numel() <= CACHED or scheme.activation_granularity == "tensor"
    if small or rows.device.type != "cpu" or torch.compiler.is_compiling():
        return 0
    return max(1, CACHED // rows.shape[1])


def quantize_activation(inputs: Tensor) -> Tensor:
    """Activations on the default grid of 255 levels per token (last dimension).

    Args:
        inputs: shape (..., features).

    Returns:
        `round(x * s) / s` of the same shape and dtype.
    """
    values = inputs.float()
    scale = activation_scale(values)
    return torch.mul(values, scale).round_().div_(scale).to(inputs.dtype)


# -- gradients -------------------------------------------------------------------------------------


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
    result: Tensor = _Applied.apply(latent, applied)  # type: ignore[no-untyped-call]
    return result


BAND = 0.5
"""Half width, in steps, of the band round a border in which a weight tells the threshold."""


class _Estimated(torch.autograd.Function):
    """Forward: `applied`; backward: the identity where `pass_` says, and the threshold's share."""

    @staticmethod
    def forward(
        latent: Tensor, threshold: Tensor | None, applied: Tensor, scale: Tensor, how: Any
    ) -> Tensor:
        del latent, threshold, scale, how
        return applied.view_as(applied)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        del output
        latent, threshold, _, scale, how = inputs
        ctx.how = how
        ctx.save_for_backward(latent, threshold, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        latent, threshold, scale = ctx.saved_tensors
        scheme, warmup_lambda = ctx.how
        values = in_levels(latent, scale, scheme)
        passed: Tensor | None = gradient
        share = 1.0 - warmup_lambda
        if scheme.ste == "clipped":
            inside = (values.abs() <= scheme.qmax).view(latent.shape)
            passed = gradient * (inside + ~inside * share)
        elif scheme.ste == "none":
            passed = gradient * share if share else None
        of_threshold = None
        if threshold is not None and ctx.needs_input_grad[1]:
            of_threshold = threshold_gradient(
                arranged(gradient, scheme).float(), values, threshold, scale, scheme
            ).mul_(warmup_lambda)
        return passed, of_threshold, None, None, None


def threshold_gradient(
    gradient: Tensor, values: Tensor, threshold: Tensor, scale: Tensor, scheme: Scheme
) -> Tensor:
    """The gradient of a threshold between levels (0-d).

    The jump of a weight that crosses the border is spread over a band of one step round it (the
    rectangular window estimator of spiking networks, Wu et al. 2018, arXiv 1706.02609): raising
    the border by d moves the share `d / (2 * BAND)` of the weights in the band one level (1 bit:
    two levels) down in magnitude. Divided by sqrt(n), as learned step sizes are (Esser et al.
    2020, arXiv 1902.08153), so that its size does not grow with the layer.

    Args:
        gradient: with respect to the applied weight, arranged.
        values: latent weight in units of the step, arranged.
        threshold: 0-d.
        scale: of the levels.
        scheme: 1 or 1.58 bits.
    """
    if scheme.weight_bits == 1:
        near = (values - threshold).abs() < BAND
        moved = gradient * near * -2.0
    else:
        near = (values.abs() - threshold).abs() < BAND
        moved = gradient * near * -values.sign()
    total = (moved / scale).sum() / (2 * BAND)
    return (total / math.sqrt(values.numel())).reshape(threshold.shape).to(threshold.dtype)


def estimated(
    latent: Tensor,
    threshold: Tensor | None,
    applied: Tensor,
    scale: Tensor,
    scheme: Scheme,
    warmup_lambda: float = 1.0,
) -> Tensor:
    """`applied` with the gradient that the scheme's estimator gives towards what is trained.

    Args:
        latent: the weight that is trained.
        threshold: the learned border between levels, or None.
        applied: what takes the weight's place: its shape, without gradient.
        scale: of the levels.
        scheme: `plain` passes the gradient, `clipped` passes it within the grid, `off` does not;
            what is blended in of the latent weight itself keeps its gradient.
        warmup_lambda: share of the quantized weight in `applied`.
    """
    if threshold is None and scheme.ste == "identity":
        return straight_through(latent, applied)
    if threshold is None and scheme.ste == "none" and warmup_lambda == 1.0:
        return applied
    result: Tensor = _Estimated.apply(latent, threshold, applied, scale, (scheme, warmup_lambda))  # type: ignore[no-untyped-call]
    return result
