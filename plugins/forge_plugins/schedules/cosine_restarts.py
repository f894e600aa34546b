"""Half cosines that begin anew (warm restarts)."""

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
class CosineRestartsConfig:
    """Lengths and heights of the cycles."""

    warmup_steps: Annotated[int, Meta(ge=0, description="optimizer steps of the rise")] = 0
    first_cycle_steps: Annotated[int, Meta(ge=1, description="length of the first cycle")] = 1000
    growth: Annotated[
        float, Meta(ge=1, description="length of a cycle as a multiple of the one before")
    ] = 1.0
    peak_decay: Annotated[
        float, Meta(gt=0, le=1, description="height of a cycle as a multiple of the one before")
    ] = 1.0
    floor: Annotated[
        float, Meta(ge=0, le=1, description="lowest rate, as a fraction of the configured one")
    ] = 0.0


class CosineRestarts:
    """Half cosines that begin anew (warm restarts)."""

    info = PluginInfo(name="cosine_restarts", kind=Kind.SCHEDULE, config=CosineRestartsConfig)

    def __init__(self, config: CosineRestartsConfig) -> None:
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
        position = learning_rate_curves.position_after(step.number, config.warmup_steps)
        factor = learning_rate_curves.cosine_restarts(
            position, config.first_cycle_steps, config.growth, config.floor, config.peak_decay
        )
        return ScheduleFactors(factor)
