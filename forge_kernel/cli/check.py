"""`forge check`: all faults of a pipeline file at once."""

from __future__ import annotations

import json

from forge_kernel.cli.options import AllowCode, AsJson, File, Settings
from forge_kernel.trust import code_allowed


def check_command(
    file: File,
    settings: Settings = None,
    as_json: AsJson = False,
    allow_code: AllowCode = False,
) -> None:
    """Check a pipeline file. All faults with line and column, without torch."""
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
