"""Validate by the step or by the clock, as often as a fraction of the time allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from msgspec import Meta

from forge_kernel.api import Batch, Kind, Metric, MetricInfo, PluginInfo, Run, Step, hookimpl
from forge_plugins.mathematics.optimizers.time_budget import affordable

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RealTimeValidationConfig:
    """When a validation is due, and how much of the time all of them may take."""

    renamed: ClassVar[Mapping[str, str]] = {"time_share": "time_fraction"}

    every_steps: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="optimizer steps between validations; null: not by steps"),
    ] = None
    every_seconds: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="seconds between validations; null: not by the clock"),
    ] = 60.0
    time_fraction: Annotated[
        float,
        Meta(gt=0, le=1, description="largest share of the run's time that validations may take: "
             "one that is due waits until there is time for it; 1: none waits"),
    ] = 0.1  # fmt: skip

    def __post_init__(self) -> None:
        if self.every_steps is None and self.every_seconds is None:
            raise ValueError("every_steps and every_seconds are both null: nothing is ever due")


class Stopwatch:
    """A metric that measures nothing but when a pass begins."""

    def __init__(self) -> None:
        self.begun: float | None = None

    def reset(self) -> None:
        """A pass begins."""
        self.begun = monotonic()

    def update(self, batch: Batch, outputs: Any, loss: Tensor, weight: float | Tensor) -> None:
        """Nothing."""

    def compute(self, add: Callable[[Tensor], Tensor]) -> Mapping[str, float]:
        """No metric."""
        del add
        return {}


class RealTimeValidation:
    """Validates by the step or by the clock, as often as a fraction of the time allows.

    Asks for validations beside `run.validate_every`, whose passes are in the time too.

    Each pass is of the whole set, so that metrics stay comparable; what the time does not allow
    comes later or not at all. Patience is the business of `early_stopping`, which stands beside it.
    The log has `validation_time_share`.
    """

    info = PluginInfo(
        name="real_time_validation",
        kind=Kind.CALLBACKS,
        config=RealTimeValidationConfig,
        hears_unfinished=True,  # of how long they take
        metrics=(
            MetricInfo(
                "validation_time_share",
                "share",
                digits=3,
                title="Time for validation, share",
                section="Throughput",
            ),
        ),
    )

    def __init__(self, config: RealTimeValidationConfig) -> None:
        self.config = config
        self._watch = Stopwatch()
        self._begun = self._last = 0.0
        self._spent = self._cost = 0.0
        self._due = False
        self._waits = False

    @hookimpl
    def make_metrics(self, run: Run) -> Sequence[Metric]:
        """The stopwatch."""
        del run
        return [self._watch]

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """The clock begins; a resumed run's anew."""
        del run
        self._begun = self._last = monotonic()

    @hookimpl
    def on_step_end(self, run: Run, step: Step) -> None:
        """Ask for a validation when one is due and there is time for it; all ranks alike."""
        config, now = self.config, monotonic()
        if config.every_steps is not None and step.number % config.every_steps == 0:
            self._due = True
        if config.every_seconds is not None and now - self._last >= config.every_seconds:
            self._due = True
        fits = self._due and affordable(
            self._spent, self._cost, now - self._begun, config.time_fraction
        )
        if run.strategy.decide(int(fits)):
            self._due = self._waits = False
            self._last = now
            run.request("validate")
        elif self._due and not self._waits:
            self._waits = True
            share = self._spent / (now - self._begun)
            message = (
                f"A validation is due and waits: validations took {share:.1%} of the time, and "
                f"{config.time_fraction:.1%} are allowed."
            )
            run.emit_event("validation_waits", message, share=share, allowed=config.time_fraction)

    @hookimpl
    def on_validation(self, run: Run, metrics: Mapping[str, float]) -> None:
        """A pass is over, whoever asked for it."""
        del run, metrics
        assert self._watch.begun is not None
        self._cost = monotonic() - self._watch.begun
        self._spent += self._cost

    @hookimpl
    def log_metrics(self, run: Run, step: Step) -> Mapping[str, float | None]:
        """What validations took of the time."""
        del run, step
        elapsed = monotonic() - self._begun
        return {"validation_time_share": self._spent / elapsed if elapsed > 0 else None}
