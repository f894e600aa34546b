"""Supervised contrastive loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def supervised_contrastive(
    embeddings: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The mean of `contrastive_losses` over the anchors (0-d), and their number.

    Both are 0 when no anchor has a positive.
    """
    losses, has = contrastive_losses(embeddings, labels, temperature)
    anchors = has.sum()
    return losses.sum() / anchors.clamp_min(1), anchors


def contrastive_losses(
    embeddings: Tensor, labels: Tensor, temperature: float, counted: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Khosla et al. 2020, arXiv 2004.11362, equation 2 (the mean outside the logarithm).

    For an anchor i with positives P(i) (other samples of its label):
    `-1/|P(i)| sum_p log( exp(z_i z_p / t) / sum_{a != i} exp(z_i z_a / t) )`, z of unit length.
    Computed with `logsumexp`, so that no temperature overflows; an anchor without a positive is
    left out.

    Args:
        embeddings: shape (n, width).
        labels: shape (n,).
        temperature: t, above 0.
        counted: shape (n,), bool: which samples are there at all, as anchors, positives and
            negatives; None: all.

    Returns:
        Each anchor's loss (0 where it has no positive), and whether it has one; both of shape (n,).
    """
    unit = functional.normalize(embeddings.float(), dim=-1)
    itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    if counted is not None:  # one that is not there is nobody's neighbour
        itself = itself | ~counted.view(1, -1) | ~counted.view(-1, 1)
    similarity = (unit @ unit.T / temperature).masked_fill(itself, -torch.inf)
    empty = itself.all(1, keepdim=True)  # a row without neighbours has no logarithm
    log_share = similarity - similarity.masked_fill(empty, 0.0).logsumexp(1, keepdim=True)
    positive = (labels.view(-1, 1) == labels.view(1, -1)) & ~itself
    count = positive.sum(1)
    has = count > 0
    sums = log_share.masked_fill(~positive, 0.0).sum(1)
    return torch.where(has, -sums / count.clamp_min(1), 0.0), has
