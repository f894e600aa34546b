"""ScheduleFactors times a number."""

from __future__ import annotations

from dataclasses import replace

from forge_kernel.api import ScheduleFactors


def scaled(rates: ScheduleFactors, factor: float) -> ScheduleFactors:
    """The same momentum and weight decay, every learning rate `factor` times as high."""
    rate = rates.learning_rate
    scaled_rate = (
        tuple(each * factor for each in rate) if isinstance(rate, tuple) else rate * factor
    )
    return replace(rates, learning_rate=scaled_rate)
