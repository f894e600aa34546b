"""How well the next token is foretold."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def no_sums(device: torch.device | str) -> Tensor:
    """The sums of a set without a target."""
    return torch.zeros(2, dtype=_exact(torch.device(device)), device=device)


def _exact(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def cross_entropy_sums(
    logits: Tensor, targets: Tensor, weights: Tensor | None = None, *, ignored: int
) -> Tensor:
    """The plain cross-entropy of a batch, summed, and what its targets count.

    Args:
        logits: shape (n, classes).
        targets: shape (n,), integers.
        weights: what each target counts, shape (n,); None: each 1.
        ignored: the target that counts for nothing: it needs not be a class.

    Returns:
        Shape (2,), float64 (float32 where the device has no other): nats, targets.
    """
    exact = _exact(logits.device)
    each = functional.cross_entropy(logits.float(), targets, reduction="none", ignore_index=ignored)
    if weights is None:
        return torch.stack([each.to(exact).sum(), each.new_full((), len(each), dtype=exact)])
    own = weights.to(exact)
    return torch.stack([torch.where(own > 0, each.to(exact), 0.0) @ own, own.sum()])


def byte_sum(targets: Tensor, weights: Tensor | None, sizes: Tensor) -> Tensor:
    """The bytes of a batch's targets that count.

    Args:
        targets: shape (n,), integers.
        weights: what each target counts, shape (n,); None: each 1.
        sizes: bytes of each token, int64, shape (vocabulary,); others have none.

    Returns:
        0-d, float64 (float32 where the device has no other).
    """
    known = (targets >= 0) & (targets < len(sizes))
    each = torch.where(known, sizes[targets.clamp(0, len(sizes) - 1)], 0)
    each = each.to(_exact(targets.device))
    return each.sum() if weights is None else each @ weights.to(each.dtype)


def perplexity(nats: float) -> float:
    """`exp` of a mean cross-entropy; infinite where that is no number any more."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def bits(nats: float) -> float:
    """Nats in bits."""
    return nats / math.log(2.0)
