"""A linear rise, then a fall by the same share in every interval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, PluginInfo, Run, ScheduleFactors, Step, hookimpl

if TYPE_CHECKING:
    from forge_plugins.mathematics.optimizers import learning_rate_curves
else:
    learning_rate_curves = LazyModule("forge_plugins.mathematics.optimizers.learning_rate_curves")


@dataclass(frozen=True, kw_only=True)
class ExponentialConfig:
    """How fast it falls."""

    warmup_steps: Annotated[int, Meta(ge=0, description="optimizer steps of the rise")] = 0
    decay_rate: Annotated[
        float, Meta(gt=0, le=1, description="factor from one interval to the next")
    ] = 0.95
    decay_steps: Annotated[int, Meta(ge=1, description="optimizer steps of an interval")] = 1000
    staircase: Annotated[
        bool, Meta(description="fall at the end of each interval, not within it")
    ] = False
    floor: Annotated[
        float, Meta(ge=0, le=1, description="lowest rate, as a fraction of the configured one")
    ] = 0.0


class Exponential:
    """A linear rise, then a fall by the same share in every interval."""

    info = PluginInfo(name="exponential", kind=Kind.SCHEDULE, config=ExponentialConfig)

    def __init__(self, config: ExponentialConfig) -> None:
        self.config = config

    @hookimpl
    def compute_schedule_factors(self, run: Run, step: Step) -> ScheduleFactors:
        """The factor of this step."""
        del run
        config = self.config
        if step.number < config.warmup_steps:
            return ScheduleFactors(
                learning_rate_curves.linear_warmup(step.number, config.warmup_steps)
            )
        factor = learning_rate_curves.exponential(
            learning_rate_curves.position_after(step.number, config.warmup_steps),
            config.decay_rate,
            config.decay_steps,
            config.floor,
            staircase=config.staircase,
        )
        return ScheduleFactors(factor)
