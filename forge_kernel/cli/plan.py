"""`forge plan`: which plugins run in each hook, in what order and why."""

from __future__ import annotations

import json

from forge_kernel.cli.options import AllowCode, AsJson, File, Settings
from forge_kernel.trust import code_allowed


def plan_command(
    file: File,
    settings: Settings = None,
    as_json: AsJson = False,
    allow_code: AllowCode = False,
) -> None:
    """Show which plugins run in each hook, in what order and why. Without torch."""
    from forge_kernel.config.document import show_path
    from forge_kernel.planning.catalog import Catalog
    from forge_kernel.planning.pipeline_file import check_document, read_document
    from forge_kernel.planning.plan import HOOKS, plan

    catalog = Catalog.installed()
    document = read_document(file, settings or ())
    with code_allowed(allow_code):
        decided = plan(check_document(document, catalog), catalog, document=document)
    if as_json:
        print(json.dumps(decided.to_data(), indent=1))
        return
    print("Order (kinds in canonical order, entries as in the file unless a reason is given):\n")
    width = max(len(entry.label) for entry in decided.entries)
    for number, entry in enumerate(decided.entries, 1):
        reason = decided.reasons.get(entry.path, "")
        print(f"  {number:2}  {entry.label:<{width}}  {entry.origin:<20}  {reason}")
    print("\nHooks in life-cycle order:\n")
    for hook in HOOKS:
        names = [show_path(entry.path) for entry in decided.answering(hook)]
        if names:
            print(f"  {hook:<24} {' -> '.join(names)}")
    for text in decided.code:
        print(f"\nruns code: {text}")
    for notice in decided.pipeline.run.notices():
        print(f"\nnote: {notice}")
