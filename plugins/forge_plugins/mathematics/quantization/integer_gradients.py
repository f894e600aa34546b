"""Gradients of a linear layer from products of whole numbers: only what comes in is rounded.

`dx = g W` takes the levels of the weight that the forward pass multiplied with, `dW = g^T x` those
of the input, so both are exact; the incoming gradient is rounded to 8 bits twice, each time along
the sum's own direction: for `dx` each token by itself; for `dW` each output by itself over a chunk
of tokens of a like magnitude, with the tokens' own scales taken in first, and to 16 bits where
outliers would make that too coarse. (arXiv 2304.13013 keeps `dW` in 16 bits; torchao's int8
mixed-precision training gives a column one step over all tokens.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library
from torch.nn import functional

from forge_plugins.mathematics.quantization.device_kernels import (
    gradient_kernels,
    scaled_product,
)
from forge_plugins.mathematics.quantization.gradient_columns import (
    COLUMNS,
    NOTHING,
    SORTED,
    TOKENS,
    WORST,
    Columns,
)
from forge_plugins.mathematics.quantization.processor import instructions


def gradient_rows(rows: Tensor, of_outputs: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows on a grid of their own largest magnitude.

    Args:
        rows: shape (tokens, out).
        of_outputs: what each column is divided by first, fp32, shape (out,); or None.

    Returns:
        Levels, int8, the same shape, and the scale, levels in 1, fp32, shape (tokens, 1). A row
        with a number that is not finite has a scale of 0 or NaN, and so a gradient that is not.
    """
    if (fused := gradient_kernels(rows.device)) is not None:
        result: tuple[Tensor, Tensor] = fused.gradient_rows(rows, of_outputs)
        return result
    values = rows.float()
    if of_outputs is not None:
        values = values / of_outputs
    scale = _scale(values.abs().amax(-1, keepdim=True))
    return (values * scale).round().to(torch.int8), scale


