"""Whether torch.compile works on this machine."""

from __future__ import annotations

import functools

import torch


def _probe(values: torch.Tensor) -> torch.Tensor:
    return values * 2.0 + 1.0


@functools.lru_cache(maxsize=8)
def compiler_fault(device_type: str) -> str | None:
    """Compile a line of arithmetic and run it; takes seconds, once in a process.

    Args:
        device_type: `cpu`, `cuda` or another that torch knows.

    Returns:
        None when it works; else what is missing, in one line (such as a C++ compiler).
    """
    try:
        result = torch.compile(_probe)(torch.ones(16, device=device_type))
    except Exception as error:  # noqa: BLE001  any failure of a foreign compiler means "no"
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[0] if lines else type(error).__name__
    return None if bool((result == 3.0).all()) else "compiled code gave wrong numbers"
