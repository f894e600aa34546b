"""`forge evaluate`: a trained run's metrics on a file, or on its own validation data."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="a run folder")],
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="samples or a text; the run's validation data otherwise"),
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="another run or a model: how often both give the same answer"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="as one JSON object")] = False,
    device: Annotated[str, typer.Option(help="as run.device")] = "cpu",
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="also run code that the run's file names")
    ] = False,
) -> None:
    """Measure what a run has learned. Its loss and its validators' metrics; nothing is written."""
    from forge_kernel import evaluate_run
    from forge_kernel.contract.metric_info import VALIDATION
    from forge_kernel.errors import ConfigError, Fault
    from forge_kernel.run_folder.folder import RunFolder

    metrics = evaluate_run(folder, data, teacher=teacher, device=device, allow_code=allow_code)
    if not metrics:
        message = f"{folder} has no validation data: name a file with --data"
        raise ConfigError([Fault(message)])
    if as_json:
        typer.echo(json.dumps(metrics))
        return
    infos = RunFolder(folder).metric_infos()
    for name, value in metrics.items():
        number = partial(infos.of(VALIDATION + name).number, grouped=False)
        typer.echo(f"{name}: {number(value)}")
