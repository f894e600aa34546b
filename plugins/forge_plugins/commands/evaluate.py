"""`forge evaluate`: a trained run's metrics on a file, or on its own validation data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from forge_kernel.contract.metric_info import MetricInfos


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
    clients: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="PROGRAM",
            help="who computes, side by side: torch (the run itself), transformers, llama.cpp, "
            "onnxruntime (its exports); several times or with commas",
        ),
    ] = None,
    targets: Annotated[
        int | None,
        typer.Option(min=1, help="with --with: ask about the first so many targets alone"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="as one JSON object")] = False,
    device: Annotated[str, typer.Option(help="as run.device")] = "cpu",
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="also run code that the run's file names")
    ] = False,
) -> None:
    """Measure what a run has learned. Its loss and its validators' metrics; nothing is written."""
    if clients:
        _by_clients(folder, data, clients, targets, as_json=as_json, device=device,
                    allow_code=allow_code, teacher=teacher)  # fmt: skip
        return
    if targets is not None:
        raise typer.BadParameter("--targets counts what --with asks about: give --with too")
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


def _by_clients(
    folder: Path,
    data: Path | None,
    clients: list[str],
    targets: int | None,
    *,
    teacher: Path | None,
    as_json: bool,
    device: str,
    allow_code: bool,
) -> None:
    """The same metrics by several programs, one column each."""
    from rich.console import Console

    from forge_kernel import evaluate_clients
    from forge_kernel.run_folder.folder import RunFolder

    if teacher is not None:
        raise typer.BadParameter("--teacher is compared by the run itself: leave --with out")
    names = list(dict.fromkeys(name.strip() for each in clients for name in each.split(",")))
    metrics = evaluate_clients(
        folder, data, clients=names, most=targets, device=device, allow_code=allow_code
    )
    if as_json:
        typer.echo(json.dumps(metrics))
        return
    Console().print(_side_by_side(metrics, RunFolder(folder).metric_infos()))


def _side_by_side(metrics: Mapping[str, Mapping[str, float]], infos: MetricInfos) -> Table:
    from rich.table import Table

    from forge_kernel.contract.metric_info import VALIDATION

    table = Table("metric", box=None, padding=(0, 2, 0, 0))
    for client in metrics:
        table.add_column(client, justify="right")
    for name in next(iter(metrics.values())):
        info = infos.of(VALIDATION + name)
        numbers = (
            f"{values[name]:.0f}" if name in ("targets", "step") else info.number(values[name])
            for values in metrics.values()
        )
        table.add_row(name, *numbers)
    return table
