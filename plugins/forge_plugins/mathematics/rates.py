"""Learning-rate curves as factors of the configured rate; steps count from 1."""

from __future__ import annotations

import math


def linear_warmup(step: int, warmup_steps: int) -> float:
    """`min(step / warmup_steps, 1)`; 1 from the start when there is no warm-up."""
    return min(step / warmup_steps, 1.0) if warmup_steps else 1.0


def warmup_cosine(step: int, warmup_steps: int, total_steps: int, floor: float) -> float:
    """Linear warm-up, then half a cosine down to `floor` at `total_steps`, and `floor` after.

    Loshchilov and Hutter 2017, "SGDR", arXiv 1608.03983, equation 5, without restarts.
    """
    if step < warmup_steps:
        return step / warmup_steps
    span = max(1, total_steps - warmup_steps)
    done = min(1.0, (step - warmup_steps) / span)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done))
