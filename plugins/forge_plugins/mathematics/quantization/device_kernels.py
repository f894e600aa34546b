"""Whether a device has kernels of its own for quantization; the plain forms serve otherwise."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor, library

_FOUND: dict[str, bool] = {}  # kinds of device that were asked about, for traced code


@functools.cache
def _of(kind: str) -> Any:
    result = None if _why_not(kind) else importlib.import_module(_KERNELS)
    _FOUND[kind] = result is not None
    return result


_KERNELS = "forge_plugins.mathematics.quantization.triton_kernels"
_GRADIENTS = "forge_plugins.mathematics.quantization.triton_gradients"


def _why_not(kind: str) -> str:
    if kind != "cuda":
        return f"there are none for {kind}"
    if torch.version.hip is not None or torch.cuda.get_device_capability() < (8, 0):
        return "they are not tried on this kind of GPU"
    try:
        importlib.import_module("triton")
    except ImportError:
        return "the package triton is not installed"
    return ""


def kernels(device: torch.device) -> Any:
    """The module of the kernels, `triton_kernels`, or None where the plain forms are to be used.

    Traced code takes the plain forms: the compiler fuses them with what stands round them.
    """
    return None if torch.compiler.is_compiling() else _of(device.type)


def gradient_kernels(device: torch.device) -> Any:
    """The module of the kernels of gradients, `triton_gradients`, or None as `kernels` says."""
    return None if kernels(device) is None else importlib.import_module(_GRADIENTS)


def has_kernels(kind: str) -> bool:
    """Whether a kind of device has kernels of its own.

    The compiler cannot trace the question: it takes the answer that was given before.

    Args:
        kind: `torch.device.type`.
    """
    if torch.compiler.is_compiling():
        return _FOUND.get(kind, False)
    return _of(kind) is not None


def lacks_kernels(kind: str) -> str:
    """Why quantization takes many passes over memory on a GPU, where kernels take one, or nothing.

    Args:
        kind: `torch.device.type`.
    """
    return "" if kind != "cuda" or has_kernels(kind) else _why_not(kind)


# As operations of the dispatcher, for code that the compiler traces. `library.custom_op` would do
# the same with checks that take 70 us of the host's time a call, which a small layer waits for.
library.define(
    "forge_plugins::integer_linear",
    "(Tensor values, Tensor value_scale, Tensor levels, Tensor scale, Tensor? bias, "
    "ScalarType dtype) -> Tensor",
)


def _traced_integer_linear(
    values: Tensor,
    value_scale: Tensor,
    levels: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    result: Tensor = _of(values.device.type).integer_linear(
        values, value_scale, levels, scale, bias, dtype
    )
    return result


def _shape_of_it(
    values: Tensor,
    value_scale: Tensor,
    levels: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    del value_scale, scale, bias
    return values.new_empty((values.shape[0], levels.shape[0]), dtype=dtype)


library.impl("forge_plugins::integer_linear", "default", _traced_integer_linear)
library.register_fake("forge_plugins::integer_linear", _shape_of_it)


def scaled_product(
    values: Tensor,
    value_scale: Tensor,
    levels: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`(values levels^T) / (value_scale scale) + bias`, the sums exact.

    Args:
        values: int8, shape (rows, width).
        value_scale: fp32, shape (rows, 1), or one number.
        levels: int8, shape (out, width).
        scale: fp32, 0-d, or shape (out, 1).
        bias: shape (out,), or None.
        dtype: of the answer, shape (rows, out).
    """
    if has_kernels(levels.device.type):
        fused = kernels(levels.device)
        traced = torch.ops.forge_plugins.integer_linear.default
        product = traced if fused is None else fused.integer_linear
        whole: Tensor = product(values, value_scale, levels, scale, bias, dtype)
        return whole
    sums = torch._int_mm(values, levels.t())
    result = sums.view(torch.float32).copy_(sums)  # each number in its own place
    rows = value_scale.reshape(-1, 1)
    if scale.dim():
        result.mul_(1.0 / rows).mul_((1.0 / scale).reshape(1, -1))
    else:
        result.mul_(1.0 / (rows * scale))
    if bias is not None:
        result.add_(bias)
    return result.to(dtype)
