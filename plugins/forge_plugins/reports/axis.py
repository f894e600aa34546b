"""An axis: from values to pixels, with ticks at round numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from forge_plugins.reports.notation import number_text, tick_texts

if TYPE_CHECKING:
    from collections.abc import Sequence

_SMALLEST: Final = 1e-300
_LARGEST: Final = 1e300  # beyond, sums and differences of values overflow
_NARROW: Final = 2.0  # up to this ratio a logarithmic axis has evenly spaced ticks
_FACTORS: Final = (
    (10.0, (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)),
    (1000.0, (1.0, 2.0, 5.0)),
    (math.inf, (1.0,)),
)


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis.

    Args:
        low, high: values at its two ends, low < high; both above 0 on a logarithmic axis.
        ticks: values that are marked, with `labels`.
        start, end: pixels of `low` and `high`.
        log: whether equal ratios, not equal differences, are equally long.
    """

    low: float
    high: float
    ticks: tuple[float, ...]
    labels: tuple[str, ...]
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        """The pixel of a value."""
        low, high, value = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def value_axis(values: Sequence[float], start: float, end: float, *, count: int = 6) -> Axis:
    """A linear axis that ends at ticks; it begins at 0 where the values come near to it.

    Args:
        values: what is to be shown; none at all gives 0 to 1.
        start: pixel of the low end.
        end: pixel of the high end.
        count: about how many ticks.
    """
    low, high = _span([min(max(value, -_LARGEST), _LARGEST) for value in values])
    if 0 < low <= 0.4 * high:
        low = 0.0
    elif 0.4 * low <= high < 0:
        high = 0.0
    ticks = _even_ticks(low, high, count)
    return Axis(ticks[0], ticks[-1], ticks, tuple(tick_texts(ticks)), start, end)


def step_axis(steps: Sequence[int], start: float, end: float, *, count: int = 7) -> Axis:
    """A linear axis of whole numbers that ends at the last step.

    Args:
        steps: what is to be shown, none negative.
        start: pixel of the low end.
        end: pixel of the high end.
        count: about how many ticks.
    """
    low, high = (min(steps), max(steps)) if steps else (0, 1)
    if low <= 0.25 * high or low == high:
        low = 0
    high = max(high, low + 1)
    step = max(1, round(_round_step((high - low) / count)))
    ticks = tuple(float(tick) for tick in range(-(-low // step) * step, high + 1, step))
    return Axis(low, high, ticks, tuple(tick_texts(ticks)), start, end)


def log_axis(values: Sequence[float], start: float, end: float, *, count: int = 7) -> Axis:
    """A logarithmic axis that ends at round numbers.

    Args:
        values: what is to be shown, all above 0; none at all gives 0.1 to 1.
        start: pixel of the low end.
        end: pixel of the high end.
        count: about how many ticks at most.
    """
    low = min(max(min(values, default=0.1), _SMALLEST), _LARGEST / 10)
    high = min(max(values, default=1.0), _LARGEST)
    if low * 1.01 < high < low * _NARROW:
        ticks = _even_ticks(low, high, count)
        labels = tuple(tick_texts(ticks))
        return Axis(ticks[0], ticks[-1], ticks, labels, start, end, log=True)
    marks = _log_marks(low, max(high, low * 1.01))
    powers = tuple(mark for mark in marks if _is_power_of_ten(mark))
    if len(marks) <= count + 1 or len(powers) < 2:
        shown = marks
    else:
        every = math.ceil(len(powers) / count)
        shown = powers[::every]
    labels = tuple(_log_text(tick) for tick in shown)
    return Axis(marks[0], marks[-1], shown, labels, start, end, log=True)


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest value, set apart where they are equal (to nine digits)."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    largest = max(abs(low), abs(high))
    if largest < _SMALLEST:
        return 0.0, 1.0
    if high - low > 1e-9 * largest:
        return low, high
    return min(0.0, 1.2 * low), max(0.0, 1.2 * high)


def _even_ticks(low: float, high: float, count: int) -> tuple[float, ...]:
    """About so many multiples of a round number, from not above `low` to not below `high`."""
    step = _round_step((high - low) / count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(index * step for index in range(first, last + 1))


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def _log_marks(low: float, high: float) -> tuple[float, ...]:
    """Round numbers from the last not above `low` to the first not below `high`.

    The wider the span, the fewer to each power of ten.
    """
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    factors = next(factors for widest, factors in _FACTORS if high / low <= widest)
    marks = [float(f"{f:g}e{power}") for power in range(first, last + 1) for f in factors]
    start = max(index for index, mark in enumerate(marks) if index == 0 or mark <= low)
    stop = next((index for index, mark in enumerate(marks) if mark >= high), len(marks) - 1)
    return tuple(marks[start : max(stop, start + 1) + 1])


def _log_text(tick: float) -> str:
    return number_text(tick) if tick < 1 else tick_texts((tick,))[0]


def _is_power_of_ten(value: float) -> bool:
    return math.isclose(math.log10(value), round(math.log10(value)), abs_tol=1e-9)
