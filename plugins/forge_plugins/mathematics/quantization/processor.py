"""The processor's instruction sets."""

from __future__ import annotations

import os
from typing import Any, Final

import torch

LIMITS: Final = ("FORGE_CPU_CAPABILITY", "ATEN_CPU_CAPABILITY")
"""Environment variables that make a processor pass for one with `avx2` alone, or for any."""
_BEYOND_AVX2: Final = ("avx512", "avx10", "avx_vnni", "avx_ne", "amx", "bf16", "sve")


def instructions() -> dict[str, Any]:
    """What torch found, by its names; without what the environment takes away."""
    result: dict[str, Any] = dict(torch.cpu.get_capabilities())
    if all(os.environ.get(name) not in ("avx2", "default") for name in LIMITS):
        return result
    return {name: value for name, value in result.items() if not name.startswith(_BEYOND_AVX2)}
