"""Progress on the screen: a bar on a terminal or in a notebook, JSON lines elsewhere."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from forge_kernel.api import (
    Event,
    Kind,
    LogRecord,
    PluginInfo,
    Run,
    RunResult,
    Step,
    hookimpl,
    without_secrets,
)
from forge_plugins.observers import notebook_view

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from forge_plugins.observers.notebook_view import NotebookView

MOST_NOTES = 8
"""Of what plugins told, the last so many stand in a notebook."""


@dataclass(frozen=True, kw_only=True)
class ProgressBarConfig:
    """How often the bar is drawn."""

    refresh_seconds: Annotated[
        float, Meta(ge=0.05, description="seconds between drawings of the bar")
    ] = 0.5


def _bar() -> Progress:
    """A line with the clocks and, below it, one with the metrics: both fit 80 columns."""
    from rich.console import Console, RenderableType
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class TwoLines(Progress):
        """A progress whose metrics stand below the bar."""

        def get_renderables(self) -> Iterable[RenderableType]:
            """The line of the bar, and that of the metrics."""
            yield self.make_tasks_table(self.tasks)
            for task in self.tasks:
                if task.fields["metrics"]:
                    yield Text(task.fields["metrics"], no_wrap=True, overflow="ellipsis")

    return TwoLines(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("gone"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=Console(stderr=True),
        redirect_stdout=False,  # the process's streams stay as they are
        redirect_stderr=False,
        auto_refresh=False,  # no thread: drawn from the step's end, when it is time
    )


class ProgressBar:
    """Progress on the screen: a bar on a terminal, one JSON line per event elsewhere.

    In a notebook the bar, the metrics and the falling loss stand below the cell. Else it writes to
    standard error, so that standard output stays clean for programs.
    """

    info = PluginInfo(name="progress_bar", kind=Kind.OBSERVERS, config=ProgressBarConfig)

    def __init__(self, config: ProgressBarConfig) -> None:
        self.config = config
        self._bar: Progress | None = None
        self._view: NotebookView | None = None
        self._notes: list[str] = []
        self._task: TaskID | None = None
        self._due = math.inf
        self._first = 0, 0.0
        """The step at which this process took the run up, and when."""
        self._texts: dict[str, str] = {}

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Draw the bar, or say that the run starts."""
        if run.quiet:
            return
        self._first = run.progress.step, time.monotonic()
        if notebook_view.in_notebook():
            self._view = notebook_view.NotebookView(run.settings.name, run.total_steps)
            self._draw(run)
            return
        if not sys.stderr.isatty():
            self._line(run, "start", total_steps=run.total_steps, folder=str(run.folder))
            return
        self._bar = _bar()
        self._task = self._bar.add_task(
            run.settings.name, total=run.total_steps, completed=run.progress.step, metrics="",
            rate="",
        )  # fmt: skip
        self._bar.start()
        self._due = 0.0

    @staticmethod
    def _line(run: Run, event: str, **facts: Any) -> None:
        if run.quiet:
            return
        record = {"event": event, "step": run.progress.step, **facts}
        print(json.dumps(record), file=sys.stderr, flush=True)

    def _draw(self, run: Run) -> None:
        now = time.monotonic()
        self._due = now + self.config.refresh_seconds
        done, steps, seconds = (
            run.progress.step,
            run.progress.step - self._first[0],
            now - self._first[1],
        )
        rate = f"{steps / seconds:.3g} steps/s" if steps > 0 and seconds > 0 else ""
        metrics = "  ".join(self._texts.values())
        if self._view is not None:
            clock = ", ".join(part for part in (f"{seconds:.0f} s gone", rate) if part)
            self._view.draw(done, clock, metrics, notes=self._notes)
            return
        assert self._bar is not None
        assert self._task is not None
        self._bar.update(self._task, completed=done, metrics=metrics, rate=rate)
        self._bar.refresh()

    @hookimpl
    def on_step_end(self, run: Run, step: Step) -> None:
        """Draw when it is time; without a bar nothing happens here."""
        del step
        if time.monotonic() >= self._due:
            self._draw(run)

    @hookimpl
    def on_log(self, run: Run, record: LogRecord) -> None:
        """The loss beside the bar, or a line."""
        loss = record.metrics.get("loss")
        if self._drawn is None:
            self._line(run, "log", metrics=dict(record.metrics))
        elif loss is not None:
            if self._view is not None:
                self._view.loss.add(run.progress.step, loss)
            self._texts["loss"] = f"loss {run.metrics.infos.of('loss').number(loss)}"

    @hookimpl
    def on_validation(self, run: Run, metrics: Mapping[str, float]) -> None:
        """The validation's metrics beside the bar, or a line."""
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        if self._drawn is None:
            self._line(run, "validation", metrics=finite)
            return
        infos = run.metrics.infos
        shown = "  ".join(f"{name} {infos.of(name).number(v)}" for name, v in metrics.items())
        self._texts["validation"] = f"validation: {shown}"
        self._draw(run)

    @hookimpl
    def on_event(self, run: Run, event: Event) -> None:
        """What a plugin told: a line above the bar, or one for programs."""
        if self._view is not None:
            self._notes = [*self._notes, f"step {event.step}: {event.message}"][-MOST_NOTES:]
        elif self._bar is None:
            self._line(run, event.name, message=event.message, facts=dict(event.facts))
        else:
            self._bar.console.print(f"step {event.step}: {event.message}", markup=False)

    @hookimpl
    def on_checkpoint(self, run: Run, folder: Path) -> None:
        """A line for programs."""
        if self._drawn is None:
            self._line(run, "checkpoint", folder=str(folder))

    @hookimpl
    def on_run_end(self, run: Run, result: RunResult) -> None:
        """Leave the bar as it stands."""
        if self._drawn is None:
            self._line(run, "end", outcome=result.outcome, reason=result.stop_reason)
            return
        self._draw(run)
        self._give_back()

    @hookimpl
    def on_error(self, run: Run, error: BaseException) -> None:
        """Give the terminal back."""
        if self._drawn is None:
            self._line(run, "error", error=without_secrets(f"{type(error).__name__}: {error}"))
        self._give_back()

    @property
    def _drawn(self) -> Progress | NotebookView | None:
        """What is drawn on; None: lines are written."""
        return self._bar or self._view

    def _give_back(self) -> None:
        """Draw no more."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._view = None
        self._due = math.inf
