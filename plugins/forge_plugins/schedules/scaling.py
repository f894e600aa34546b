"""Rates times a number."""

from __future__ import annotations

from forge_kernel.api import Rates


def scaled(rates: Rates, factor: float) -> Rates:
    """The same momentum, every learning rate `factor` times as high."""
    if isinstance(rates.learning_rate, tuple):
        return Rates(tuple(rate * factor for rate in rates.learning_rate), rates.momentum)
    return Rates(rates.learning_rate * factor, rates.momentum)
