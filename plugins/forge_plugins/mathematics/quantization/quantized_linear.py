"""The product of a quantized input and a quantized weight, as operations of autograd.

Both save the quantized operands for backward, the weight as int8 where nothing keeps it anyway, and
give the gradients of the straight-through estimator with respect to what was quantized:
`dx = g W`, `dW = g^T x`, with `x` and `W` the values that were multiplied.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from forge_plugins.mathematics.quantization.device_kernels import (
    has_kernels,
    kernels,
    scaled_product,
)
from forge_plugins.mathematics.quantization.integer_gradients import (
    gradient_rows,
    input_gradient,
    weight_gradient,
)
from forge_plugins.mathematics.quantization.processor import instructions
from forge_plugins.mathematics.quantization.quantizers import dequantize

Backward = Literal["own", "bf16", "int8"]


class _FakeQuantLinear(torch.autograd.Function):
    """Dequantized values multiplied, as a plain linear layer would; see `fake_quant_linear`.

    With G = dL/dy, shape (rows, out): dx = G W^ (rows, in), dW = G^T x^ (out, in), db = sum of G
    (out,), where x^ and W^ are what forward multiplied; rounding has the gradient of the identity.
    """

    @staticmethod
    def forward(
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor,
        applied: Tensor,
        levels: Tensor | None,
        scale: Tensor,
    ) -> Tensor:
        del inputs, weight, levels, scale
        return functional.linear(values, applied, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        del output
        source, weight, bias, values, applied, levels, scale = inputs
        ctx.types = (source.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.product, ctx.shape = applied.dtype, weight.shape
        kept = applied if levels is None else levels
        ctx.save_for_backward(
            values if ctx.needs_input_grad[1] else None,
            kept if ctx.needs_input_grad[0] else None,
            scale if levels is not None else None,
        )

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        values, kept, scale = ctx.saved_tensors
        of_input, of_weight, of_bias = ctx.types
        rows = gradient.reshape(-1, ctx.shape[0])
        to_input = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            applied = kept
            if scale is not None:
                applied = dequantize(kept, scale).view(ctx.shape).to(of_weight).to(ctx.product)
            to_input = rows.mm(applied).view(*gradient.shape[:-1], ctx.shape[1]).to(of_input)
        if ctx.needs_input_grad[1]:
            to_weight = rows.t().mm(values.reshape(-1, ctx.shape[1])).to(of_weight)
        if ctx.needs_input_grad[2]:
            to_bias = rows.sum(0).to(of_bias)
        return to_input, to_weight, to_bias, None, None, None, None


def fake_quant_linear(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    applied: Tensor,
    levels: Tensor | None,
    scale: Tensor,
) -> Tensor:
    """`values applied^T + bias`, differentiable towards `inputs`, `weight` and `bias`.

    Args:
        inputs: what the values were taken from, shape (..., in).
        weight: what takes the weight's gradient, shape (out, in).
        bias: shape (out,), or None.
        values: the quantized input in the dtype of the product.
        applied: the quantized weight in the dtype of the product, shape (out, in).
        levels: the same as int8, to be saved in its place; None saves `applied`.
        scale: of the levels.
    """
    result: Tensor = _FakeQuantLinear.apply(inputs, weight, bias, values, applied, levels, scale)  # type: ignore[no-untyped-call]
    return result


class _Int8Linear(torch.autograd.Function):
    """Whole numbers multiplied into int32 sums, which are exact, then scaled.

    values (rows, in) and levels (out, in) are int8, value_scale is (rows, 1) or 0-d, scale 0-d or
    (out, 1): y[i, j] = (values levels^T)[i, j] / (value_scale[i] scale[j]) + bias[j].
    """

    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917  autograd takes no keywords
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor,
        value_scale: Tensor,
        kept: Tensor | None,
        levels: Tensor,
        scale: Tensor,
        how: tuple[torch.dtype, Backward],
    ) -> Tensor:
        del weight, kept
        product = scaled_product(values, value_scale, levels, scale, bias, how[0])
        return product.view(*inputs.shape[:-1], levels.shape[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        del output
        source, weight, bias, values, value_scale, kept, levels, scale, how = inputs
        ctx.types = (source.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.way, ctx.kept = how[1], kept is not None
        first, second = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        ctx.save_for_backward(
            (values if kept is None else kept) if second else None,
            value_scale if second else None,
            levels if first else None,
            scale if first else None,
        )
        ctx.shape = levels.shape

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        rows = gradient.reshape(-1, ctx.shape[0])
        product = _by_integers if ctx.way == "int8" else _by_floats
        to_input, to_weight = product(ctx, rows)
        if to_input is not None:
            to_input = to_input.view(*gradient.shape[:-1], ctx.shape[1])
        to_bias = rows.sum(0).to(ctx.types[2]) if ctx.needs_input_grad[2] else None
        return to_input, to_weight, to_bias, None, None, None, None, None, None


def _by_floats(ctx: Any, rows: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of input and weight, multiplied in bf16 or the gradient's own dtype."""
    values, value_scale, levels, scale = ctx.saved_tensors
    of_input, of_weight, _ = ctx.types
    to_input = to_weight = None
    low = ctx.way == "bf16"
    product = torch.bfloat16 if low else rows.dtype
    fused = kernels(rows.device)
    if ctx.needs_input_grad[0]:
        if fused is not None:
            applied = fused.dequantized_rows(levels, scale, product)
            to_input = rows.to(product).mm(applied).to(of_input)
        elif not low:
            to_input = rows.mm(dequantize(levels, scale).to(product)).to(of_input)
        # whole numbers of 8 bits are exact in bf16: only the incoming gradient is rounded
        elif scale.dim():
            to_input = (rows / scale.view(1, -1)).to(product).mm(levels.to(product)).to(of_input)
        else:
            to_input = rows.to(product).mm(levels.to(product)).to(of_input).div_(scale)
    if ctx.needs_input_grad[1]:
        factors = value_scale.reshape(-1, 1)
        if ctx.kept:
            to_weight = rows.to(product).t().mm(values.to(product)).to(of_weight)
        elif fused is not None:
            values = fused.dequantized_rows(values, value_scale, product)
            to_weight = rows.to(product).t().mm(values).to(of_weight)
        elif low:
            scaled = torch.div(rows, factors).to(product)
            to_weight = scaled.t().mm(values.to(product)).to(of_weight)
        else:
            to_weight = rows.t().mm(dequantize(values, factors).to(product)).to(of_weight)
    return to_input, to_weight


