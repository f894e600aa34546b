"""Lowers the rate when a validation metric stops improving."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, PluginInfo, Run, ScheduleFactors, Step, hookimpl

if TYPE_CHECKING:
    from forge_plugins.mathematics.optimizers import learning_rate_curves
else:
    learning_rate_curves = LazyModule("forge_plugins.mathematics.optimizers.learning_rate_curves")


@dataclass(frozen=True, kw_only=True)
class PlateauConfig:
    """Which metric, how much patience, and by how much the rate falls."""

    metric: Annotated[str, Meta(min_length=1, description="name of a validation metric")] = "loss"
    mode: Annotated[
        Literal["max", "min"], Meta(description="whether higher (max) or lower (min) is better")
    ] = "min"
    factor: Annotated[float, Meta(gt=0, lt=1, description="factor of the rate at each fall")] = 0.1
    patience: Annotated[
        int, Meta(ge=0, description="validations without improvement before the rate falls")
    ] = 10
    threshold: Annotated[
        float, Meta(ge=0, description="smallest change that counts as an improvement")
    ] = 1e-4
    threshold_mode: Annotated[
        Literal["relative", "absolute"],
        Meta(description="threshold as a fraction of the best metric, or in its own unit"),
    ] = "relative"
    cooldown: Annotated[
        int, Meta(ge=0, description="validations after a fall that are not counted")
    ] = 0
    warmup_steps: Annotated[int, Meta(ge=0, description="optimizer steps of the rise")] = 0
    floor: Annotated[
        float, Meta(ge=0, le=1, description="lowest rate, as a fraction of the configured one")
    ] = 0.0


class Plateau:
    """Lowers the rate when a validation metric stops improving.

    As torch's `ReduceLROnPlateau`, stepped by each validation.
    """

    info = PluginInfo(
        name="plateau",
        kind=Kind.SCHEDULE,
        config=PlateauConfig,
        requires=lambda config: (f"metric:{config.metric}",),
    )

    def __init__(self, config: PlateauConfig) -> None:
        self.config = config
        self._factor = 1.0
        self._best: float | None = None
        self._bad = 0
        self._cooling = 0

    def _better(self, value: float) -> bool:
        config = self.config
        if not math.isfinite(value):
            return False
        if self._best is None:
            return True
        relative = config.threshold_mode == "relative"
        margin = config.threshold * (abs(self._best) if relative else 1.0)
        if config.mode == "min":
            return value < self._best - margin
        return value > self._best + margin

    @hookimpl
    def on_validation(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Count validations without a better metric; the rate falls when there are too many."""
        del run
        config = self.config
        if config.metric not in metrics:
            return
        if self._better(metrics[config.metric]):
            self._best = metrics[config.metric]
            self._bad = 0
        else:
            self._bad += 1
        if self._cooling > 0:
            self._cooling -= 1
            self._bad = 0
        if self._bad > config.patience:
            self._factor = max(config.floor, self._factor * config.factor)
            self._cooling = config.cooldown
            self._bad = 0

    @hookimpl
    def compute_schedule_factors(self, run: Run, step: Step) -> ScheduleFactors:
        """The factor of this step."""
        del run
        return ScheduleFactors(
            self._factor * learning_rate_curves.linear_warmup(step.number, self.config.warmup_steps)
        )

    def state_dict(self) -> dict[str, Any]:
        """The factor and what it was decided by."""
        return {
            "factor": self._factor,
            "best": self._best,
            "bad": self._bad,
            "cooling": self._cooling,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the factor."""
        self._factor = float(state["factor"])
        self._best = state["best"]
        self._bad, self._cooling = int(state["bad"]), int(state["cooling"])
