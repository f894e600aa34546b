"""`forge run`: train as a file says."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from forge_kernel.cli.options import AllowCode, File, Settings
from forge_kernel.secrecy import without_secrets
from forge_kernel.trust import code_allowed

if TYPE_CHECKING:
    from collections.abc import Callable

    from forge_kernel.config.pipeline import PipelineConfig
    from forge_kernel.contract.cancel import Cancel
    from forge_kernel.contract.result import RunResult


def run_command(
    file: File,
    settings: Settings = None,
    output_dir: Annotated[
        str | None, typer.Option(help="The run folder (new or empty); below runs/ otherwise.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    allow_code: AllowCode = False,
) -> None:
    """Train the pipeline of a file. Prints the run folder and the final metrics."""
    from forge_kernel.planning.pipeline_file import read_document
    from forge_kernel.runner import run_document

    document = read_document(file, settings or ())
    with code_allowed(allow_code):
        train(lambda cancel: run_document(
            document, output_dir=output_dir, cancel=cancel, quiet=quiet, planned=_show_notices
        ))  # fmt: skip


def _show_notices(pipeline: PipelineConfig) -> None:
    """What a user may not have meant."""
    for notice in pipeline.run.notices():
        show_notice(notice)


def show_notice(notice: str) -> None:
    """One sentence beside the output."""
    text = json.dumps({"event": "note", "note": notice})
    print(f"note: {notice}" if sys.stderr.isatty() else text, file=sys.stderr)


def train(start: Callable[[Cancel], RunResult]) -> None:
    """Run under signal handlers, show the outcome, leave with its exit status."""
    from forge_kernel.cli.interrupt import Interrupt
    from forge_kernel.errors import ForgeError

    with Interrupt() as interrupt:
        try:
            result = start(interrupt)
        except ForgeError as error:
            for note in getattr(error, "__notes__", ()):
                print(f"forge: {without_secrets(note)}", file=sys.stderr)
            raise
        except KeyboardInterrupt as error:  # the second signal, or one before the first step
            raise typer.Exit(interrupt.ended()) from error
        except Exception as error:
            what = without_secrets(f"{type(error).__name__}: {error}")
            print(f"forge: the run failed: {what}", file=sys.stderr)
            for note in getattr(error, "__notes__", ()):
                print(f"forge: {without_secrets(note)}", file=sys.stderr)
            print("forge: the traceback is in forge.log of the run folder", file=sys.stderr)
            raise typer.Exit(3) from error
    show_result(result)
    if result.failed_exports:
        for name, why in result.failed_exports.items():
            print(f"forge: the export {name} failed: {without_secrets(why)}", file=sys.stderr)
        print(
            f"the run is complete; export it again with: forge export {result.folder} --use "
            f"{next(iter(result.failed_exports)).rstrip('_')}",
            file=sys.stderr,
        )
        raise typer.Exit(3)
    if result.outcome == "stopped":
        print(f"go on with: forge resume {result.folder}", file=sys.stderr)
        raise typer.Exit(128 + interrupt.signal if interrupt.signal else 130)


def show_result(result: RunResult) -> None:
    """The folder, the outcome and what matters of it."""
    from forge_kernel.cli.summary import COLOURS, summary
    from forge_kernel.contract.metric_info import MetricInfos
    from forge_kernel.run_folder.folder import RunFolder

    print(result.folder)
    outcome: str = result.outcome
    if sys.stdout.isatty():
        outcome = typer.style(outcome, fg=COLOURS[outcome])
    print(
        f"{outcome} after {result.steps} steps, {result.epochs} epochs, "
        f"{result.seconds:.1f} s: {result.stop_reason}"
    )
    infos = RunFolder(result.folder).metric_infos() if result.folder is not None else MetricInfos()
    for line in summary(result, infos):
        print(line)
