"""How many samples a batch has, in whichever form it comes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor


def samples_in(value: Any) -> int:
    """The first dimension of the first tensor of a batch; 1 where there is none.

    Args:
        value: a tensor, or tensors in a mapping, list or tuple.
    """
    parts: Iterable[Any] = (value,)
    if isinstance(value, Mapping):
        parts = value.values()
    elif isinstance(value, list | tuple):
        parts = value
    for part in parts:
        if isinstance(part, Tensor) and part.ndim:
            return len(part)
    return 1
