"""Metrics and events for TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final

from msgspec import Meta

from forge_kernel.api import (
    Event,
    Kind,
    LogRecord,
    PluginInfo,
    Run,
    RunResult,
    hookimpl,
)
from forge_plugins.observers.logger_names import LoggerNames, encodable

INSTALL: Final = "pip install 'forge-kernel[sinks]'"


@dataclass(frozen=True, kw_only=True)
class TensorBoardConfig:
    """How soon TensorBoard sees what was written."""

    flush_seconds: Annotated[
        int, Meta(ge=1, le=3600, description="seconds after which what was written is on the disk")
    ] = 10


class TensorBoard:
    """Metrics and events for TensorBoard.

    Writes `tensorboard/` in the run folder; look at it with `tensorboard --logdir RUN_DIR`.

    A resumed run lets TensorBoard forget the steps after its checkpoint. A metric that was not
    measured has no point.
    """

    info = PluginInfo(
        name="tensorboard",
        kind=Kind.OBSERVERS,
        config=TensorBoardConfig,
        packages={"tensorboard": INSTALL},
    )

    def __init__(self, config: TensorBoardConfig) -> None:
        self.config = config
        self._names = LoggerNames("TensorBoard")
        self._writer: Any = None

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Begin a file of events."""
        if run.folder is None:
            return
        from torch.utils.tensorboard.writer import SummaryWriter

        step = run.progress.step
        self._writer = SummaryWriter(
            str(run.folder / "tensorboard"),
            purge_step=step + 1 if step else None,
            flush_secs=self.config.flush_seconds,
        )

    def _write(self, run: Run, kind: str, step: int, metrics: Mapping[str, float | None]) -> None:
        if self._writer is None:
            return
        for name, value in metrics.items():
            if value is not None and math.isfinite(value):
                self._writer.add_scalar(f"{kind}/{self._names.of(run, name)}", value, step)

    @hookimpl
    def on_log(self, run: Run, record: LogRecord) -> None:
        """The metrics of training."""
        self._write(run, "training", record.step, record.metrics)

    @hookimpl
    def on_validation(self, run: Run, metrics: Mapping[str, float]) -> None:
        """The metrics of a validation."""
        self._write(run, "validation", run.progress.step, metrics)

    @hookimpl
    def on_event(self, run: Run, event: Event) -> None:
        """What a plugin told, as a text."""
        if self._writer is not None:
            name, text = self._names.of(run, event.name), encodable(event.message)
            self._writer.add_text(f"event/{name}", text, event.step)

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

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
