"""A line down to the floor that drops on its way, and weight decay until then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from forge_kernel.api import (
    Kind,
    LazyModule,
    MetricInfo,
    PluginInfo,
    Run,
    ScheduleFactors,
    Step,
    hookimpl,
)
from forge_plugins.schedules.span import SpanConfig, SpanSchedule

if TYPE_CHECKING:
    from forge_plugins.mathematics.optimizers import learning_rate_curves
else:
    learning_rate_curves = LazyModule("forge_plugins.mathematics.optimizers.learning_rate_curves")


@dataclass(frozen=True, kw_only=True)
class TwoStageConfig(SpanConfig):
    """Lengths, floor, and what changes where the second stage begins."""

    switch: Annotated[
        float, Meta(gt=0, lt=1, description="share of the steps that the first stage takes")
    ] = 0.5
    second_rate: Annotated[
        float, Meta(gt=0, le=1, description="factor of the rate in the second stage")
    ] = 0.667
    second_decay: Annotated[
        float, Meta(ge=0, le=1, description="factor of the weight decay in the second stage")
    ] = 0.0


class TwoStage(SpanSchedule):
    """BitNet's two stages: a line down to the floor that drops on its way, and no decay after.

    "The Era of 1-bit LLMs: Training Tips, Code and FAQ" (Microsoft 2024): a high rate while latent
    weights still have to cross their borders, then a lower one; weight decay, which acts as a
    confidence of the latent weights, in the first stage alone.
    """

    info = PluginInfo(
        name="two_stage",
        kind=Kind.SCHEDULE,
        config=TwoStageConfig,
        metrics=(MetricInfo("weight_decay_factor", title="Weight decay, factor"),),
    )
    config: TwoStageConfig

    def __init__(self, config: TwoStageConfig) -> None:
        super().__init__(config)
        self._decay = 1.0

    def curve(self, position: int, span: int) -> float:
        """A straight line."""
        return learning_rate_curves.linear(position, span, self.config.floor)

    @hookimpl
    def compute_schedule_factors(self, run: Run, step: Step) -> ScheduleFactors:
        """The factors of this step."""
        config = self.config
        rate = super().compute_schedule_factors(run, step).learning_rate
        assert isinstance(rate, float), "a line has one factor"
        total = config.total_steps or run.total_steps
        assert total is not None, "checked at the run's start"
        second = step.number > config.switch * total
        self._decay = config.second_decay if second else 1.0
        return ScheduleFactors(
            rate * config.second_rate if second else rate, weight_decay=self._decay
        )

    @hookimpl
    def log_metrics(self, run: Run, step: Step) -> Mapping[str, float]:
        """The factor of the weight decay."""
        del run, step
        return {"weight_decay_factor": self._decay}
