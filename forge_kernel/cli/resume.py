"""`forge resume`: go on from the newest intact checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from forge_kernel.cli.options import AllowCode, Settings
from forge_kernel.cli.run import show_notice, train
from forge_kernel.trust import code_allowed


def resume_command(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of a run.")],
    settings: Settings = None,
    take_over: Annotated[
        bool,
        typer.Option(
            "--take-over", help="Also of a process on another machine that did not end the run."
        ),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    allow_code: AllowCode = False,
) -> None:
    """Resume a run from its newest intact checkpoint. Exactly; `--set` changes are kept."""
    from forge_kernel.runner import resume

    chosen = settings or ()
    with code_allowed(allow_code):
        train(lambda cancel: resume(
            run_dir, chosen, cancel=cancel, quiet=quiet, take_over=take_over, on_notice=show_notice
        ))  # fmt: skip
