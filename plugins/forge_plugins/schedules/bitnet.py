"""A low rate while weights are quantized in, then another schedule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Protocol, cast

from msgspec import Meta

from forge_kernel.api import (
    Kind,
    LazyModule,
    PluginInfo,
    Run,
    ScheduleFactors,
    Step,
    UseSchedule,
    hookimpl,
)
from forge_plugins.schedules.scaling import scaled

if TYPE_CHECKING:
    from forge_plugins.mathematics.optimizers import learning_rate_curves
else:
    learning_rate_curves = LazyModule("forge_plugins.mathematics.optimizers.learning_rate_curves")


class Schedule(Protocol):
    """What the nested plugin is asked for."""

    def compute_schedule_factors(self, run: Run, step: Step) -> ScheduleFactors:
        """Factors of the configured rates."""
        ...


@dataclass(frozen=True, kw_only=True)
class BitNetScheduleConfig:
    """How long, how low, and what follows."""

    quantization_steps: Annotated[
        int, Meta(ge=1, description="optimizer steps with the low rate; as the quantizer's warm-up")
    ] = 1000
    low: Annotated[
        float, Meta(gt=0, le=1, description="factor of the nested schedule meanwhile")
    ] = 0.1
    smoothing_steps: Annotated[
        int, Meta(ge=0, description="optimizer steps from the low factor to the full one")
    ] = 100
    schedule: Annotated[
        UseSchedule[Schedule], Meta(description="the schedule that is lowered at first")
    ] = field(default_factory=lambda: UseSchedule("warmup_cosine"))


class BitNetSchedule:
    """A low rate while weights are quantized in, then another schedule.

    The nested schedule's factor, times `low` in the first steps.
    """

    info = PluginInfo(name="bitnet", kind=Kind.SCHEDULE, config=BitNetScheduleConfig)

    def __init__(self, config: BitNetScheduleConfig) -> None:
        self.config = config

    @hookimpl
    def compute_schedule_factors(self, run: Run, step: Step) -> ScheduleFactors:
        """The factors of this step."""
        config = self.config
        nested = cast(Schedule, config.schedule).compute_schedule_factors(run, step)
        passed = step.number - config.quantization_steps
        if passed <= 0:
            return scaled(nested, config.low)
        return scaled(
            nested, learning_rate_curves.eased(config.low, 1.0, passed, config.smoothing_steps)
        )
