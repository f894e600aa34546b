"""Cross-entropy with label smoothing, class weights and focusing, target by target."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def classification_losses(
    logits: Tensor,
    targets: Tensor,
    *,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
    ignored: int = -100,
) -> tuple[Tensor, Tensor | None]:
    """Each target's loss, and its part of the divisor of the mean.

    `sum_i (1 - p_i)^gamma CE_i / sum_i w_i`, with `CE_i` as torch gives it (smoothing and class
    weights `w` inside) and `p_i` the probability of the target. The divisor is torch's. Focusing:
    Lin et al. 2017, arXiv 1708.02002, equation 4.

    Args:
        logits: shape (n, classes).
        targets: shape (n,), integers.
        class_weights: shape (classes,), or None.
        label_smoothing: share of the target that is spread over all classes.
        focal_gamma: how strongly well-classified samples are weighed down.
        ignored: the target that counts for nothing: its loss is 0.

    Returns:
        Shapes (n,) and (n,); the second is None where all parts are 1.
    """
    losses = functional.cross_entropy(
        logits, targets, class_weights, label_smoothing=label_smoothing, ignore_index=ignored,
        reduction="none",
    )  # fmt: skip
    if not focal_gamma and class_weights is None:
        return losses, None
    safe = torch.where(targets != ignored, targets, 0)
    if focal_gamma:
        log_share = functional.log_softmax(logits, -1).gather(1, safe.unsqueeze(1)).squeeze(1)
        doubt = -torch.expm1(log_share)  # 1 - p without cancellation
        losses = losses * doubt.clamp_min(1e-12).pow(focal_gamma)  # 0 has no gradient below 1
    return losses, None if class_weights is None else class_weights[safe]
