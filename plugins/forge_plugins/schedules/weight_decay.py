"""A schedule of the rate, and another one of the weight decay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Protocol, cast

from msgspec import Meta

from forge_kernel.api import (
    Kind,
    MetricInfo,
    PluginInfo,
    Run,
    ScheduleFactors,
    Step,
    UseSchedule,
    hookimpl,
)


class Schedule(Protocol):
    """What a nested plugin is asked for."""

    def compute_schedule_factors(self, run: Run, step: Step) -> ScheduleFactors:
        """Factors of the configured rates."""
        ...


@dataclass(frozen=True, kw_only=True)
class WeightDecayConfig:
    """One schedule for each."""

    schedule: Annotated[
        UseSchedule[Schedule], Meta(description="of the learning rate, and of momentum")
    ] = field(default_factory=lambda: UseSchedule("warmup_cosine"))
    decay: Annotated[
        UseSchedule[Schedule],
        Meta(description="its rate's factor is that of the weight decay"),
    ] = field(default_factory=lambda: UseSchedule("linear"))


class WeightDecay:
    """A schedule of the rate, and another one of the weight decay.

    Both are factors of what the optimizer's settings say, for each of its groups.
    """

    info = PluginInfo(
        name="weight_decay",
        kind=Kind.SCHEDULE,
        config=WeightDecayConfig,
        metrics=(MetricInfo("weight_decay_factor", title="Weight decay, factor"),),
    )

    def __init__(self, config: WeightDecayConfig) -> None:
        self.config = config
        self._factor = 1.0

    @hookimpl
    def compute_schedule_factors(self, run: Run, step: Step) -> ScheduleFactors:
        """The factors of both."""
        rates = cast(Schedule, self.config.schedule).compute_schedule_factors(run, step)
        decays = cast(Schedule, self.config.decay).compute_schedule_factors(run, step)
        decay = decays.learning_rate
        self._factor = decay[0] if isinstance(decay, tuple) else decay
        return replace(rates, weight_decay=decay)

    @hookimpl
    def log_metrics(self, run: Run, step: Step) -> Mapping[str, float]:
        """The factor of the first group's weight decay."""
        del run, step
        return {"weight_decay_factor": self._factor}
