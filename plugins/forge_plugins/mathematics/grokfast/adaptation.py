"""A rule that changes a slow gradient's decay and amplification by how training goes. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["better", "stalled", "worse"]


def clamped(value: float, bounds: tuple[float, float]) -> float:
    """The value, or the bound that it lies beyond."""
    return min(max(value, bounds[0]), bounds[1])


@dataclass(frozen=True)
class AdaptationRule:
    """How much changes at a verdict, and how far.

    Args:
        window: values of the metric in one judgement; their mean is compared with the mean of as
            many before.
        tolerance: relative change of the mean below which the metric has stalled.
        lambda_factor: at `stalled` the amplification is multiplied by it, at `worse` divided;
            1 leaves it alone.
        alpha_factor: at `stalled` the memory `1 / (1 - alpha)` is multiplied by it, at `worse`
            divided; 1 leaves it alone.
        lambda_bounds: least and greatest amplification.
        alpha_bounds: least and greatest decay, below 1.
        mode: whether the metric is to rise (`max`) or to fall (`min`).
    """

    window: int
    tolerance: float
    lambda_factor: float
    alpha_factor: float
    lambda_bounds: tuple[float, float]
    alpha_bounds: tuple[float, float]
    mode: Literal["max", "min"]

    def judge(self, before: float, now: float) -> Verdict:
        """What became of the metric's mean."""
        gain = now - before if self.mode == "max" else before - now
        margin = self.tolerance * max(abs(before), 1e-12)
        if gain > margin:
            return "better"
        return "worse" if gain < -margin else "stalled"


class FilterAdaptation:
    """Decay and amplification in force, and the values that the next judgement rests on.

    While the metric becomes better nothing changes. When it stalls the slow component gets more
    weight and a longer memory, when it becomes worse less and a shorter one.

    Args:
        rule: what changes when.
        alpha: decay to begin with.
        lambda_reg: amplification to begin with.
    """

    def __init__(self, rule: AdaptationRule, alpha: float, lambda_reg: float) -> None:
        self.rule = rule
        self.alpha = alpha
        self.lambda_reg = lambda_reg
        self._values: list[float] = []
        self._before: float | None = None

    def take(self, value: float) -> Verdict | None:
        """Take in a value of the metric; a value that is not finite counts for nothing.

        Returns:
            The verdict, when this value completes a window after the first.
        """
        if not math.isfinite(value):
            return None
        self._values.append(value)
        if len(self._values) < self.rule.window:
            return None
        now = sum(self._values) / len(self._values)
        before, self._before, self._values = self._before, now, []
        if before is None:
            return None
        verdict = self.rule.judge(before, now)
        if verdict != "better":
            self._change(1 if verdict == "stalled" else -1)
        return verdict

    def _change(self, direction: int) -> None:
        rule = self.rule
        if rule.lambda_factor != 1.0:
            wanted = self.lambda_reg * rule.lambda_factor**direction
            self.lambda_reg = clamped(wanted, rule.lambda_bounds)
        if rule.alpha_factor != 1.0:
            memory = rule.alpha_factor**direction / (1.0 - self.alpha)
            self.alpha = clamped(1.0 - 1.0 / memory, rule.alpha_bounds)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next judgement depends on."""
        return {
            "alpha": self.alpha,
            "lambda_reg": self.lambda_reg,
            "values": {str(place): value for place, value in enumerate(self._values)},
            "before": self._before,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state."""
        self.alpha, self.lambda_reg = float(state["alpha"]), float(state["lambda_reg"])
        kept = state["values"]
        self._values = [float(kept[str(place)]) for place in range(len(kept))]
        self._before = state["before"]
