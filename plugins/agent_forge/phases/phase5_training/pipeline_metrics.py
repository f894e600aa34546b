"""What a pipeline is at, and what it has measured, in plain values."""

from __future__ import annotations

import copy
import enum
import time
from collections.abc import Mapping
from typing import Any


class PipelineState(enum.Enum):
    """Where a pipeline is."""

    INITIALIZING = "initializing"
    READY = "ready"
    TRAINING = "training"
    VALIDATING = "validating"
    PAUSED = "paused"
    COMPLETED = "completed"
    ERROR = "error"


class PipelinePhase(enum.Enum):
    """What a pipeline is at."""

    SETUP = "setup"
    DATA_LOADING = "data_loading"
    MODEL_PREPARATION = "model_preparation"
    TRAINING = "training"
    VALIDATION = "validation"
    COMPLETION = "completion"


class PipelineMetrics:
    """Durations, events and the metrics of a pipeline, in plain values."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._open: dict[str, float] = {}
        self._durations: dict[str, float] = {}
        self._events = 0
        self._metrics: dict[str, dict[str, dict[str, Any]]] = {"training": {}, "validation": {}}

    def start_phase(self, phase: PipelinePhase) -> None:
        """A phase begins."""
        self._events += 1
        self._open[phase.value] = time.monotonic()

    def end_phase(self, phase: PipelinePhase) -> None:
        """A phase is over; durations of the same phase add up."""
        begun = self._open.pop(phase.value, None)
        if begun is not None:
            passed = time.monotonic() - begun
            self._durations[phase.value] = self._durations.get(phase.value, 0.0) + passed

    def record_event(self) -> None:
        """Something was told."""
        self._events += 1

    def _record(self, kind: str, metrics: Mapping[str, Any]) -> None:
        known = self._metrics[kind]
        for name, value in metrics.items():
            entry = known.setdefault(name, {"latest": None, "count": 0})
            entry["latest"] = value
            entry["count"] += value is not None

    def record_training_metrics(self, metrics: Mapping[str, float | None]) -> None:
        """Metrics of a log interval."""
        self._record("training", metrics)

    def record_validation_metrics(self, metrics: Mapping[str, float | None]) -> None:
        """Metrics of a validation."""
        self._record("validation", metrics)

    def get_summary(self) -> dict[str, Any]:
        """All of it; `training_summary` and `validation_summary` have, for each metric, the latest
        value and how many there were.
        """
        return {
            "total_time": time.monotonic() - self._begun,
            "phase_durations": dict(self._durations),
            "total_events": self._events,
            "training_summary": copy.deepcopy(self._metrics["training"]),
            "validation_summary": copy.deepcopy(self._metrics["validation"]),
        }
