"""Gradients in whole numbers on a GPU, as Triton kernels: the forms of `integer_gradients`.

The arithmetic is that of the plain forms operation by operation, so that the bits are the same.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from forge_plugins.mathematics.quantization.gradient_columns import COLUMNS, TOKENS, WORST, Columns
from forge_plugins.mathematics.quantization.triton_kernels import (
    is_hopper,
    on_device_of,
    rounded,
    tile_at,
    warps_of,
)

TOP = tl.constexpr(127.0)
NOTHING = tl.constexpr(1e-36)  # `gradient_columns.NOTHING`


@triton.jit
def _magnitudes(values):
    # a reduction here passes over NaN: infinity carries it on
    return tl.where(values == values, tl.abs(values), float("inf"))  # noqa: PLR0124


@triton.jit
def _scale(largest):
    none = largest <= NOTHING
    return tl.where(none, 1.0, tl.div_rn(1.0, tl.where(none, 1.0, largest)) * TOP)


@triton.jit
def _quantize_gradient_rows(
    gradient,
    of_outputs,
    levels,
    scales,
    width,
    OF_OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    g = tl.load(gradient + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    if OF_OUTPUTS:
        g = tl.div_rn(g, tl.load(of_outputs + columns, mask=inside, other=1.0))
    largest = tl.max(_magnitudes(g), 0)
    scale = _scale(largest)
    tl.store(levels + row * width + columns, rounded(g * scale).to(tl.int8), mask=inside)
    tl.store(scales + row, scale)


@triton.jit
def _quantize_gradient_columns(
    gradient,
    value_scale,
    order,
    levels,
    steps,
    finer,
    finer_steps,
    coarse,
    rows,
    width,
    stride,
    scale_step,
    worst,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # some tokens, some columns; what is written stands with the tokens side by side
    chunk, group = tl.program_id(0), tl.program_id(1)
    nth, here = tl.arange(0, TOKENS), tl.arange(0, BLOCK)
    column = group * BLOCK + here
    within = column < width
    token = tl.load(order + chunk * TOKENS + nth)
    inside = (token < rows)[:, None] & within[None, :]
    place = gradient + token[:, None] * width + column[None, :]
    # offsets within a tile fit 32 bits, that of a tile may not
    target = group.to(tl.int64) * BLOCK * stride + chunk * TOKENS
    offset = here[:, None] * stride + nth[None, :]
    mask = tl.broadcast_to(within[:, None], (BLOCK, TOKENS))
    scale = tl.load(value_scale + token * scale_step, mask=token < rows, other=1.0)
    g = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    g = tl.div_rn(g, tl.broadcast_to(scale[:, None], (TOKENS, BLOCK)))
    largest = tl.max(_magnitudes(g), 0)
    factor = _scale(largest)
    step = tl.div_rn(1.0, factor)
    level = rounded(g * factor[None, :])
    tl.store(levels + target + offset, level.to(tl.int8).T, mask=mask)
    tl.store(steps + chunk * width + column, step, mask=within)
    # by the uniform distribution of what rounding takes; in units that do not underflow
    own = tl.where(within & (largest > NOTHING), step, 0.0)
    unit = tl.max(own, 0)
    inverse = tl.div_rn(1.0, tl.where(unit > 0, unit, 1.0))
    lost = TOKENS / 12.0 * tl.sum((own * inverse) * (own * inverse), 0)
    there = tl.sum(tl.sum((g * inverse) * (g * inverse), 0), 0)
    too_coarse = lost > worst * worst * there
    tl.store(coarse + chunk * tl.num_programs(1) + group, too_coarse.to(tl.int8))
    finer_step = tl.where(too_coarse, step / 254.0, 0.0)
    tl.store(finer_steps + chunk * width + column, finer_step, mask=within)
    if too_coarse:  # seldom: read again, so that nothing is held for it
        g = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        g = tl.div_rn(g, tl.broadcast_to(scale[:, None], (TOKENS, BLOCK)))
        rest = g - rounded(g * factor[None, :]) * step[None, :]
        rest = rounded(rest * (factor * 254.0)[None, :])
        rest = tl.minimum(tl.maximum(rest, -TOP), TOP)
        tl.store(finer + target + offset, rest.to(tl.int8).T, mask=mask)


@triton.jit
def _transpose(
    source,
    order,
    target,
    rows,
    width,
    stride,
    ORDER: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
):
    row = tl.program_id(0) * HIGH + tl.arange(0, HIGH)
    column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    taken = tl.load(order + row, mask=row < stride, other=0) if ORDER else row.to(tl.int64)
    inside = ((taken < rows) & (row < stride))[:, None] & (column < width)[None, :]
    place = source + taken[:, None] * width + column[None, :]
    result = tl.load(place, mask=inside, other=0)
    target += column.to(tl.int64)[:, None] * stride + row[None, :]
    tl.store(target, result.T, mask=(column < width)[:, None] & (row < stride)[None, :])


@triton.jit
def _sum_of_chunks(
    gradient,
    finer,
    values,
    outputs,
    steps,
    finer_steps,
    coarse,
    out,
    width,
    chunks,
    groups,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):
    top, left = tile_at(tl.program_id(0), out, width, BLOCK_M, BLOCK_N, GROUP)
    m = top + tl.arange(0, BLOCK_M)
    n = left + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for chunk in range(chunks):
        step = tl.load(steps + chunk * out + m, mask=m < out, other=0.0)
        a = gradient.load([top, chunk * TOKENS])
        b = values.load([left, chunk * TOKENS])
        # at most 256 * 127 * 127 < 2^24: exact in fp32 too
        total += tl.dot(a, b.T, out_dtype=tl.int32).to(tl.float32) * step[:, None]
    # the few chunks of which 8 bits leave too much
    index = tl.arange(0, CHUNKS)
    group = top // COLUMNS + tl.arange(0, BLOCK_M // COLUMNS)
    marks = tl.load(
        coarse + index[:, None] * groups + group[None, :],
        mask=(index < chunks)[:, None] & (group < groups)[None, :],
        other=0,
    )
    marked = tl.max(marks, 1) > 0
    chunk = -1
    for _ in range(tl.sum(marked.to(tl.int32), 0)):
        chunk = tl.min(tl.where(marked & (index > chunk), index, CHUNKS), 0)
        step = tl.load(finer_steps + chunk * out + m, mask=m < out, other=0.0)
        a = finer.load([top, chunk * TOKENS])
        b = values.load([left, chunk * TOKENS])
        total += tl.dot(a, b.T, out_dtype=tl.int32).to(tl.float32) * step[:, None]
    place = outputs + m.to(tl.int64)[:, None] * width + n[None, :]
    inside = (m < out)[:, None] & (n < width)[None, :]
    tl.store(place, total.to(outputs.dtype.element_ty), mask=inside)


# -- what calls them ---------------------------------------------------------------------------


def gradient_rows(rows: Tensor, of_outputs: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `integer_gradients.gradient_rows`."""
    rows = rows.contiguous()
    count, width = rows.shape
    levels = torch.empty(count, width, dtype=torch.int8, device=rows.device)
    scales = torch.empty(count, 1, device=rows.device)
    block = triton.next_power_of_2(width)
    with on_device_of(rows):
        _quantize_gradient_rows[(count,)](
            rows, of_outputs, levels, scales, width,
            OF_OUTPUTS=of_outputs is not None, BLOCK=block, num_warps=min(8, warps_of(block)),
            enable_fp_fusion=False,
        )  # fmt: skip
    return levels, scales


