"""`forge report`: one self-contained HTML page of one run, or of several compared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence


def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN_DIR...", help="run folders, finished or not")
    ],
    open_page: Annotated[
        bool, typer.Option("--open", help="show the page in the web browser")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="FILE",
            help="where to write; RUN_DIR/report.html for one run, ./report.html for several",
        ),
    ] = None,
) -> None:
    """Write an HTML report of one or several runs. With curves, metrics, events, configuration."""
    from forge_kernel.errors import ConfigError, Fault
    from forge_plugins.reports.page import FILE_NAME, write_report
    from forge_plugins.reports.run_data import read_run

    _check_folders(folders)
    file = output or (folders[0] if len(folders) == 1 else Path()) / FILE_NAME
    try:
        write_report([read_run(folder) for folder in folders], file)
    except OSError as error:
        raise ConfigError([Fault(f"cannot write the report {file}: {error}")]) from error
    typer.echo(str(file))
    if open_page:
        import webbrowser

        if not webbrowser.open(file.resolve().as_uri()):
            typer.echo("no web browser could be started", err=True)


def _check_folders(folders: Sequence[Path]) -> None:
    """Refuse what is no run folder, all of them at once."""
    from forge_kernel.errors import ConfigError, Fault
    from forge_plugins.reports.run_data import CONFIG

    hint = f"a run folder holds {CONFIG}, written by: forge run"
    faults = [
        Fault(f"{folder} is no run folder", hints=(hint,))
        for folder in folders
        if not (folder / CONFIG).is_file()
    ]
    if faults:
        raise ConfigError(faults)
