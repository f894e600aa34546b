"""The learning rate as configured, throughout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from forge_kernel.api import Kind, PluginInfo, Run, ScheduleFactors, Step, hookimpl


@dataclass(frozen=True, kw_only=True)
class ConstantConfig:
    """The factor."""

    factor: Annotated[float, Meta(gt=0, description="factor of the optimizer's rate")] = 1.0


class Constant:
    """The learning rate as configured, throughout."""

    info = PluginInfo(name="constant", kind=Kind.SCHEDULE, config=ConstantConfig)

    def __init__(self, config: ConstantConfig) -> None:
        self.config = config
        self._rates = ScheduleFactors(config.factor)

    @hookimpl
    def compute_schedule_factors(self, run: Run, step: Step) -> ScheduleFactors:
        """The factor."""
        del run, step
        return self._rates
