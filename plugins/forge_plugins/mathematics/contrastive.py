"""Supervised contrastive loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def supervised_contrastive(
    embeddings: Tensor, labels: Tensor, temperature: float
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

    Returns:
        The mean over anchors (0-d), and their number; both 0 when no anchor has a positive.
    """
    unit = functional.normalize(embeddings.float(), dim=-1)
    itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    similarity = (unit @ unit.T / temperature).masked_fill(itself, -torch.inf)
    log_share = similarity - similarity.logsumexp(1, keepdim=True)
    positive = (labels.view(-1, 1) == labels.view(1, -1)) & ~itself
    count = positive.sum(1)
    has = count > 0
    sums = log_share.masked_fill(~positive, 0.0).sum(1)
    losses = torch.where(has, -sums / count.clamp_min(1), 0.0)
    anchors = has.sum()
    return losses.sum() / anchors.clamp_min(1), anchors
