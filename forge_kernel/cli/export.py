"""`forge export`: run an exporter on a finished run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from forge_kernel.cli.options import AllowCode
from forge_kernel.trust import code_allowed


def export_command(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of a run.")],
    use: Annotated[str, typer.Option("--use", metavar="NAME", help="The exporter.")],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A setting of the exporter (dtype=bfloat16), or of the pipeline by its whole "
            "path (run.device=cpu); repeatable.",
        ),
    ] = None,
    allow_code: AllowCode = False,
) -> None:
    """Export what a run has learned. From its newest intact checkpoint; prints the manifest."""
    from forge_kernel.errors import ForgeError
    from forge_kernel.runner import export

    try:
        with code_allowed(allow_code):
            written = export(run_dir, use, settings or ())
    except ForgeError:
        raise
    except Exception as error:
        print(f"forge: the export failed: {type(error).__name__}: {error}", file=sys.stderr)
        raise typer.Exit(3) from error
    for folder in written.values():
        print(folder)
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for name, value in manifest.items():
            if name != "files":
                print(f"  {name}: {value if isinstance(value, str) else json.dumps(value)}")
