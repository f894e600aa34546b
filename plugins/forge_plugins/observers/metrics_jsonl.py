"""Every figure of the run, one JSON line at a time."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge_kernel.api import Event, Kind, LogRecord, PluginInfo, Run, RunResult, hookimpl
from forge_plugins.observers.line_file import LineFile


@dataclass(frozen=True, kw_only=True)
class MetricsJsonlConfig:
    """No settings: the file is `metrics.jsonl` in the run folder."""


def _plain(figures: Mapping[str, float | None]) -> dict[str, float | None]:
    """The figures as strict JSON has them: not finite is null."""
    return {
        name: value if value is not None and math.isfinite(value) else None
        for name, value in figures.items()
    }


class MetricsJsonl:
    """Every figure of the run, one JSON line at a time.

    A line for each log interval, each validation, and each event: phases, what plugins told.

    A checkpoint keeps the number of lines: a resumed run cuts off what was written after them, so
    that the file is that of an uninterrupted run.
    """

    info = PluginInfo(
        name="metrics_jsonl",
        kind=Kind.OBSERVERS,
        config=MetricsJsonlConfig,
        provides=("file:metrics.jsonl",),
    )

    def __init__(self, config: MetricsJsonlConfig) -> None:
        self.config = config
        self._file = LineFile()

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
        """The figures of training."""
        self._write(run, "log", record.time, _plain(record.figures))

    @hookimpl
    def on_validation(self, run: Run, figures: Mapping[str, float]) -> None:
        """The figures of a validation."""
        self._write(run, "validation", time.time(), _plain(figures))

    @hookimpl
    def on_phase_change(self, run: Run, before: str | None, after: str | None) -> None:
        """A phase begins with the next step."""
        message = f"The phase {after} begins." if after else f"The phase {before} is over."
        told = {"event": "phase", "message": message, "facts": {"before": before, "after": after}}
        self._write(run, "event", time.time(), told)

    @hookimpl
    def on_event(self, run: Run, event: Event) -> None:
        """What a plugin told."""
        told = {"event": event.name, "message": event.message, "facts": dict(event.facts)}
        self._write(run, "event", time.time(), told)

    @hookimpl
    def on_checkpoint(self, run: Run, folder: Path) -> None:
        """The state in the checkpoint counts on these bytes being on the disk."""
        del run, folder
        self._file.sync()

    @hookimpl
    def on_run_end(self, run: Run, result: RunResult) -> None:
        """Close the file."""
        del run, result
        self._file.close()

    @hookimpl
    def on_error(self, run: Run, error: BaseException) -> None:
        """Close the file."""
        del run, error
        self._file.close()

    def state_dict(self) -> dict[str, Any]:
        """The number of lines in the file."""
        return {"lines": self._file.lines}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Where a resumed run goes on writing."""
        if not self._file.open:  # in mid-run, a rollback keeps the lines that led to it
            self._file.lines = int(state["lines"])
