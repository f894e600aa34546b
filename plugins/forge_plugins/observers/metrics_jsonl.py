"""Every metric of the run, one JSON line at a time."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from forge_kernel.api import Event, Kind, LogRecord, PluginInfo, Run, hookimpl
from forge_plugins.observers.jsonl_writer import JsonlWriter


@dataclass(frozen=True, kw_only=True)
class MetricsJsonlConfig:
    """No settings: the file is `metrics.jsonl` in the run folder."""


def _plain(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """The metrics as strict JSON has them: not finite is null."""
    return {
        name: value if value is not None and math.isfinite(value) else None
        for name, value in metrics.items()
    }


class MetricsJsonl(JsonlWriter):
    """Every metric of the run, one JSON line at a time.

    A line for each log interval, each validation, and each event: phases, what plugins told.
    """

    info = PluginInfo(
        name="metrics_jsonl",
        kind=Kind.OBSERVERS,
        config=MetricsJsonlConfig,
        provides=("file:metrics.jsonl",),
    )

    def __init__(self, config: MetricsJsonlConfig) -> None:
        super().__init__()
        self.config = config

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Open the file at the place where the state stands."""
        if run.folder is not None:
            self._file.begin(run.folder / "metrics.jsonl")

    def _write(self, run: Run, kind: str, when: float, what: Mapping[str, Any]) -> None:
        line = {
            "step": run.progress.step,
            "time": round(when, 3),
            "kind": kind,
            "epoch": run.progress.epoch,
            **what,
        }
        self._file.write(json.dumps(line, allow_nan=False))

    @hookimpl
    def on_log(self, run: Run, record: LogRecord) -> None:
        """The metrics of training."""
        self._write(run, "log", record.time, _plain(record.metrics))

    @hookimpl
    def on_validation(self, run: Run, metrics: Mapping[str, float]) -> None:
        """The metrics of a validation."""
        self._write(run, "validation", time.time(), _plain(metrics))

    @hookimpl
    def on_phase_change(self, run: Run, before: str | None, after: str | None) -> None:
        """A phase begins with the next step."""
        message = f"The phase {after} begins." if after else f"The phase {before} is over."
        told = {"event": "phase", "message": message, "facts": {"before": before, "after": after}}
        self._write(run, "event", time.time(), told)

    @hookimpl
    def on_event(self, run: Run, event: Event) -> None:
        """What a plugin told."""
        facts = {"event": event.name, "message": event.message, "facts": dict(event.facts)}
        self._write(run, "event", time.time(), facts)
