"""How fast a network passes from full precision to its levels.

The applied tensor is `v + q * (quantized(v) - v)` with `q` rising from 0 to 1. Curves after the
1.58-bit fine-tuning report of Hugging Face (Mekkouri et al. 2024, "Fine-tuning LLMs to 1.58bit").
"""

from __future__ import annotations

import math
from typing import Final, Literal

Curve = Literal["linear", "exponential", "sigmoid"]
STEEPNESS: Final = {"exponential": 4.0, "sigmoid": 15.0}


def warmup_lambda(step: int, steps: int, curve: Curve = "linear") -> float:
    """Share of the quantized tensor.

    Args:
        step: optimizer steps done since the warm-up began; below 0 it has not begun.
        steps: length of the warm-up; from there on the share is 1.
        curve: `linear`: t; `exponential`: 1 - (1 - t)^4; `sigmoid`: a logistic of steepness 15
            round the middle, stretched so that it begins at 0 and ends at 1.
    """
    if step < 0:
        return 0.0
    if step >= steps:
        return 1.0
    t = step / steps
    return _on_curve(t, curve)


def layer_lambda(step: int, steps: int, place: int, layers: int, curve: Curve = "linear") -> float:
    """Share of the quantized tensor in one of the layers that are quantized one after the other.

    Each has an equal part of the warm-up, which need not be whole steps.

    Args:
        step: optimizer steps done since the warm-up began; below 0 it has not begun.
        steps: length of the warm-up of all layers.
        place: of the layer in their order, from 0.
        layers: how many there are.
        curve: how a layer's share rises over its part.
    """
    if step < 0:
        return 0.0
    if step >= steps:
        return 1.0
    t = step / steps * layers - place
    return _on_curve(min(1.0, max(0.0, t)), curve)


def _on_curve(t: float, curve: Curve) -> float:
    if curve == "linear" or t in (0.0, 1.0):
        return t
    if curve == "exponential":
        return 1.0 - float((1.0 - t) ** STEEPNESS["exponential"])
    low, high = _logistic(0.0), _logistic(1.0)
    return (_logistic(t) - low) / (high - low)


def _logistic(t: float) -> float:
    return 1.0 / (1.0 + math.exp(-STEEPNESS["sigmoid"] * (t - 0.5)))


def fitting(steps: int, total: int | None, share: float) -> int:
    """A warm-up that is no longer than a share of the run.

    Args:
        steps: asked for.
        total: optimizer steps of the run, or None when unknown.
        share: largest part of the run, in (0, 1].
    """
    return steps if total is None else min(steps, int(total * share))


def fitting_window(start: int, steps: int, total: int | None, share: float) -> tuple[int, int]:
    """When a warm-up begins and how long it is, so that it ends before the run.

    Args:
        start: steps in full precision before it, asked for.
        steps: its length, asked for.
        total: optimizer steps of the run, or None when unknown.
        share: largest part of the run that it takes; also where it ends when it would have ended
            with the run or later: both parts are then shortened alike.

    Returns:
        Start and length.
    """
    fitted = fitting(steps, total, share)
    if not start or total is None or start + fitted < total:
        return start, fitted
    end = int(total * share)
    shorter = round(steps * end / (start + steps))
    return end - shorter, shorter
