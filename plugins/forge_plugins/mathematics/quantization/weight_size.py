"""How large weights are, in the mean."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def distinct(weights: Iterable[Tensor]) -> list[Tensor]:
    """Tied weights once."""
    return list({id(weight): weight for weight in weights}.values())


def mean_square(weights: Sequence[Tensor]) -> Tensor:
    """Mean over all entries of their squares, 0-d; tied weights count once."""
    result = distinct(weights)
    return torch.stack([item.square().sum() for item in result]).sum() / _entries(result)


def mean_magnitude(weights: Sequence[Tensor]) -> Tensor:
    """Mean over all entries of `|w| / rms(w)`, 0-d; tied weights count once.

    The root mean square is each tensor's own, without gradient: what counts is how a tensor's size
    is spread over its entries, not how large it is. 1 where all are equally large, towards 0 for
    sparse ones.
    """
    result = distinct(weights)
    parts = [item.abs().sum() / item.detach().square().mean().sqrt().clamp_min(1e-12)
             for item in result]  # fmt: skip
    return torch.stack(parts).sum() / _entries(result)


def _entries(weights: Sequence[Tensor]) -> int:
    return sum(weight.numel() for weight in weights)
