"""Every figure of the run, one JSON line at a time."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from forge_kernel.api import Event, Kind, LogRecord, PluginInfo, Run, RunResult, hookimpl


@dataclass(frozen=True, kw_only=True)
class MetricsJsonlConfig:
    """No settings: the file is `metrics.jsonl` in the run folder."""


def _plain(figures: Mapping[str, float | None]) -> dict[str, float | None]:
    """The figures as strict JSON has them: not finite is null."""
    return {
        name: value if value is not None and math.isfinite(value) else None
        for name, value in figures.items()
    }


def _keep_lines(file: Path, count: int) -> None:
    """Cut a file after its first `count` lines; a torn last line goes too."""
    end = 0
    with file.open("rb") as stream:
        for _, line in zip(range(count), stream, strict=False):
            if not line.endswith(b"\n"):
                break
            end += len(line)
    os.truncate(file, end)


class MetricsJsonl:
    """A line for each log interval and each validation.

    A checkpoint keeps the number of lines: a resumed run cuts off what was written after them, so
    that the file is that of an uninterrupted run.
    """

    info = PluginInfo(name="metrics_jsonl", kind=Kind.OBSERVERS, config=MetricsJsonlConfig)

    def __init__(self, config: MetricsJsonlConfig) -> None:
        self.config = config
        self._stream: TextIO | None = None
        self._lines = 0

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Open the file at the place where the state stands."""
        if run.folder is None:
            return
        file = run.folder / "metrics.jsonl"
        file.touch()
        _keep_lines(file, self._lines)
        self._stream = file.open("a", encoding="utf-8")

    def _write(self, run: Run, kind: str, when: float, what: Mapping[str, Any]) -> None:
        if self._stream is None:
            return
        line = {
            "step": run.progress.step,
            "time": round(when, 3),
            "kind": kind,
            "epoch": run.progress.epoch,
            **what,
        }
        self._stream.write(json.dumps(line, allow_nan=False) + "\n")
        self._stream.flush()
        self._lines += 1

    @hookimpl
    def on_log(self, run: Run, record: LogRecord) -> None:
        """The figures of training."""
        self._write(run, "log", record.time, _plain(record.figures))

    @hookimpl
    def on_validation(self, run: Run, figures: Mapping[str, float]) -> None:
        """The figures of a validation."""
        self._write(run, "validation", time.time(), _plain(figures))

    @hookimpl
    def on_event(self, run: Run, event: Event) -> None:
        """What a plugin told."""
        told = {"event": event.name, "message": event.message, "facts": dict(event.facts)}
        self._write(run, "event", time.time(), told)

    @hookimpl
    def on_checkpoint(self, run: Run, folder: Path) -> None:
        """The state in the checkpoint counts on these bytes being on the disk."""
        del run, folder
        if self._stream is not None:
            os.fsync(self._stream.fileno())

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    @hookimpl
    def on_run_end(self, run: Run, result: RunResult) -> None:
        """Close the file."""
        del run, result
        self._close()

    @hookimpl
    def on_error(self, run: Run, error: BaseException) -> None:
        """Close the file."""
        del run, error
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """The number of lines in the file."""
        return {"lines": self._lines}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Where a resumed run goes on writing."""
        if self._stream is None:  # in mid-run, a rollback keeps the lines that led to it
            self._lines = int(state["lines"])
