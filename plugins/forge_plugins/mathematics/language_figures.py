"""How well the next token is foretold."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

_NEVER = -(2**40)
"""No target is this one: torch's own default, -100, would be passed over in silence."""


def no_sums(device: torch.device | str) -> Tensor:
    """The sums of a set without a target."""
    return torch.zeros(2, dtype=_exact(torch.device(device)), device=device)


def _exact(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def cross_entropy_sums(logits: Tensor, targets: Tensor, ignored: int | None = None) -> Tensor:
    """The plain cross-entropy of a batch, summed, and the number of its targets.

    Args:
        logits: shape (n, classes).
        targets: shape (n,), integers.
        ignored: a target that counts as nothing.

    Returns:
        Shape (2,), float64 (float32 where the device has no other): nats, targets.
    """
    exact = _exact(logits.device)
    passed_over = _NEVER if ignored is None else ignored
    each = functional.cross_entropy(
        logits.float(), targets, reduction="none", ignore_index=passed_over
    )
    count = targets.numel() if ignored is None else (targets != ignored).sum()
    total = each.to(exact).sum()
    return torch.stack([total, torch.as_tensor(count, device=total.device).to(exact)])


def perplexity(nats: float) -> float:
    """`exp` of a mean cross-entropy; infinite where that is no number any more."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def bits(nats: float) -> float:
    """Nats in bits."""
    return nats / math.log(2.0)
