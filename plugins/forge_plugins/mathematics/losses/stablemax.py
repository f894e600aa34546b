"""StableMax: a softmax whose exponential grows only linearly."""

from __future__ import annotations

import torch
from torch import Tensor


def stablemax_logits(outputs: Tensor) -> Tensor:
    """`log s(x)`, with `s(x) = x + 1` for `x >= 0` and `1 / (1 - x)` below.

    StableMax is the softmax of these, `s(x_i) / sum_j s(x_j)`, so whatever is defined by logits
    (cross-entropy, smoothing, focusing) takes them in the outputs' place. Prieto et al. 2025,
    "Grokking at the Edge of Numerical Stability", arXiv 2501.04697, equation 5: without the
    exponential the loss does not round to zero, and training goes on after every sample is right.

    Args:
        outputs: any shape; half precision is brought to fp32.

    Returns:
        The same shape, in fp32 at least.
    """
    if outputs.dtype in (torch.float16, torch.bfloat16):
        outputs = outputs.float()
    rising = torch.log1p(outputs.clamp_min(0))  # each branch is clamped: where() has two gradients
    falling = -torch.log1p((-outputs).clamp_min(0))
    return torch.where(outputs >= 0, rising, falling)
