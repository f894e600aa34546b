"""`forge status`: the state of a run, read from another process."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from forge_kernel.cli.options import AsJson, folded, visible


def status_command(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of a run.")],
    as_json: AsJson = False,
) -> None:
    """Show the state of a run, whichever process runs it."""
    import json
    import shutil

    from forge_kernel.run_folder.folder import RunFolder
    from forge_kernel.run_folder.log_text import metrics_lines, place_text
    from forge_kernel.run_folder.status import read_status

    result = read_status(run_dir)
    if as_json:
        print(json.dumps(result.to_data(), indent=1))
        return
    lines = [f"{result.folder}: {result.said}"]
    if result.data:
        lines.append(f"  {place_text(result.data)}")
    width = shutil.get_terminal_size().columns
    infos = RunFolder(run_dir).metric_infos()
    metrics = metrics_lines(result.data.get("metrics"), infos, width - 4)
    if metrics:
        lines.append(f"  at step {result.data.get('metrics_step')}:")
        lines += [f"    {line}" for line in metrics]
    events = result.data.get("events")
    told = (
        [event for event in events if isinstance(event, dict)] if isinstance(events, list) else []
    )
    lines += [f"  step {event.get('step')}: {event.get('message')}" for event in told]
    for line in lines:
        print(folded(visible(line), width))
