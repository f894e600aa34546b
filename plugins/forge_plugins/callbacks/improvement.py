"""Whether a metric is better than the best one before."""

from __future__ import annotations

import math
from typing import Any


class Improvement:
    """Remembers the best value of one metric.

    Args:
        mode: `max` or `min`.
        min_delta: by how much a value must be better to count.
    """

    def __init__(self, mode: str, min_delta: float = 0.0) -> None:
        self.mode = mode
        self.min_delta = min_delta
        self.best: float | None = None

    def better(self, value: float) -> bool:
        """Take in a value and say whether it is a new best; NaN never is."""
        if not math.isfinite(value):
            return False
        if self.best is not None:
            gain = value - self.best if self.mode == "max" else self.best - value
            if gain <= self.min_delta:
                return False
        self.best = value
        return True

    def state_dict(self) -> dict[str, Any]:
        """The best value."""
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the best value."""
        self.best = state["best"]
