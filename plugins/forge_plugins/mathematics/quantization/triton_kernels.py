"""Quantization and the int8 product on a GPU in one pass over memory each, as Triton kernels.

Every kernel does the arithmetic of the plain form (`bitnet`, `quantized_product`) operation by
operation, so that the bits are the same: reciprocals and divisions rounded to nearest, no fused
multiply-add, half to even. What they save is traffic and launches: a plain quantizer reads and
writes the tensor about eight times.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

WIDEST = 1 << 15
"""Longest row that one program holds in registers."""

HALF_TO_EVEN = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no bits after the point
EPSILON = tl.constexpr(1e-5)  # `bitnet.EPSILON`


@triton.jit
def rounded(values):
    """To a whole number, half to even."""
    return (values + HALF_TO_EVEN) - HALF_TO_EVEN


@triton.jit
def _quotient(levels, scale, inverse):
    # correctly rounded as `inverse` is (Markstein 1990), in a fraction of a division's instructions
    first = levels * inverse
    return tl.fma(tl.fma(-first, scale, levels), inverse, first)


@triton.jit
def _quantize_rows(
    inputs,
    levels,
    scales,
    values,
    width,
    stride,
    top,
    LEVELS: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    result = tl.load(inputs + row * stride + columns, mask=inside, other=0.0)
    x = result.to(tl.float32)
    largest = tl.max(tl.abs(x), 0)
    # a reduction here passes over NaN: it must reach the scale, or nobody would see it
    lost = tl.max((x != x).to(tl.int32), 0)  # noqa: PLR0124  so NaN is told
    scale = tl.div_rn(1.0, tl.maximum(largest, EPSILON)) * top
    scale = tl.where(lost > 0, float("nan"), scale)
    level = rounded(x * scale)
    if LEVELS:
        tl.store(levels + row * width + columns, level.to(tl.int8), mask=inside)
        tl.store(scales + row, scale)
    if VALUES:
        value = _quotient(level, scale, tl.div_rn(1.0, scale)).to(result.dtype)
        tl.store(values + row * width + columns, value.to(values.dtype.element_ty), mask=inside)


@triton.jit
def _quantize_weight(
    weight,
    total,
    scale,
    levels,
    applied,
    count,
    share,
    top,
    TOTAL: tl.constexpr,
    LEVELS: tl.constexpr,
    APPLIED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    places = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    if TOTAL:
        mean = tl.load(total) * share
        mean = tl.maximum(mean, EPSILON, propagate_nan=tl.PropagateNan.ALL)
        factor = tl.div_rn(1.0, mean) * top
        if program == 0:
            tl.store(scale, factor)
    else:
        factor = tl.load(scale)
    latent = tl.load(weight + places, mask=inside, other=0.0)
    level = rounded(latent.to(tl.float32) * factor)
    level = tl.minimum(tl.maximum(level, -top), top)
    if LEVELS:
        tl.store(levels + places, level.to(tl.int8), mask=inside)
    if APPLIED:
        value = _quotient(level, factor, tl.div_rn(1.0, factor)).to(latent.dtype)
        tl.store(applied + places, value.to(applied.dtype.element_ty), mask=inside)


@triton.jit
def _dequantize_rows(
    levels,
    scales,
    values,
    width,
    scale_step,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    scale = tl.load(scales + row * scale_step)
    level = tl.load(levels + row * width + columns, mask=inside, other=0).to(tl.float32)
    value = _quotient(level, scale, tl.div_rn(1.0, scale))
    tl.store(values + row * width + columns, value.to(values.dtype.element_ty), mask=inside)


@triton.jit
def tile_at(program, rows, out, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Where a program's tile begins: those of a few rows go together and share the cache."""
    across, down = tl.cdiv(out, BLOCK_N), tl.cdiv(rows, BLOCK_M)
    first = program // (GROUP * across) * GROUP
    size = tl.minimum(down - first, GROUP)
    below = first + program % (GROUP * across) % size
    beside = program % (GROUP * across) // size
    return below * BLOCK_M, beside * BLOCK_N


@triton.jit
def _scaled(
    sums,
    m,
    n,
    input_scale,
    weight_scale,
    bias,
    rows,
    out,
    scale_step,
    OF_OUTPUTS: tl.constexpr,
    BIAS: tl.constexpr,
):
    of_input = tl.load(input_scale + m * scale_step, mask=m < rows, other=1.0)
    result = sums.to(tl.float32)
    if OF_OUTPUTS:
        of_weight = tl.load(weight_scale + n, mask=n < out, other=1.0)
        result = result * tl.div_rn(1.0, of_input)[:, None] * tl.div_rn(1.0, of_weight)[None, :]
    else:
        result = result * tl.div_rn(1.0, of_input * tl.load(weight_scale))[:, None]
    if BIAS:
        result += tl.load(bias + n, mask=n < out, other=0.0).to(tl.float32)[None, :]
    return result


