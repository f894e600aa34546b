"""Every figure of the run as a table for spreadsheets and data frames."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from forge_kernel.api import Kind, LogRecord, PluginInfo, Run, RunResult, hookimpl
from forge_plugins.observers.line_file import LineFile

COLUMNS: Final = ("step", "time", "epoch", "kind", "figure", "value")


@dataclass(frozen=True, kw_only=True)
class CsvFileConfig:
    """No settings: the file is `metrics.csv` in the run folder."""


class CsvFile:
    """Every figure of the run as a table for spreadsheets and data frames.

    A row for each figure of each log interval and validation; not measured is an empty cell.

    One row for each figure, since which figures there are is not known before the last of them. A
    checkpoint keeps the number of rows, as for `metrics_jsonl`.
    """

    info = PluginInfo(name="csv", kind=Kind.OBSERVERS, config=CsvFileConfig)

    def __init__(self, config: CsvFileConfig) -> None:
        self.config = config
        self._file = LineFile()

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

    def _rows(self, run: Run, kind: str, when: float, figures: Mapping[str, float | None]) -> None:
        progress = run.progress
        for name, value in figures.items():
            shown = "" if value is None or not math.isfinite(value) else repr(float(value))
            self._row((progress.step, f"{when:.3f}", progress.epoch, kind, name, shown))

    @hookimpl
    def on_log(self, run: Run, record: LogRecord) -> None:
        """The figures of training."""
        self._rows(run, "log", record.time, record.figures)

    @hookimpl
    def on_validation(self, run: Run, figures: Mapping[str, float]) -> None:
        """The figures of a validation."""
        self._rows(run, "validation", time.time(), figures)

    @hookimpl
    def on_checkpoint(self, run: Run, folder: Path) -> None:
        """The state in the checkpoint counts on these rows being on the disk."""
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
        if not self._file.open:  # in mid-run, a rollback keeps the rows that led to it
            self._file.lines = int(state["lines"])
