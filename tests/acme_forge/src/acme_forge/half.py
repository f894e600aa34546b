"""Another schedule at half its rate: a plugin that nests a plugin of anyone's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Protocol, cast

from msgspec import Meta

from forge_kernel.api import Kind, PluginInfo, Run, ScheduleFactors, Step, UseSchedule, hookimpl


class Schedule(Protocol):
    """What the nested plugin is asked for."""

    def compute_schedule_factors(self, run: Run, step: Step) -> ScheduleFactors:
        """Factors of the configured rates."""
        ...


@dataclass(frozen=True, kw_only=True)
class AcmeHalfConfig:
    """What is halved."""

    schedule: Annotated[UseSchedule[Schedule], Meta(description="the schedule to halve")] = field(
        default_factory=lambda: UseSchedule("constant")
    )


class AcmeHalf:
    """Half the learning rate of the nested schedule; its momentum stays."""

    info = PluginInfo(name="acme_half", kind=Kind.SCHEDULE, config=AcmeHalfConfig)

    def __init__(self, config: AcmeHalfConfig) -> None:
        self.config = config

    @hookimpl
    def compute_schedule_factors(self, run: Run, step: Step) -> ScheduleFactors:
        """The factor of this step."""
        rates = cast(Schedule, self.config.schedule).compute_schedule_factors(run, step)
        whole = rates.learning_rate
        half = whole / 2 if isinstance(whole, float) else tuple(rate / 2 for rate in whole)
        return ScheduleFactors(half, rates.momentum)
