"""Several schedules, one after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol, cast

from msgspec import Meta

from forge_kernel.api import (
    Kind,
    PluginError,
    PluginInfo,
    Run,
    ScheduleFactors,
    Step,
    UseSchedule,
    hookimpl,
)
from forge_plugins.schedules.scaling import scaled


class Schedule(Protocol):
    """What a nested plugin is asked for."""

    def compute_schedule_factors(self, run: Run, step: Step) -> ScheduleFactors:
        """Factors of the configured rates."""
        ...


@dataclass(frozen=True, kw_only=True)
class Until:
    """When a schedule gives way to the next: exactly one of step, metric and phase."""

    step: Annotated[
        Annotated[int, Meta(ge=1)] | None, Meta(description="after this optimizer step")
    ] = None
    metric: Annotated[
        Annotated[str, Meta(min_length=1)] | None,
        Meta(description="when this validation metric passes the threshold"),
    ] = None
    threshold: Annotated[float | None, Meta(description="of the metric")] = None
    mode: Annotated[
        Literal["max", "min"],
        Meta(description="whether the metric rises or falls to it"),
    ] = "min"
    phase: Annotated[
        Annotated[str, Meta(min_length=1)] | None, Meta(description="when this phase begins")
    ] = None

    def __post_init__(self) -> None:
        given = [name for name in ("step", "metric", "phase") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"until needs exactly one of step, metric, phase; it has {given}")
        if (self.metric is None) != (self.threshold is None):
            raise ValueError("until: metric and threshold go together")


@dataclass(frozen=True, kw_only=True)
class CompositeConfig:
    """The schedules in order, and when each gives way."""

    schedules: Annotated[
        tuple[UseSchedule[Schedule], ...], Meta(min_length=1, description="the schedules, in order")
    ] = field(default_factory=lambda: (UseSchedule("linear_warmup"), UseSchedule("constant")))
    until: Annotated[
        tuple[Until, ...], Meta(description="the end of each schedule but the last")
    ] = field(default_factory=lambda: (Until(step=10),))
    clock: Annotated[
        Literal["run", "switch"],
        Meta(description="whether a schedule counts steps from the run's start or its own"),
    ] = "run"
    join: Annotated[
        Literal["scale", "jump"],
        Meta(
            description="scale: a new schedule is scaled to begin at the rate that the last had, "
            "unless that was 0; jump: it begins at its own"
        ),
    ] = "scale"

    def __post_init__(self) -> None:
        if len(self.until) != len(self.schedules) - 1:
            raise ValueError(
                f"{len(self.schedules)} schedules need {len(self.schedules) - 1} entries of "
                f"until, not {len(self.until)}"
            )
        steps = [end.step for end in self.until if end.step is not None]
        if steps != sorted(set(steps)):
            raise ValueError(f"the steps of until must rise: {steps}")


def _needs(config: CompositeConfig) -> tuple[str, ...]:
    metrics = [f"metric:{end.metric}" for end in config.until if end.metric is not None]
    return (*metrics, *(f"phase:{end.phase}" for end in config.until if end.phase is not None))


def _first(rates: ScheduleFactors) -> float:
    rate = rates.learning_rate
    return rate[0] if isinstance(rate, tuple) else rate


class Composite:
    """Several schedules, one after the other.

    One schedule at a time has the rate; the others are not asked.
    """

    info = PluginInfo(name="composite", kind=Kind.SCHEDULE, config=CompositeConfig, requires=_needs)

    def __init__(self, config: CompositeConfig) -> None:
        self.config = config
        self._active = 0
        self._began = 0  # last step of the schedule before
        self._scale = 1.0
        self._last: float | None = None  # factor of the step before
        self._due = False  # a metric or a phase said that the active one is over
        self._joining = False  # the next step is the active one's first

    def _end(self) -> Until | None:
        return self.config.until[self._active] if self._active < len(self.config.until) else None

    @hookimpl
    def on_validation(self, run: Run, metrics: Mapping[str, float]) -> None:
        """A metric may end the active schedule."""
        del run
        end = self._end()
        if end is None or end.metric is None or end.metric not in metrics:
            return
        assert end.threshold is not None, "checked with the settings"
        value = metrics[end.metric]
        self._due |= value >= end.threshold if end.mode == "max" else value <= end.threshold

    @hookimpl
    def on_phase_change(self, run: Run, before: str | None, after: str | None) -> None:
        """A phase may end the active schedule."""
        del run, before
        end = self._end()
        self._due |= end is not None and end.phase is not None and end.phase == after

    def _move_on(self, run: Run, step: Step) -> None:
        while (end := self._end()) is not None:
            if not (self._due or (end.step is not None and step.number > end.step)):
                return
            self._active, self._began = self._active + 1, step.number - 1
            self._due, self._joining, self._scale = False, True, 1.0
            name = type(self.config.schedules[self._active]).__name__
            run.emit_event(
                "schedule", f"The schedule {name} takes over.", schedule=name, number=self._active
            )

    @hookimpl
    def compute_schedule_factors(self, run: Run, step: Step) -> ScheduleFactors:
        """The factors that the active schedule gives."""
        self._move_on(run, step)
        active = cast(Schedule, self.config.schedules[self._active])
        asked = step
        if self.config.clock == "switch":
            asked = dataclasses.replace(step, number=step.number - self._began)
        result = active.compute_schedule_factors(run, asked)
        if self._joining and self.config.join == "scale" and self._last:  # 0 has no scale
            if _first(result) == 0.0:
                raise PluginError(
                    f"composite: schedules[{self._active}] begins at 0, which cannot be scaled to "
                    f"the rate before ({self._last:g}): set join: jump, or clock: switch"
                )
            self._scale = self._last / _first(result)
        self._joining = False
        result = scaled(result, self._scale) if self._scale != 1.0 else result
        self._last = _first(result)
        return result

    def state_dict(self) -> dict[str, Any]:
        """Which schedule is active, since when and at what scale."""
        return {
            "active": self._active,
            "began": self._began,
            "scale": self._scale,
            "last": self._last,
            "due": self._due,
            "joining": self._joining,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the active schedule."""
        self._active, self._began = int(state["active"]), int(state["began"])
        self._scale, self._last = float(state["scale"]), state["last"]
        self._due, self._joining = bool(state["due"]), bool(state["joining"])
