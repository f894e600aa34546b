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
    found = None if _why_not(kind) else importlib.import_module(_KERNELS)
    _FOUND[kind] = found is not None
    return found


_KERNELS = "forge_plugins.mathematics.triton_kernels"


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


@library.custom_op("forge_plugins::integer_linear", mutates_args=())
def traced_integer_linear(
    values: Tensor,
    value_scale: Tensor,
    levels: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`triton_kernels.integer_linear` as one operation, for code that the compiler traces."""
    found: Tensor = _of(values.device.type).integer_linear(
        values, value_scale, levels, scale, bias, dtype
    )
    return found


@traced_integer_linear.register_fake
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
