"""Schedules over a length: warm-up, then one curve down to a floor at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from forge_kernel.api import LazyModule, PluginError, Run, ScheduleFactors, Step, hookimpl

if TYPE_CHECKING:
    from forge_plugins.mathematics.optimizers import learning_rate_curves
else:
    learning_rate_curves = LazyModule("forge_plugins.mathematics.optimizers.learning_rate_curves")


@dataclass(frozen=True, kw_only=True)
class SpanConfig:
    """Lengths and floor."""

    warmup_steps: Annotated[int, Meta(ge=0, description="optimizer steps of the rise")] = 10
    total_steps: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="step at which the floor is reached; null: the run's last"),
    ] = None
    floor: Annotated[
        float, Meta(ge=0, le=1, description="lowest rate, as a fraction of the configured one")
    ] = 0.0

    def __post_init__(self) -> None:
        if self.total_steps is not None and self.total_steps <= self.warmup_steps:
            raise ValueError(
                f"total_steps {self.total_steps} is not beyond warmup_steps {self.warmup_steps}"
            )


def check_length(name: str, total_steps: int | None, warmup_steps: int, run: Run) -> None:
    """The schedule's last step must be known; a run that ends within the warm-up is told.

    So is a resumed run of another length than before, over which the curve is laid anew.

    Raises:
        PluginError: it is not known.
    """
    total = total_steps or run.total_steps
    if total is None:
        raise PluginError(
            f"{name}: the run's length in steps is not known (max_seconds, or data of unknown "
            "length): set schedule.with.total_steps"
        )
    before = run.total_steps_before
    if total_steps is None and before not in (None, total):
        run.emit_event(
            "length_changed",
            f"The run's length is {total} steps now and was {before}: {name} goes on at another "
            "place of its curve, so the learning rate jumps.",
            before=before,
            total_steps=total,
        )
    if total <= warmup_steps:
        run.emit_event(
            "warmup_not_over",
            f"The run's {total} steps end within the warm-up of {name} ({warmup_steps} steps): "
            "the full rate is not reached before its end.",
            warmup_steps=warmup_steps,
            total_steps=total,
        )


class SpanSchedule:
    """Warm-up, then `curve`; follows the whole run's length unless told another."""

    info: Any
    config: SpanConfig

    def __init__(self, config: SpanConfig) -> None:
        self.config = config

    def curve(self, position: int, span: int) -> float:
        """The factor so many steps after the full rate was reached."""
        raise NotImplementedError

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """The length must be known before the first step."""
        check_length(self.info.name, self.config.total_steps, self.config.warmup_steps, run)

    @hookimpl
    def compute_schedule_factors(self, run: Run, step: Step) -> ScheduleFactors:
        """The factor of this step."""
        warmup_steps = self.config.warmup_steps
        if step.number < warmup_steps:
            return ScheduleFactors(learning_rate_curves.linear_warmup(step.number, warmup_steps))
        total = self.config.total_steps or run.total_steps
        assert total is not None, "checked at the run's start"
        position = learning_rate_curves.position_after(step.number, warmup_steps)
        return ScheduleFactors(
            self.curve(position, max(1, learning_rate_curves.position_after(total, warmup_steps)))
        )
