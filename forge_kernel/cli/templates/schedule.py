"""New plugin: a forge plugin of the kind schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from forge_kernel.api import Kind, PluginInfo, Run, ScheduleFactors, Step, hookimpl
from msgspec import Meta


@dataclass(frozen=True, kw_only=True)
class NewPluginConfig:
    """Settings of New plugin."""

    scale: Annotated[float, Meta(gt=0, description="a factor")] = 1.0


class NewPlugin:
    """New plugin."""

    info = PluginInfo(
        name="new_plugin",
        kind=Kind.SCHEDULE,
        config=NewPluginConfig,
    )

    def __init__(self, config: NewPluginConfig) -> None:
        self.config = config

    @hookimpl
    def compute_schedule_factors(self, run: Run, step: Step) -> ScheduleFactors:
        """The rate falls with the root of the step's number."""
        return ScheduleFactors(self.config.scale / step.number**0.5)