@triton.jit
def _integer_linear(
    inputs,
    weight,
    outputs,
    input_scale,
    weight_scale,
    bias,
    rows,
    width,
    out,
    scale_step,
    OF_OUTPUTS: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    top, left = tile_at(tl.program_id(0), rows, out, BLOCK_M, BLOCK_N, GROUP)
    m = top + tl.arange(0, BLOCK_M)
    n = left + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x = inputs + (m % rows).to(tl.int64)[:, None] * width + k[None, :]
    w = weight + (n % out).to(tl.int64)[None, :] * width + k[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for step in range(tl.cdiv(width, BLOCK_K)):
        if EVEN:
            a, b = tl.load(x), tl.load(w)
        else:
            near = k < width - step * BLOCK_K
            a = tl.load(x, mask=near[None, :], other=0)
            b = tl.load(w, mask=near[:, None], other=0)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
        x += BLOCK_K
        w += BLOCK_K
    result = _scaled(
        sums, m, n, input_scale, weight_scale, bias, rows, out, scale_step, OF_OUTPUTS, BIAS
    )
    place = outputs + m.to(tl.int64)[:, None] * out + n[None, :]
    inside = (m < rows)[:, None] & (n < out)[None, :]
    tl.store(place, result.to(outputs.dtype.element_ty), mask=inside)


@triton.jit
def _integer_linear_by_tiles(
    inputs,
    weight,
    outputs,
    input_scale,
    weight_scale,
    bias,
    rows,
    width,
    out,
    scale_step,
    OF_OUTPUTS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PARTS: tl.constexpr,
):
    # the same; tiles are fetched by the copy engine, with zeros beyond the edges, and a program
    # goes on to the next while the last is on its way out
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(out, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
        top, left = tile_at(tile, rows, out, BLOCK_M, BLOCK_N, GROUP)
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        for step in range(tl.cdiv(width, BLOCK_K)):
            a = inputs.load([top, step * BLOCK_K])
            b = weight.load([left, step * BLOCK_K])
            sums = tl.dot(a, b.T, sums, out_dtype=tl.int32)
        m = top + tl.arange(0, BLOCK_M)
        if PARTS == 2:  # numbers of 32 bits: a whole tile of them has no room beside the next
            HALF: tl.constexpr = BLOCK_N // 2
            halves = tl.permute(tl.reshape(sums, (BLOCK_M, 2, HALF)), (0, 2, 1))
            first, second = tl.split(halves)
            n = left + tl.arange(0, HALF)
            result = _scaled(
                first, m, n, input_scale, weight_scale, bias, rows, out, scale_step,
                OF_OUTPUTS, BIAS,
            )  # fmt: skip
            outputs.store([top, left], result.to(outputs.dtype))
            result = _scaled(
                second, m, n + HALF, input_scale, weight_scale, bias, rows, out, scale_step,
                OF_OUTPUTS, BIAS,
            )  # fmt: skip
            outputs.store([top, left + HALF], result.to(outputs.dtype))
        else:
            n = left + tl.arange(0, BLOCK_N)
            result = _scaled(
                sums, m, n, input_scale, weight_scale, bias, rows, out, scale_step,
                OF_OUTPUTS, BIAS,
            )  # fmt: skip
            outputs.store([top, left], result.to(outputs.dtype))


# -- what calls them ---------------------------------------------------------------------------


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """A kernel runs on the current device, wherever its tensors are."""
    return torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]


def warps_of(block: int) -> int:
    """Of a program that holds a row of so many numbers."""
    return min(16, max(1, block // 256))


def quantized_rows(
    inputs: Tensor, top: int, *, as_int8: bool, dtype: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Rows on their grid, as `bitnet.activation_levels` and `bitnet.activation_values` give them.

    Args:
        inputs: shape (..., width), of at most `WIDEST` numbers a row.
        top: highest level.
        as_int8: whether the whole numbers and their scale are wanted.
        dtype: of the values; None: they are not wanted.

    Returns:
        Levels, int8, shape (rows, width); their scale, fp32, (rows, 1); the values that they stand
        for, of the shape of the inputs, rounded to the inputs' dtype and then to `dtype`.
    """
    rows = inputs.reshape(-1, inputs.shape[-1])
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    count, width = rows.shape
    block, device = triton.next_power_of_2(width), rows.device
    levels = torch.empty(count, width, dtype=torch.int8, device=device) if as_int8 else None
    scales = torch.empty(count, 1, device=device) if as_int8 else None
    values = None if dtype is None else torch.empty(inputs.shape, dtype=dtype, device=device)
    with on_device_of(rows):
        _quantize_rows[(count,)](
            rows, levels, scales, values, width, rows.stride(0), float(top),
            LEVELS=as_int8, VALUES=values is not None, BLOCK=block, num_warps=warps_of(block),
            enable_fp_fusion=False,
        )  # fmt: skip
    return levels, scales, values


def weight_on_grid(
    weight: Tensor, scale: Tensor | None, top: int, *, as_int8: bool, dtype: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """A weight rounded to the levels of one scale.

    Args:
        weight: contiguous.
        scale: levels in 1, 0-d, fp32; None: `top` over the mean magnitude.
        top: highest level.
        as_int8: whether the levels are wanted.
        dtype: of the values; None: they are not wanted.

    Returns:
        `level / scale` in the weight's dtype and then in `dtype`; the levels as int8; the scale.
    """
    device, count, block = weight.device, weight.numel(), 2048
    levels = torch.empty(weight.shape, dtype=torch.int8, device=device) if as_int8 else None
    applied = None if dtype is None else torch.empty(weight.shape, dtype=dtype, device=device)
    total = None
    if scale is None:
        # one pass; the sum's order is that of `abs().mean()`, and so are its bits
        total = torch.linalg.vector_norm(weight.float(), 1)
        scale = torch.empty((), device=device)
    with on_device_of(weight):
        _quantize_weight[(triton.cdiv(count, block),)](
            weight, total, scale, levels, applied, count, 1.0 / count, float(top),
            TOTAL=total is not None, LEVELS=as_int8, APPLIED=applied is not None, BLOCK=block,
            num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    return applied, levels, scale


def dequantized_rows(levels: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`level / scale` in fp32, rounded to `dtype`.

    Args:
        levels: int8, contiguous, shape (rows, width).
        scale: fp32, a number, or one for each row.
        dtype: of the answer.
    """
    values = torch.empty(levels.shape, dtype=dtype, device=levels.device)
    rows, width = levels.shape
    block = min(2048, triton.next_power_of_2(width))
    with on_device_of(levels):
        _dequantize_rows[(rows, triton.cdiv(width, block))](
            levels, scale, values, width, int(scale.numel() > 1),
            BLOCK=block, num_warps=warps_of(block), enable_fp_fusion=False,
        )  # fmt: skip
    return values


def integer_linear(
    values: Tensor,
    value_scale: Tensor,
    levels: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`x W^T + bias` from whole numbers: exact int32 sums, scaled before they leave the chip.

    Args:
        values: int8, contiguous, shape (rows, width).
        value_scale: fp32, a number, or one for each row.
        levels: int8, contiguous, shape (out, width).
        scale: fp32, 0-d, or shape (out, 1).
        bias: shape (out,), or None.
        dtype: of the answer, shape (rows, out).
    """
    rows, width = values.shape
    out = levels.shape[0]
    outputs = torch.empty(rows, out, dtype=dtype, device=values.device)
    tensors: tuple[Any, ...] = (values, levels, outputs)
    kernel, tile = _integer_linear, FEW_ROWS if rows <= FEW_ROWS["BLOCK_M"] else TILE
    edge: dict[str, int] = {"EVEN": width % tile["BLOCK_K"] == 0}
    if tile is TILE and _fetches_tiles(*tensors):
        kernel, tile = _integer_linear_by_tiles, WIDE_TILE
        parts = outputs.element_size() // 2
        tensors = _descriptors(tensors, tile, parts)
    count = triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(out, tile["BLOCK_N"])
    if kernel is _integer_linear_by_tiles:
        count = min(count, _multiprocessors(values.device))
        edge = {"PROGRAMS": count, "PARTS": parts}
    with on_device_of(values):
        kernel[(count,)](
            *tensors, value_scale, scale, bias, rows, width, out, int(value_scale.numel() > 1),
            OF_OUTPUTS=scale.dim() > 0, BIAS=bias is not None, enable_fp_fusion=False,
            **edge, **tile,
        )  # fmt: skip
    return outputs


def _tiles(m: int, n: int, *, warps: int, stages: int) -> dict[str, int]:
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": 128, "GROUP": 8}
    return {**blocks, "num_warps": warps, "num_stages": stages}


# the fastest of six on an H200; by the copy engine, without a gap between tiles, another 10 to 20 %
FEW_ROWS = _tiles(64, 64, warps=4, stages=4)
TILE = _tiles(128, 256, warps=8, stages=3)
WIDE_TILE = _tiles(128, 256, warps=8, stages=3)


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether a device is of the generation that the larger tiles are made for."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _fetches_tiles(*tensors: Tensor) -> bool:
    """Whether the copy engine can: Hopper's, and rows that begin at multiples of 16 bytes."""
    return is_hopper(tensors[0].device) and all(
        tensor.data_ptr() % 16 == 0 and tensor.shape[1] * tensor.element_size() % 16 == 0
        for tensor in tensors
    )


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 3  # the interpreter's: more tiles than programs
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _descriptors(tensors: tuple[Tensor, ...], tile: dict[str, int], parts: int) -> tuple[Any, ...]:
    m, n, k = tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"]
    shapes = zip(tensors, ([m, k], [n, k], [m, n // parts]), strict=True)
    return tuple(TensorDescriptor.from_tensor(tensor, shape) for tensor, shape in shapes)