def gradient_columns(rows: Tensor, value_scale: Tensor, order: Tensor) -> Columns:
    """See `integer_gradients.gradient_columns`."""
    rows = rows.contiguous()
    count, width = rows.shape
    chunks, groups = len(order) // TOKENS, triton.cdiv(width, COLUMNS)
    new: Any = functools.partial(torch.empty, device=rows.device)
    levels, finer = (new(width, chunks * TOKENS, dtype=torch.int8) for _ in range(2))
    result = Columns(
        levels, new(chunks, width), finer, new(chunks, width), new(chunks, groups, dtype=torch.int8)
    )
    with on_device_of(rows):
        _quantize_gradient_columns[(chunks, groups)](
            rows, value_scale, order, *result, count, width, chunks * TOKENS,
            int(value_scale.numel() > 1), WORST,
            TOKENS=TOKENS, BLOCK=COLUMNS, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    return result


def transposed(levels: Tensor, order: Tensor | None) -> Tensor:
    """See `integer_gradients.transposed`."""
    rows, width = levels.shape
    stride, high, wide = rows if order is None else len(order), 64, 128
    target = torch.empty(width, stride, dtype=torch.int8, device=levels.device)
    with on_device_of(levels):
        _transpose[(triton.cdiv(stride, high), triton.cdiv(width, wide))](
            levels, order, target, rows, width, stride,
            ORDER=order is not None, HIGH=high, WIDE=wide, num_warps=4,
        )  # fmt: skip
    return target


def sum_of_chunks(gradient: Columns, values: Tensor, dtype: torch.dtype) -> Tensor:
    """See `integer_gradients.sum_of_chunks`."""
    (out, _), width = gradient.levels.shape, len(values)
    chunks, groups = gradient.coarse.shape
    outputs = torch.empty(out, width, dtype=dtype, device=values.device)
    tile = chunk_tile(is_hopper(values.device))
    high, wide = tile["BLOCK_M"], tile["BLOCK_N"]
    with on_device_of(values):
        _sum_of_chunks[(triton.cdiv(out, high) * triton.cdiv(width, wide),)](
            TensorDescriptor.from_tensor(gradient.levels, [high, TOKENS]),
            TensorDescriptor.from_tensor(gradient.finer, [high, TOKENS]),
            TensorDescriptor.from_tensor(values, [wide, TOKENS]),
            outputs, gradient.steps, gradient.finer_steps, gradient.coarse, out, width, chunks,
            groups, TOKENS=TOKENS, COLUMNS=COLUMNS, CHUNKS=triton.next_power_of_2(chunks),
            enable_fp_fusion=False, **tile,
        )  # fmt: skip
    return outputs


def chunk_tile(hopper: bool) -> dict[str, int]:
    """What a program of `sum_of_chunks` makes, and how; smaller where a chip has less room."""
    if hopper:  # the fastest of thirteen on an H200, 1.5 times a product in bf16
        return {"BLOCK_M": 128, "BLOCK_N": 128, "GROUP": 8, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_M": 64, "BLOCK_N": 128, "GROUP": 8, "num_warps": 4, "num_stages": 2}
