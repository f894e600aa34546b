"""Every metric of the run as a table for spreadsheets and data frames."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from forge_kernel.api import Kind, LogRecord, PluginInfo, Run, hookimpl
from forge_plugins.observers.jsonl_writer import JsonlWriter
from forge_plugins.observers.logger_names import LoggerNames

COLUMNS: Final = ("step", "time", "epoch", "kind", "metric", "value")


@dataclass(frozen=True, kw_only=True)
class CsvFileConfig:
    """No settings: the file is `metrics.csv` in the run folder."""


class CsvFile(JsonlWriter):
    """Every metric of the run as a table for spreadsheets and data frames.

    A row for each metric of each log interval and validation; not measured is an empty cell.

    One row for each metric, since which metrics there are is not known before the last of them.
    """

    info = PluginInfo(name="csv", kind=Kind.OBSERVERS, config=CsvFileConfig)

    def __init__(self, config: CsvFileConfig) -> None:
        super().__init__()
        self.config = config
        self._names = LoggerNames("metrics.csv")

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Open the file at the place where the state stands."""
        if run.folder is None:
            return
        self._file.begin(run.folder / "metrics.csv")
        if not self._file.lines:
            self._row(COLUMNS)

    def _row(self, cells: tuple[Any, ...]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="").writerow(cells)
        self._file.write(text.getvalue())

    def _rows(self, run: Run, kind: str, when: float, metrics: Mapping[str, float | None]) -> None:
        progress = run.progress
        for name, value in metrics.items():
            shown = "" if value is None or not math.isfinite(value) else repr(float(value))
            self._row(
                (
                    progress.step,
                    f"{when:.3f}",
                    progress.epoch,
                    kind,
                    self._names.of(run, name),
                    shown,
                )
            )

    @hookimpl
    def on_log(self, run: Run, record: LogRecord) -> None:
        """The metrics of training."""
        self._rows(run, "log", record.time, record.metrics)

    @hookimpl
    def on_validation(self, run: Run, metrics: Mapping[str, float]) -> None:
        """The metrics of a validation."""
        self._rows(run, "validation", time.time(), metrics)
