"""Which arithmetic is fast on a device, and what another one costs there."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, Final, Literal

from forge_kernel.contract.lazy_module import LazyModule

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

Precision = Literal["fp32", "bf16", "fp16"]

LIMITS: Final = ("FORGE_CPU_CAPABILITY", "ATEN_CPU_CAPABILITY")
"""Environment variables that make a processor pass for one with `avx2` alone, or for any."""
_BEYOND_AVX2: Final = ("avx512", "avx10", "avx_vnni", "avx_ne", "amx", "bf16", "sve")
_BF16: Final = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
_SHOWN: Final = (
    "avx2", "avx512_f", "avx512_vnni", "avx_vnni", "amx_int8", "avx512_bf16", "amx_bf16",
    "avx512_fp16", "amx_fp16", "asimd", "dot_prod", "i8mm", "bf16", "sve", "sve_bf16",
)  # fmt: skip
_SIZE: Final = 192
"""Rows and columns of the matrices that are multiplied to compare two precisions."""


_NOISE: Final = 1.2
"""Ratios up to here are no more than two measurements of the same time may show."""


def instructions() -> dict[str, Any]:
    """The processor's instruction sets, by torch's names; without what `LIMITS` takes away."""
    result: dict[str, Any] = dict(torch.cpu.get_capabilities())
    if all(os.environ.get(name) not in ("avx2", "default") for name in LIMITS):
        return result
    return {name: value for name, value in result.items() if not name.startswith(_BEYOND_AVX2)}


def fast_precision(device: torch.device) -> Precision:
    """The shortest arithmetic that the device multiplies in faster than in fp32.

    Returns:
        On a CPU `bf16` where it has instructions for it; on CUDA `bf16` from compute capability
        8.0, below that `fp16`; elsewhere `fp32`.
    """
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return "bf16" if major >= 8 else "fp16"
    if device.type == "cpu":
        result = instructions()
        return "bf16" if any(result.get(name) for name in _BF16) else "fp32"
    return "fp32"


def resolve_precision(name: Literal["auto"] | Precision, device: torch.device) -> Precision:
    """The arithmetic of `run.precision` on the device; `auto` is what is fast there."""
    return fast_precision(device) if name == "auto" else name


def cost_on_cpu(precision: Precision) -> float:
    """How many times as long as in fp32 a product of matrices takes on this CPU.

    Measured in a few milliseconds, on matrices of its own.
    """
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    plain = torch.ones(_SIZE, _SIZE)
    return _seconds(plain.to(dtype)) / _seconds(plain)


def _seconds(matrix: torch.Tensor) -> float:
    """The least of several times, the first call left out."""
    result = []
    _ = matrix @ matrix
    for _ in range(3):
        begin = time.perf_counter()
        _ = matrix @ matrix
        result.append(time.perf_counter() - begin)
    return max(min(result), 1e-9)


def slow_precision_notice(precision: Precision, device: torch.device) -> str | None:
    """What to say of a precision that costs more than fp32 on the device; None: it does not.

    Only a CPU is asked: GPUs that torch supports multiply halves faster.
    """
    if precision == "fp32" or device.type != "cpu":
        return None
    ratio = cost_on_cpu(precision)
    if ratio <= _NOISE:
        return None
    return (
        f"run.precision is {precision}, and a product of matrices in {precision} takes "
        f"{ratio:.1f} times as long as in fp32 on this processor (measured now): fp32 is faster "
        "here, and precision: auto takes what is fast."
    )


def fast_arithmetic() -> dict[str, Any]:
    """What `forge doctor` says of this machine's arithmetic."""
    result = instructions()
    cuda = {
        f"cuda:{index}": fast_precision(torch.device("cuda", index))
        for index in range(torch.cuda.device_count())
    }
    return {
        "instruction sets": ", ".join(name for name in _SHOWN if result.get(name)) or "none known",
        "limited by": next(
            (f"{name}={os.environ[name]}" for name in LIMITS if os.environ.get(name)), None
        ),
        "precision auto": ", ".join(
            f"{name} {value}"
            for name, value in {"cpu": fast_precision(torch.device("cpu")), **cuda}.items()
        ),
        "int8 products": any(result.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8")),
    }
