"""A linear rise, then half a cosine down to a floor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from forge_kernel.api import (
    Kind,
    LazyModule,
    PluginError,
    PluginInfo,
    Rates,
    Run,
    Step,
    hookimpl,
)

if TYPE_CHECKING:
    from forge_plugins.mathematics import rates
else:
    rates = LazyModule("forge_plugins.mathematics.rates")


@dataclass(frozen=True, kw_only=True)
class WarmupCosineConfig:
    """Lengths and floor."""

    warmup_steps: Annotated[int, Meta(ge=0, description="optimizer steps of the rise")] = 10
    total_steps: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="step at which the floor is reached; null: the run's"),
    ] = None
    floor: Annotated[
        float, Meta(ge=0, le=1, description="lowest rate, as a share of the configured one")
    ] = 0.0

    def __post_init__(self) -> None:
        if self.total_steps is not None and self.total_steps <= self.warmup_steps:
            raise ValueError(
                f"total_steps {self.total_steps} is not beyond warmup_steps {self.warmup_steps}"
            )


class WarmupCosine:
    """Follows the whole run's length unless told another."""

    info = PluginInfo(name="warmup_cosine", kind=Kind.SCHEDULE, config=WarmupCosineConfig)

    def __init__(self, config: WarmupCosineConfig) -> None:
        self.config = config

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """The length must be known before the first step."""
        if self.config.total_steps is None and run.total_steps is None:
            raise PluginError(
                "warmup_cosine: the run's length in steps is not known (max_seconds, or data of "
                "unknown length): set schedule.with.total_steps"
            )

    @hookimpl
    def compute_rates(self, run: Run, step: Step) -> Rates:
        """The factor of this step."""
        config = self.config
        total = config.total_steps or run.total_steps
        assert total is not None, "checked at the run's start"
        return Rates(rates.warmup_cosine(step.number, config.warmup_steps, total, config.floor))
