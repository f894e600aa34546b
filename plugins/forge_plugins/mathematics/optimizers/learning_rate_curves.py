"""Learning-rate curves as factors of the configured rate.

A curve is a function of `position`: optimizer steps since the warm-up's end, 0 at the first step
with the full rate (torch counts the same way: `last_epoch` of a scheduler). Optimizer steps
themselves count from 1.
"""

from __future__ import annotations

import math
from typing import Literal

CycleMode = Literal["triangular", "triangular2", "exponential"]
Fall = Literal["linear", "cosine", "root"]


def linear_warmup(step: int, warmup_steps: int) -> float:
    """`min(step / warmup_steps, 1)`; 1 from the start when there is no warm-up."""
    return min(step / warmup_steps, 1.0) if warmup_steps else 1.0


def position_after(step: int, warmup_steps: int) -> int:
    """Steps since the full rate was reached: 0 at step `max(warmup_steps, 1)`, negative before."""
    return step - max(warmup_steps, 1)


def linear(position: int, span: int, floor: float) -> float:
    """A straight line from 1 to `floor` at `span`, and `floor` after."""
    return 1.0 - (1.0 - floor) * min(1.0, position / span)


def cosine(position: int, span: int, floor: float) -> float:
    """Half a cosine from 1 to `floor` at `span`, and `floor` after.

    Loshchilov and Hutter 2017, "SGDR", arXiv 1608.03983, equation 5.
    """
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, position / span)))


def cosine_restarts(
    position: int, first: int, growth: float, floor: float, peak_decay: float
) -> float:
    """Half cosines that begin anew, each `growth` times as long and `peak_decay` times as high.

    The same paper, section 3; with `peak_decay` 1 and a whole `growth` torch's
    `CosineAnnealingWarmRestarts`.

    Args:
        position: since the full rate.
        first: length of the first cycle.
        growth: length of a cycle as a multiple of the one before, at least 1.
        floor: lowest factor.
        peak_decay: height of a cycle's start above the floor, as a multiple of the one before.
    """
    if growth == 1.0:
        cycle, inside, length = position // first, float(position % first), float(first)
    else:
        cycle = int(math.log(1.0 + position * (growth - 1.0) / first + 1e-12) / math.log(growth))
        inside = position - first * (growth**cycle - 1.0) / (growth - 1.0)
        length = first * growth**cycle
    height = (1.0 - floor) * float(peak_decay**cycle)
    return floor + height * 0.5 * (1.0 + math.cos(math.pi * min(1.0, max(0.0, inside) / length)))


def exponential(
    position: int, rate: float, every: int, floor: float, *, staircase: bool = False
) -> float:
    """`rate ** (position / every)`, not below `floor`; a staircase holds between its steps."""
    exponent = position // every if staircase else position / every
    return max(floor, float(rate**exponent))


def polynomial(position: int, span: int, power: float, floor: float) -> float:
    """`floor + (1 - floor) (1 - position / span) ** power`, and `floor` after."""
    return floor + (1.0 - floor) * float((1.0 - min(1.0, position / span)) ** power)


def between(start: float, end: float, share: float, *, straight: bool) -> float:
    """From `start` to `end` on a line or on half a cosine."""
    if straight:
        return start + (end - start) * share
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * share))


def one_cycle(
    position: int,
    span: int,
    rise_fraction: float,
    outer: tuple[float, float],
    *,
    straight: bool = False,
) -> tuple[float, float]:
    """One rise to 1 and one fall (Smith and Topin 2019, arXiv 1708.07120), as torch's `OneCycleLR`.

    Args:
        position: optimizer steps before this one.
        span: position of the last step.
        rise_fraction: share of the steps, `span + 1` of them, in which the factor rises.
        outer: factor at the first and at the last step.
        straight: lines instead of half cosines.

    Returns:
        The factor, and how high the cycle stands: 0 at both ends, 1 at the peak (momentum goes
        against it).
    """
    peak = rise_fraction * (span + 1) - 1.0
    done = min(position, span)
    if done <= peak:
        share = done / peak if peak > 0 else 1.0
        return between(outer[0], 1.0, share, straight=straight), between(
            0.0, 1.0, share, straight=straight
        )
    share = (done - peak) / (span - peak)
    return between(1.0, outer[1], share, straight=straight), between(
        1.0, 0.0, share, straight=straight
    )


def cyclic(
    position: int, rise: int, fall: int, floor: float, mode: CycleMode, gamma: float
) -> tuple[float, float]:
    """Triangles between `floor` and 1 (Smith 2017, arXiv 1506.01186), as torch's `CyclicLR`.

    Args:
        position: optimizer steps before this one.
        rise: steps from the floor to the top.
        fall: steps back.
        floor: lowest factor.
        mode: `triangular`; `triangular2` halves the height each cycle; `exponential` multiplies
            it by `gamma ** position`.
        gamma: read by `exponential` only.

    Returns:
        The factor, and the height of the cycle between 0 and 1.
    """
    length = rise + fall
    cycle, inside = divmod(position, length)
    height = inside / rise if inside <= rise else (length - inside) / fall
    if mode == "triangular2":
        height /= 2.0**cycle
    elif mode == "exponential":
        height *= gamma**position
    return floor + (1.0 - floor) * height, height


def stable_decay(position: int, span: int, decay_steps: int, floor: float, fall: Fall) -> float:
    """1 until `decay_steps` before the end, then down to `floor` at `span`, and `floor` after.

    Hu et al. 2024, "MiniCPM", arXiv 2404.06395, section 4; `root` is `1 - sqrt(share)` of Hägele
    et al. 2024, arXiv 2405.18392, equation 3.
    """
    share = min(1.0, max(0.0, (position - (span - decay_steps)) / decay_steps))
    if fall == "root":
        return floor + (1.0 - floor) * (1.0 - math.sqrt(share))
    return between(1.0, floor, share, straight=fall == "linear")


def eased(before: float, after: float, passed: int, steps: int) -> float:
    """A factor that goes from one value to another in `steps` even steps; `passed` counts from 1.

    The ratio of two steps is constant (rates are felt as ratios) while both ends are positive.
    """
    share = min(1.0, passed / steps) if steps else 1.0
    if before > 0 and after > 0:
        return float(before * (after / before) ** share)
    return between(before, after, share, straight=True)
