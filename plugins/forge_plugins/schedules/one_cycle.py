"""One rise and one fall of the rate, momentum against it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, PluginInfo, Run, ScheduleFactors, Step, hookimpl
from forge_plugins.schedules.span import check_length

if TYPE_CHECKING:
    from forge_plugins.mathematics.optimizers import learning_rate_curves
else:
    learning_rate_curves = LazyModule("forge_plugins.mathematics.optimizers.learning_rate_curves")


@dataclass(frozen=True, kw_only=True)
class OneCycleConfig:
    """The cycle's form; its peak is the optimizer's rate."""

    renamed: ClassVar[Mapping[str, str]] = {"rise_share": "rise_fraction"}

    total_steps: Annotated[
        Annotated[int, Meta(ge=2)] | None,
        Meta(description="step at which the cycle ends; null: the run's last"),
    ] = None
    rise_fraction: Annotated[
        float, Meta(gt=0, lt=1, description="share of the steps that rise")
    ] = 0.3
    start: Annotated[
        float, Meta(gt=0, le=1, description="first rate, as a fraction of the optimizer's")
    ] = 0.04
    end: Annotated[
        float, Meta(ge=0, le=1, description="last rate, as a fraction of the optimizer's")
    ] = 4e-6
    form: Annotated[
        Literal["cosine", "linear"], Meta(description="form of the rise and the fall")
    ] = "cosine"
    lowest_momentum: Annotated[
        Annotated[float, Meta(gt=0, le=1)] | None,
        Meta(description="momentum at the peak, as a fraction of the optimizer's; null: it stays"),
    ] = None


class OneCycle:
    """One rise and one fall of the rate, momentum against it."""

    info = PluginInfo(name="one_cycle", kind=Kind.SCHEDULE, config=OneCycleConfig)

    def __init__(self, config: OneCycleConfig) -> None:
        self.config = config

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """The length must be known before the first step."""
        check_length("one_cycle", self.config.total_steps, 1, run)

    @hookimpl
    def compute_schedule_factors(self, run: Run, step: Step) -> ScheduleFactors:
        """The factors of this step."""
        config = self.config
        total = config.total_steps or run.total_steps
        assert total is not None, "checked at the run's start"
        factor, height = learning_rate_curves.one_cycle(
            step.number - 1,
            max(1, total - 1),
            config.rise_fraction,
            (config.start, config.end),
            straight=config.form == "linear",
        )
        if config.lowest_momentum is None:
            return ScheduleFactors(factor)
        return ScheduleFactors(factor, 1.0 - (1.0 - config.lowest_momentum) * height)
