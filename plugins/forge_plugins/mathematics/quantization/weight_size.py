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
    found = distinct(weights)
    return torch.stack([one.square().sum() for one in found]).sum() / _entries(found)


def mean_magnitude(weights: Sequence[Tensor]) -> Tensor:
    """Mean over all entries of `|w| / rms(w)`, 0-d; tied weights count once.

    The root mean square is each tensor's own, without gradient: what counts is how a tensor's size
    is spread over its entries, not how large it is. 1 where all are equally large, towards 0 for
    sparse ones.
    """
    found = distinct(weights)
    parts = [one.abs().sum() / one.detach().square().mean().sqrt().clamp_min(1e-12)
             for one in found]  # fmt: skip
    return torch.stack(parts).sum() / _entries(found)


def _entries(weights: Sequence[Tensor]) -> int:
    return sum(weight.numel() for weight in weights)