def _by_integers(ctx: Any, rows: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of input and weight, from products of whole numbers."""
    values, value_scale, levels, scale = ctx.saved_tensors
    of_input, of_weight, _ = ctx.types
    to_input = to_weight = sizes = None
    if ctx.needs_input_grad[0]:
        mine = gradient_rows(rows, scale.reshape(-1) if scale.dim() else None)
        # the compiler writes a wider dtype with what comes next; a kernel, at once
        dtype = rows.dtype if torch.compiler.is_compiling() else of_input
        to_input = input_gradient(mine, levels, scale, dtype).to(of_input)
        sizes = 1.0 / mine[1]
    if ctx.needs_input_grad[1]:
        if sizes is None:
            sizes = rows.float().abs().amax(1, keepdim=True)
        to_weight = weight_gradient(rows, sizes, values, value_scale, of_weight)
    return to_input, to_weight


def int8_linear(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: tuple[Tensor, Tensor, Tensor | None],
    levels: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    *,
    backward: Backward,
) -> Tensor:
    """`x W^T + bias` from whole numbers, differentiable towards `inputs`, `weight` and `bias`.

    Args:
        inputs: what the values were taken from, shape (..., in).
        weight: what takes the weight's gradient, shape (out, in).
        bias: shape (out,), or None.
        values: int8, shape (rows, in), their scale, (rows, 1) or one number, and what they stand
            for, to be kept for backward in their place, or None.
        levels: int8, shape (out, in), and their scale, 0-d or (out, 1).
        dtype: of the answer.
        backward: what the products on the way back are made in: the gradient's own dtype; bf16
            (the gradient is then off by about 3e-3 of its norm for each layer passed); or int8
            (about 1e-2, see `integer_gradients`).
    """
    result: Tensor = _Int8Linear.apply(  # type: ignore[no-untyped-call]
        inputs, weight, bias, *values, *levels, (dtype, backward)
    )
    return result


_ASKED: dict[str, bool] = {}  # kinds of device that were asked about, for traced code


def multiplies_integers(device: str) -> bool:
    """Whether whole numbers are multiplied faster on a kind of device.

    The compiler cannot trace the question: it takes the answer that was given before, to whoever
    asked `lacks_int8` (a layer does so when it is made), and no for an answer otherwise.
    """
    if torch.compiler.is_compiling():
        return _ASKED.get(device, False)
    return not lacks_int8(device)


@functools.cache
def lacks_int8(device: str) -> str:
    """Why whole numbers are not multiplied faster on a kind of device; empty when they are.

    Args:
        device: `torch.device.type`.
    """
    answer = _lacking(device)
    _ASKED[device] = not answer
    return answer


def _lacking(device: str) -> str:
    if device == "cuda":
        if torch.version.hip is not None:
            return "the int8 product is not tried on this kind of GPU"
        major, minor = torch.cuda.get_device_capability()
        return "" if (major, minor) >= (7, 5) else "the GPU has no int8 tensor cores"
    if device != "cpu":
        return f"torch has no int8 product for {device}"
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "this build of torch has no oneDNN"
    result = instructions()
    names = ("avx512_vnni", "avx_vnni", "amx_int8")
    if not any(result.get(name) for name in names):
        return f"the processor has none of {', '.join(names)}"
    return ""


@functools.cache
def lacks_bf16(device: str) -> str:
    """Why bf16 is not multiplied faster on a kind of device; empty when it is."""
    if device != "cpu":
        return ""
    result = instructions()
    names = ("avx512_bf16", "amx_bf16")
    return "" if any(map(result.get, names)) else f"the processor has none of {', '.join(names)}"


def fits_integer_product(rows: int, levels: Tensor) -> bool:
    """Whether the shapes suit the int8 product of the device."""
    out, width = levels.shape
    if rows == 0 or levels.device.type == "cpu" or has_kernels(levels.device.type):
        return rows > 0
    return rows > 16 and out % 8 == 0 and width % 8 == 0
