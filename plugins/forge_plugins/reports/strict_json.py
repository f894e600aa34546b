"""JSON of a run folder, of which nothing is believed that is not of the right type."""

from __future__ import annotations

import json
import math
from typing import Any, Final

LARGEST_STEP: Final = 2**53


def strict_object(text: str) -> dict[str, Any] | None:
    """A strict JSON object (no NaN, no number beyond range), or None."""
    try:
        data = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is beyond the range of numbers")
    return value


def number(value: Any) -> float | None:
    """A finite number as it stands in the file, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) <= 1.7e308 else None


def count(value: Any) -> int | None:
    """A count of steps or the like, or None."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole and 0 <= value < LARGEST_STEP else None


def words(value: Any) -> str | None:
    """A text that is not empty, or None."""
    return value if isinstance(value, str) and value else None


def metrics_by_name(data: Any) -> dict[str, float | None]:
    """Metrics by name; what is neither a number nor null is no metric."""
    if not isinstance(data, dict):
        return {}
    return {
        name: number(value)
        for name, value in data.items()
        if value is None or number(value) is not None
    }
