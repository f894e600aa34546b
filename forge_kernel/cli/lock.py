"""`forge lock`: write down which plugins a pipeline is to run with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from forge_kernel.cli.options import AllowCode, File, Settings
from forge_kernel.trust import code_allowed


def lock_command(
    file: File,
    settings: Settings = None,
    out: Annotated[Path, typer.Option(help="The lock file.")] = Path("plugins.lock"),
    allow_code: AllowCode = False,
) -> None:
    """Write down a pipeline's plugins: versions and source hashes. See `plugins.lock` in files."""
    from forge_kernel.planning.catalog import Catalog
    from forge_kernel.planning.pipeline_file import load_pipeline
    from forge_kernel.planning.plan import plan
    from forge_kernel.planning.plugin_lock import locked_plugins
    from forge_kernel.storage.atomic_files import write_json

    catalog = Catalog.installed()
    with code_allowed(allow_code):
        # what is written is what is installed now, whatever an older lock says
        pipeline = load_pipeline(file, [*(settings or ()), "plugins.lock=null"], catalog=catalog)
        entries = plan(pipeline, catalog).entries
    offers = [catalog.offer(entry.info.kind, entry.info.name) for entry in entries]
    data = locked_plugins(offers)
    write_json(out, data)
    packages = sorted(
        {f"{about['package']} {about['version']}" for about in data["plugins"].values()}
    )
    print(f"{out}: {len(data['plugins'])} plugins of {', '.join(packages)}")
    if pipeline.plugins.lock is None:
        print(f"hold the pipeline to it: plugins: {{lock: {out}}}")
