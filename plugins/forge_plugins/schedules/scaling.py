"""ScheduleFactors times a number."""

from __future__ import annotations

from forge_kernel.api import ScheduleFactors


def scaled(rates: ScheduleFactors, factor: float) -> ScheduleFactors:
    """The same momentum, every learning rate `factor` times as high."""
    if isinstance(rates.learning_rate, tuple):
        return ScheduleFactors(tuple(rate * factor for rate in rates.learning_rate), rates.momentum)
    return ScheduleFactors(rates.learning_rate * factor, rates.momentum)
