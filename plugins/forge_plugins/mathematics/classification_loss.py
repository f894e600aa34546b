"""Cross-entropy with label smoothing, class weights and focusing, as a mean with its weight."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def classification_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    sample_weights: Tensor | None = None,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
    ignored: int | None = None,
) -> tuple[Tensor, float | Tensor]:
    """The weighted mean and what it was taken over.

    `sum_i v_i (1 - p_i)^gamma CE_i / sum_i v_i w_i`, with `CE_i` as torch gives it (smoothing and
    class weights `w` inside), `p_i` the probability of the target, `v_i` the sample's weight. The
    divisor is torch's; with gamma 0 and no sample weights it is `functional.cross_entropy`, bit
    for bit. Focusing: Lin et al. 2017, arXiv 1708.02002, equation 4.

    Args:
        logits: shape (n, classes).
        targets: shape (n,), integers.
        sample_weights: shape (n,), or None for equal weights.
        class_weights: shape (classes,), or None.
        label_smoothing: share of the target that is spread over all classes.
        focal_gamma: how strongly well-classified samples are weighed down.
        ignored: a target that counts as nothing.

    Returns:
        The mean (0-d) and its weight: the sum of the divisor. Without anything to average the mean
        is 0 and the weight 0.
    """
    plain = sample_weights is None and class_weights is None and ignored is None
    if plain and not focal_gamma:
        loss = functional.cross_entropy(logits, targets, label_smoothing=label_smoothing)
        return loss, len(targets)
    losses, weights = classification_losses(
        logits, targets, class_weights=class_weights, label_smoothing=label_smoothing,
        focal_gamma=focal_gamma, ignored=ignored,
    )  # fmt: skip
    if sample_weights is not None:
        losses = losses * sample_weights
        weights = weights * sample_weights
    total = weights.sum()
    return losses.sum() / torch.where(total > 0, total, 1.0), total.detach()


def classification_losses(
    logits: Tensor,
    targets: Tensor,
    *,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
    ignored: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Each sample's loss and its part of the divisor of the mean, both of shape (n,).

    Args: as `classification_loss`.
    """
    index = -100 if ignored is None else ignored
    losses = functional.cross_entropy(
        logits, targets, class_weights, label_smoothing=label_smoothing, ignore_index=index,
        reduction="none",
    )  # fmt: skip
    counted = targets != index
    safe = torch.where(counted, targets, 0)
    if focal_gamma:
        log_share = functional.log_softmax(logits, -1).gather(1, safe.unsqueeze(1)).squeeze(1)
        doubt = -torch.expm1(log_share)  # 1 - p without cancellation
        losses = losses * doubt.clamp_min(1e-12).pow(focal_gamma)  # 0 has no gradient below 1
    weights = counted.to(losses)
    if class_weights is not None:
        weights = weights * class_weights[safe]
    return losses, weights
