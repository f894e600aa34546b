"""The metrics of the log as a table that any spreadsheet opens."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO

from msgspec import Meta

from forge_kernel.api import Kind, LogRecord, PluginInfo, Run, RunResult, hookimpl


@dataclass(frozen=True, kw_only=True)
class AcmeCsvConfig:
    """Which metrics, and where."""

    file: Annotated[
        str,
        Meta(
            pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*\.csv$",
            description="name of the file in the run folder",
        ),
    ] = "metrics.csv"
    metrics: Annotated[
        tuple[str, ...], Meta(min_length=1, description="columns beside step and epoch")
    ] = ("loss", "learning_rate")


class AcmeCsv:
    """A row for each log interval; a metric that was not measured leaves its cell empty.

    A checkpoint keeps the length of the file: a resumed run cuts off what was written after it, so
    that the file is that of an uninterrupted run.
    """

    info = PluginInfo(name="acme_csv", kind=Kind.OBSERVERS, config=AcmeCsvConfig)

    def __init__(self, config: AcmeCsvConfig) -> None:
        self.config = config
        self._stream: TextIO | None = None
        self._length = 0

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Open the file where the state stands; a new one begins with the names of its columns."""
        if run.folder is None:
            return
        file = run.folder / self.config.file
        file.touch()
        os.truncate(file, min(self._length, file.stat().st_size))
        self._stream = file.open("a", encoding="utf-8", newline="")
        if self._length == 0:
            self._write(["step", "epoch", *self.config.metrics])

    def _write(self, cells: list[Any]) -> None:
        if self._stream is None:
            return
        csv.writer(self._stream, lineterminator="\n").writerow(cells)
        self._stream.flush()
        self._length = self._stream.tell()

    @hookimpl
    def on_log(self, record: LogRecord) -> None:
        """One row."""
        named = [record.metrics.get(name) for name in self.config.metrics]
        self._write([record.step, record.epoch, *named])

    @hookimpl
    def on_checkpoint(self, folder: Path) -> None:
        """The state in the checkpoint counts on these bytes being on the disk."""
        del folder
        if self._stream is not None:
            os.fsync(self._stream.fileno())

    @hookimpl
    def on_run_end(self, result: RunResult) -> None:
        """Close the file."""
        del result
        self._close()

    @hookimpl
    def on_error(self, error: BaseException) -> None:
        """Close the file."""
        del error
        self._close()

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def state_dict(self) -> dict[str, Any]:
        """The length of the file in bytes."""
        return {"length": self._length}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Where a resumed run goes on writing; within a run, what was written stays."""
        if self._stream is None:
            self._length = int(state["length"])
