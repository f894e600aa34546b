"""How far right answers are from a lead over the wrong ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def lacking_margin(logits: Tensor, targets: Tensor) -> Tensor:
    """`max(0, 1 - (right logit - best wrong logit))` of each row: 0 for one that leads by 1.

    The multi-class hinge loss of Crammer and Singer 2001 (Journal of Machine Learning Research 2).

    Args:
        logits: shape (n, classes), two classes or more.
        targets: integers in 0 .. classes - 1, shape (n,).

    Returns:
        Shape (n,).
    """
    places = targets.unsqueeze(1)
    right = logits.gather(1, places).squeeze(1)
    wrong = logits.scatter(1, places, -torch.inf).amax(1)
    return functional.relu(1.0 - (right - wrong))
