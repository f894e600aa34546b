"""A linear rise to the configured learning rate, which then stays."""

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
class LinearWarmupConfig:
    """How long the rise takes."""

    warmup_steps: Annotated[int, Meta(ge=0, description="optimizer steps of the rise")] = 10
    from_zero: Annotated[
        bool,
        Meta(description="the first step has the rate 0 (as torch's LambdaLR gives it), and the "
             "full rate comes a step later"),
    ] = False  # fmt: skip


class LinearWarmup:
    """A linear rise to the configured learning rate, which then stays.

    `min(step / warmup_steps, 1)`; `from_zero`: `min((step - 1) / warmup_steps, 1)`.
    """

    info = PluginInfo(name="linear_warmup", kind=Kind.SCHEDULE, config=LinearWarmupConfig)

    def __init__(self, config: LinearWarmupConfig) -> None:
        self.config = config

    @hookimpl
    def compute_schedule_factors(self, run: Run, step: Step) -> ScheduleFactors:
        """The factor of this step."""
        del run
        number = step.number - 1 if self.config.from_zero else step.number
        return ScheduleFactors(learning_rate_curves.linear_warmup(number, self.config.warmup_steps))