def token_order(magnitudes: Tensor) -> Tensor:
    """Tokens of a like magnitude side by side, so that they share a step well.

    Args:
        magnitudes: shape (tokens, 1).

    Returns:
        Their numbers, largest first within each `SORTED` of them, as many as whole chunks hold;
        those beyond the last token stand for zeros.
    """
    flat = magnitudes.flatten()
    if missing := -len(flat) % SORTED:
        flat = functional.pad(flat, (0, missing), value=-1.0)
    order = flat.view(-1, SORTED).sort(dim=1, descending=True, stable=True).indices
    if len(order) > 1:
        order += torch.arange(0, len(flat), SORTED, device=order.device)[:, None]
    return order.view(-1)[: -(-len(magnitudes) // TOKENS) * TOKENS]


def _taken(rows: Tensor, order: Tensor) -> Tensor:
    return functional.pad(rows, (0, 0, 0, len(order) - len(rows)))[order]


def gradient_columns(rows: Tensor, value_scale: Tensor, order: Tensor) -> Columns:
    """`rows / value_scale` on a grid of each column's largest magnitude within a chunk of tokens.

    Args:
        rows: shape (tokens, out).
        value_scale: of the layer's input, levels in 1, shape (tokens, 1), or one number.
        order: of the tokens, of `token_order`.
    """
    if (fused := gradient_kernels(rows.device)) is not None:
        result: Columns = fused.gradient_columns(rows, value_scale, order)
        return result
    values = rows.float() / (value_scale if value_scale.dim() else value_scale.reshape(1, 1))
    values = _taken(values, order)
    chunks = values.view(-1, TOKENS, rows.shape[1])
    largest = chunks.abs().amax(1, keepdim=True)
    scale = _scale(largest)
    steps, levels = 1.0 / scale, (chunks * scale).round()
    coarse = _too_coarse(chunks, steps.masked_fill(largest <= NOTHING, 0.0))
    wide = coarse.repeat_interleave(COLUMNS, 1)[:, : rows.shape[1]].unsqueeze(1)
    finer = ((chunks - levels * steps) * (scale * 254.0)).round().clamp(-127, 127)
    return Columns(
        levels.to(torch.int8).view(values.shape).t().contiguous(),
        steps.squeeze(1),
        finer.to(torch.int8).view(values.shape).t().contiguous(),
        (steps / 254.0).where(wide, 0.0).squeeze(1),
        coarse.to(torch.int8),
    )


def _too_coarse(chunks: Tensor, steps: Tensor) -> Tensor:
    """Where rounding takes more than `WORST`, by the uniform distribution of what it takes."""
    fill, (count, _, width) = (0, -chunks.shape[2] % COLUMNS), chunks.shape
    groups = -(-width // COLUMNS)
    values = functional.pad(chunks, fill).view(count, TOKENS, groups, COLUMNS)
    each = functional.pad(steps, fill).view(count, 1, groups, COLUMNS)
    unit = each.amax(3, keepdim=True)
    inverse = 1.0 / unit.where(unit > 0, 1.0)  # squares of the numbers themselves would underflow
    lost = TOKENS / 12.0 * (each * inverse).square().sum((1, 3))
    there: Tensor = (values * inverse).square().sum((1, 3))
    return lost > WORST**2 * there


def _scale(largest: Tensor) -> Tensor:
    return torch.where(largest <= NOTHING, 1.0, 127.0 / largest)


def transposed(levels: Tensor, order: Tensor | None = None) -> Tensor:
    """Whole numbers with rows and columns exchanged.

    Args:
        levels: int8, contiguous, shape (rows, width).
        order: which rows to take, of `token_order`; None: all as they stand.

    Returns:
        Contiguous, shape (width, rows).
    """
    if (fused := gradient_kernels(levels.device)) is not None:
        result: Tensor = fused.transposed(levels, order)
        return result
    return (levels if order is None else _taken(levels, order)).t().contiguous()


def sum_of_chunks(gradient: Columns, values: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over chunks of `step * (levels values^T)`, exact within a chunk, then in fp32.

    Args:
        gradient: of `out` columns.
        values: int8, shape (width, chunks * TOKENS).
        dtype: of the answer, shape (out, width).
    """
    if (fused := gradient_kernels(values.device)) is not None:
        result: Tensor = fused.sum_of_chunks(gradient, values, dtype)
        return result
    others = torch.split(values, TOKENS, 1)
    total = torch.zeros(len(gradient.levels), len(values), device=values.device)
    chunks = zip(torch.split(gradient.levels, TOKENS, 1), gradient.steps, others, strict=True)
    for mine, step, other in chunks:
        total += _whole_product(mine.contiguous(), other).mul_(step[:, None])
    finer = torch.split(gradient.finer, TOKENS, 1)
    for chunk in gradient.coarse.any(1).nonzero().flatten().tolist():
        step = gradient.finer_steps[chunk]
        total += _whole_product(finer[chunk].contiguous(), others[chunk]).mul_(step[:, None])
    return total.to(dtype)


def _whole_product(mine: Tensor, others: Tensor) -> Tensor:
    odd = len(mine) <= 16 or len(mine) % 8 or len(others) % 8
    if odd if mine.device.type != "cpu" else not _exact_on_cpu():
        return mine.double().mm(others.t().double()).float()
    return torch._int_mm(mine, others.t()).float()


def _exact_on_cpu() -> bool:
    """With AVX2 alone pairs of products saturate at 16 bits."""
    result = instructions()
    return any(map(result.get, ("avx512_vnni", "avx_vnni", "amx_int8")))


def input_gradient(
    rows: tuple[Tensor, Tensor], levels: Tensor, scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """`g W`, shape (tokens, in).

    Args:
        rows: of `gradient_rows`, shape (tokens, out), divided by the scale where each output has
            one.
        levels: of the weight, int8, shape (out, in).
        scale: levels in 1: 0-d, or shape (out, 1).
        dtype: of the answer.
    """
    whole = scale.new_ones(()) if scale.dim() else scale
    return scaled_product(*rows, transposed(levels), whole, None, dtype)


# Traced code takes it as one operation: the compiler has no such product to make it from.
library.define(
    "forge_plugins::integer_weight_gradient",
    "(Tensor rows, Tensor order, Tensor values, Tensor value_scale, ScalarType dtype) -> Tensor",
)


def _weight_gradient(
    rows: Tensor, order: Tensor, values: Tensor, value_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    columns = gradient_columns(rows, value_scale, order)
    return sum_of_chunks(columns, transposed(values, order), dtype)


def _shape_of_it(
    rows: Tensor, order: Tensor, values: Tensor, value_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    del order, value_scale
    return rows.new_empty((rows.shape[1], values.shape[1]), dtype=dtype)


library.impl("forge_plugins::integer_weight_gradient", "default", _weight_gradient)
library.register_fake("forge_plugins::integer_weight_gradient", _shape_of_it)


def weight_gradient(
    rows: Tensor, magnitudes: Tensor, values: Tensor, value_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """`g^T x`, shape (out, in).

    Args:
        rows: incoming gradient, shape (tokens, out).
        magnitudes: of each row, whatever the measure, shape (tokens, 1).
        values: levels of the layer's input, int8, shape (tokens, in).
        value_scale: levels in 1, shape (tokens, 1), or one number.
        dtype: of the answer.
    """
    traced = torch.ops.forge_plugins.integer_weight_gradient.default
    product: Any = traced if torch.compiler.is_compiling() else _weight_gradient
    order = token_order(magnitudes / value_scale)
    result: Tensor = product(rows, order, values, value_scale, dtype)
    return result
