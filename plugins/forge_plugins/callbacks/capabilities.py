"""Which capabilities a run has acquired, lost and kept, by its validation metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from msgspec import Meta

from forge_kernel.api import Kind, MetricInfo, PluginInfo, Run, Step, hookimpl
from forge_plugins.callbacks.improvement import Improvement
from forge_plugins.callbacks.watched_metric import Mode, NotBefore


@dataclass(frozen=True, kw_only=True)
class Capability:
    """When a capability counts as acquired."""

    metric: Annotated[str, Meta(min_length=1, description="name of a validation metric")]
    threshold: Annotated[float, Meta(description="value that the metric must reach")]
    mode: Mode = "max"
    duration: Annotated[
        int, Meta(ge=1, description="validations in a row that must hold the threshold")
    ] = 1

    def holds(self, value: float) -> bool:
        """Whether a value is at the threshold or beyond; NaN is not."""
        return value >= self.threshold if self.mode == "max" else value <= self.threshold


@dataclass(frozen=True, kw_only=True)
class CapabilitiesConfig:
    """The capabilities to watch."""

    renamed: ClassVar[Mapping[str, str]] = {"capabilities.*.figure": "metric"}

    capabilities: Annotated[
        dict[str, Capability],
        Meta(
            min_length=1,
            description="what to watch, by a name of yours",
        ),
    ] = field(default_factory=lambda: {"learned": Capability(metric="accuracy", threshold=0.95)})
    not_before: NotBefore = None


class Track:
    """What is known of one capability."""

    def __init__(self, capability: Capability) -> None:
        self.capability = capability
        self.held = 0  # validations in a row
        self.acquired_step: int | None = None
        self.latest: float | None = None
        self.best = Improvement(capability.mode)

    @property
    def retention(self) -> float | None:
        """Now against the best: 1 is all, less is lost; None where a ratio says nothing."""
        now, best = self.latest, self.best.best
        if now is None or best is None or now <= 0 or best <= 0:
            return None
        return now / best if self.capability.mode == "max" else best / now

    def take(self, value: float, step: int) -> str | None:
        """Take in a metric; `acquired` or `lost` when that is what has happened."""
        self.best.better(value)
        self.latest = value
        if not self.capability.holds(value):
            lost = self.acquired_step is not None
            self.held, self.acquired_step = 0, None
            return "lost" if lost else None
        self.held += 1
        if self.held < self.capability.duration or self.acquired_step is not None:
            return None
        self.acquired_step = step
        return "acquired"

    def state_dict(self) -> dict[str, Any]:
        """What is known, as plain values."""
        return {
            "held": self.held,
            "acquired_step": self.acquired_step,
            "latest": self.latest,
            "best": self.best.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what was known."""
        self.held, self.latest = int(state["held"]), state["latest"]
        self.acquired_step = state["acquired_step"]
        self.best.load_state_dict(state["best"])


def _metrics(config: CapabilitiesConfig) -> tuple[str, ...]:
    """The facts that the run must bring."""
    return tuple(dict.fromkeys(f"metric:{each.metric}" for each in config.capabilities.values()))


class Capabilities:
    """Which capabilities a run has acquired, lost and kept, by its validation metrics.

    Tells when a metric has held its threshold long enough, and when it falls back.

    Events: `capability_acquired`, `capability_lost` (at the first validation that does not hold).
    Metrics of the log lines: `retention/<name>`, the latest validation against the best one.
    """

    info = PluginInfo(
        name="capabilities",
        kind=Kind.CALLBACKS,
        config=CapabilitiesConfig,
        requires=_metrics,
        metrics=(MetricInfo("retention", "share", "max", section="Grokking"),),
    )

    def __init__(self, config: CapabilitiesConfig) -> None:
        self.config = config
        self._tracks = {name: Track(each) for name, each in config.capabilities.items()}

    @hookimpl
    def on_validation(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Compare each metric with its threshold."""
        step = run.progress.step
        if step < (self.config.not_before or 0):
            return
        for name, track in self._tracks.items():
            wanted = track.capability
            if wanted.metric not in metrics:
                continue
            value = metrics[wanted.metric]
            if not math.isfinite(value):  # nothing was measured: neither held nor lost
                track.latest = None
                continue
            change = track.take(value, step)
            if change is None:
                continue
            sign = {"max": ">=", "min": "<="}[wanted.mode]
            times = f", {track.held} validations in a row" if track.held > 1 else ""
            message = (
                f"The capability {name} is {change}: {wanted.metric} {value:.4g} "
                f"(threshold {sign} {wanted.threshold:g}{times})."
            )
            run.emit_event(
                f"capability_{change}",
                message,
                capability=name,
                metric=wanted.metric,
                value=track.latest,
                threshold=wanted.threshold,
                retention=track.retention,
            )

    @hookimpl
    def log_metrics(self, run: Run, step: Step) -> Mapping[str, float | None]:
        """How much of each capability is left."""
        del run, step
        return {f"retention/{name}": track.retention for name, track in self._tracks.items()}

    def state_dict(self) -> dict[str, Any]:
        """What is known of each capability."""
        return {name: track.state_dict() for name, track in self._tracks.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what was known; a capability that is new begins anew."""
        for name, track in self._tracks.items():
            if name in state:
                track.load_state_dict(state[name])
