"""`forge check`: all faults of a pipeline file at once."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from forge_kernel.cli.options import AllowCode, AsJson, File, Settings
from forge_kernel.trust import code_allowed

if TYPE_CHECKING:
    from forge_kernel.config.document import Document
    from forge_kernel.planning.plan import Plan


def check_command(
    file: File,
    settings: Settings = None,
    as_json: AsJson = False,
    allow_code: AllowCode = False,
    deep: Annotated[
        bool,
        typer.Option(
            "--deep",
            help="Also open the data, build everything and try two samples, as `run` does before "
            "its first step.",
        ),
    ] = False,
) -> None:
    """Check a pipeline file. All faults with line and column, without torch unless --deep."""
    from forge_kernel.errors import FaultsError
    from forge_kernel.planning.catalog import Catalog
    from forge_kernel.planning.pipeline_file import check_document, read_document
    from forge_kernel.planning.plan import plan

    catalog = Catalog.installed()
    try:
        document = read_document(file, settings or ())
        pipeline = check_document(document, catalog)
        with code_allowed(allow_code):
            decided = plan(pipeline, catalog, document=document)
            if deep:
                _try(decided, document)
    except FaultsError as error:
        if as_json:
            faults = [
                {
                    "path": fault.path,
                    "file": fault.mark.source if fault.mark else None,
                    "line": fault.mark.line if fault.mark else None,
                    "column": fault.mark.column if fault.mark else None,
                    "message": fault.message,
                    "hints": list(fault.hints),
                }
                for fault in error.faults
            ]
            print(json.dumps({"faults": faults}, indent=1))
        raise
    notices = pipeline.run.notices()
    if as_json:
        print(json.dumps({"faults": [], "notices": notices, "code": decided.code}, indent=1))
        return
    for notice in notices:
        print(f"note: {notice}")
    for text in decided.code:
        print(f"runs code: {text}")
    print(f"{file}: no faults ({len(decided.entries)} plugins)")


def _try(decided: Plan, document: Document) -> None:
    """Set the run up in a folder that goes again, and try it on two samples."""
    from forge_kernel.contract.plugin_rules import under_rules
    from forge_kernel.training.rehearsal.dry_run import rehearse
    from forge_kernel.training.rehearsal.placed_faults import placed
    from forge_kernel.training.session import Session

    with under_rules(decided.pipeline.plugins), TemporaryDirectory() as folder:
        with placed(decided.entries, document):
            session = Session(decided, folder=Path(folder), quiet=True, reads=True)
        with session.streams.kept(), closing(session):
            rehearse(session, document)
