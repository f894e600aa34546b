"""Numbers as a reader likes them; what was not measured is a dash, never a number."""

from __future__ import annotations

import datetime
import math
from typing import TYPE_CHECKING, Final

from forge_kernel.contract import metric_info

if TYPE_CHECKING:
    from collections.abc import Sequence

ABSENT: Final = metric_info.ABSENT
_SUFFIXES: Final = ((1e12, "T"), (1e9, "G"), (1e6, "M"))
_SIZES: Final = ("kB", "MB", "GB", "TB")


def number_text(value: float | None) -> str:
    """A number with five significant digits, whole ones in full; a dash for None."""
    if value is None:
        return ABSENT
    if value == math.floor(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if 1e5 <= abs(value) < 1e15:  # whole numbers have more digits than that already
        return f"{value:,.0f}"
    return metric_info.plain_exponent(f"{value:,.5g}")


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """Labels for evenly spaced ticks: as many decimals as their distance needs, and one unit."""
    if not ticks:
        return []
    largest = max(abs(tick) for tick in ticks)
    distance = abs(ticks[1] - ticks[0]) if len(ticks) > 1 else largest
    if 0 < largest < 1e-3 or largest >= 1e15:
        return _exponent_texts(ticks, math.floor(math.log10(largest)))
    unit, suffix = next(((u, s) for u, s in _SUFFIXES if largest >= u), (1.0, ""))
    decimals = _decimals(distance / unit)
    return [
        f"{tick / unit:,.{decimals}f}{suffix}" if abs(tick) > distance / 1e6 else "0"
        for tick in ticks
    ]


def duration_text(seconds: float | None) -> str:
    """A span of time in its two or three largest units; a dash for None."""
    if seconds is None:
        return ABSENT
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{hours:,} h"] if hours else []
    return " ".join([*parts, f"{minutes} min", f"{rest} s"])


def size_text(count: int | None) -> str:
    """A number of bytes in decimal units; a dash for None."""
    if count is None:
        return ABSENT
    if count < 1000:
        return f"{count} B"
    power = min(len(_SIZES), int(math.log10(count)) // 3)
    return f"{count / 1000**power:.3g} {_SIZES[power - 1]}"


def time_text(seconds: float | None) -> str | None:
    """A moment (seconds since 1970) in UTC; None when it is unknown or no date."""
    if seconds is None:
        return None
    try:
        moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    except (OverflowError, ValueError, OSError):
        return None
    return moment.strftime("%Y-%m-%d %H:%M:%S UTC")


def _decimals(distance: float) -> int:
    """Decimals that tell numbers at this distance apart."""
    if distance <= 0:
        return 0
    return min(15, max(0, -math.floor(math.log10(distance) + 1e-9)))


def _exponent_texts(ticks: Sequence[float], power: int) -> list[str]:
    """Multiples of one power of ten: `0.5e-4`, `1e-4`."""
    unit = 10.0**power
    return [f"{tick / unit:.6g}e{power}" if tick else "0" for tick in ticks]
