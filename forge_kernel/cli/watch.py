"""`forge watch`: a run as it goes on, from another process."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from forge_kernel.cli.options import visible
from forge_kernel.errors import Ended

if TYPE_CHECKING:
    from rich.console import RenderableType

    from forge_kernel.run_folder.status import RunStatus

POLL_SECONDS: Final = 0.25
_SHOWN: Final = 12  # newest notices in the view
_EARLIER: Final = 20  # notices from before the watching that are printed as lines


def watch_command(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of a run.")],
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve it as a web page on this machine (127.0.0.1).")
    ] = False,
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port of the page; 0: a free one.")
    ] = 0,
) -> None:
    """Watch a run until it ends. Live in a terminal, as lines elsewhere, or as a page."""
    from rich.console import Console

    from forge_kernel.run_folder.status import read_status

    read_status(run_dir)
    try:
        if serve:
            result = _serve(run_dir, port)
        else:
            console = Console()
            result = _view(run_dir, console) if console.is_terminal else _lines(run_dir)
    except (KeyboardInterrupt, Ended):
        raise typer.Exit(130) from None  # the run itself goes on
    print(f"{run_dir}: {result.said}")
    if result.condition == "gone":
        raise typer.Exit(3)


def _serve(folder: Path, port: int) -> RunStatus:
    """Hand over to the page that a distribution brings."""
    from importlib.metadata import entry_points

    from forge_kernel.errors import PluginError

    pages = sorted(entry_points(group="forge_kernel.pages"), key=lambda entry: entry.name)
    if not pages:
        raise PluginError("no installed distribution brings a page (forge_kernel.pages)")
    result: RunStatus = pages[0].load()(folder, port)
    return result


def _lines(folder: Path) -> RunStatus:
    """A line for each notice and each new set of metrics, as they come."""
    from forge_kernel.run_folder.folder import LOG, RunFolder
    from forge_kernel.run_folder.log_text import metrics_text, notice_text
    from forge_kernel.run_folder.status import LogFollower, read_status

    follower, step, condition = LogFollower(folder / LOG), None, "running"
    earlier = _EARLIER
    over = False
    while not over:
        result = read_status(folder)  # first, so that what was written before its end is read
        notices = [notice_text(line) for line in follower.new()]
        for text in notices[-earlier:]:
            print(visible(text), flush=True)
        earlier = 10**9
        if result.data.get("metrics_step") != step:
            step = result.data.get("metrics_step")
            metrics = metrics_text(result.data.get("metrics"), RunFolder(folder).metric_infos())
            print(visible(f"step {step}: {metrics}"), flush=True)
        over = result.over
        if result.condition != condition and not over:
            condition = result.condition
            print(visible(f"{condition}: {result.said}"), flush=True)
        if not over:
            time.sleep(POLL_SECONDS)
    return result


def _view(folder: Path, console: Any) -> RunStatus:
    """One picture that is drawn anew until the run ends."""
    from rich.live import Live

    from forge_kernel.run_folder.folder import LOG
    from forge_kernel.run_folder.log_text import notice_text
    from forge_kernel.run_folder.status import LogFollower, read_status

    follower = LogFollower(folder / LOG)
    notices: list[str] = []
    pace = Pace()
    with Live(console=console, auto_refresh=False, redirect_stdout=False) as live:
        over = False
        while not over:
            result = read_status(folder)
            notices += [notice_text(line) for line in follower.new()]
            del notices[:-_SHOWN]
            pace.take(result.data)
            live.update(_picture(result, notices, pace), refresh=True)
            over = result.over
            if not over:
                time.sleep(POLL_SECONDS)
    return result


class Pace:
    """Steps in a second between signs of life."""

    def __init__(self) -> None:
        self._last: tuple[float, int] | None = None
        self.steps_per_second: float | None = None

    def take(self, data: Mapping[str, Any]) -> None:
        """Take in a status."""
        now, step = data.get("heartbeat"), data.get("step")
        if not isinstance(now, int | float) or not isinstance(step, int):
            return
        if self._last is None or step < self._last[1]:
            self._last = (now, step)
        elif now - self._last[0] >= 1.0:
            self.steps_per_second = (step - self._last[1]) / (now - self._last[0])
            self._last = (now, step)


def _picture(status: RunStatus, notices: list[str], pace: Pace) -> RenderableType:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    from forge_kernel.run_folder.folder import RunFolder
    from forge_kernel.run_folder.log_text import place_text

    data = status.data
    colour = {"running": "green", "silent": "yellow", "gone": "red"}.get(status.condition, "bold")
    parts: list[RenderableType] = [Text(visible(f"{status.folder}: {status.said}"), style=colour)]
    if data:
        speed = pace.steps_per_second
        message = place_text(data) + (f", {speed:.3g} steps/s" if speed is not None else "")
        parts.append(Text(visible(message)))
        total, step = data.get("total_steps"), data.get("step", 0)
        if isinstance(total, int) and isinstance(step, int) and total:
            parts.append(ProgressBar(total=total, completed=step))
        infos = RunFolder(status.folder).metric_infos()
        table = Table("metric", "latest", box=None, header_style="dim", padding=(0, 2, 0, 0))
        metrics = data.get("metrics")
        for name, value in metrics.items() if isinstance(metrics, dict) else ():
            known = isinstance(value, int | float)
            table.add_row(
                Text(visible(name)), infos.of(name).number(value) if known else "not measured"
            )
        parts.append(table)
    parts += [Text(visible(notice), style="dim") for notice in notices]
    return Group(*parts)
