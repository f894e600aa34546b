"""`forge sweep`: one pipeline with several settings and seeds, ranked."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import secrets
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forge_kernel.cli.options import AllowCode, File
from forge_kernel.trust import code_allowed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forge_kernel.config.pipeline import PipelineConfig
    from forge_plugins.sweeps.axis import Axis
    from forge_plugins.sweeps.outcome import Goal
    from forge_plugins.sweeps.search import Search
    from forge_plugins.sweeps.sweep import Sweep

_INSTALL = "pip install -c constraints.txt -e '.[optuna]'"


Varied = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUES",
        help="A setting and its values (optimizer.with.lr=1e-3,3e-3), or a range to draw from "
        "(=1e-4..1e-2, =log:1e-4..1e-2); repeatable.",
    ),
]
Seeds = Annotated[
    str | None, typer.Option(metavar="SEEDS", help="0-4, or 0,1,7; the file's seed otherwise.")
]
Random = Annotated[int | None, typer.Option(min=1, metavar="N", help="N configurations, drawn.")]
Optuna = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="N configurations that Optuna proposes; those that are far behind end early (extra "
        "`optuna`).",
    ),
]
MetricName = Annotated[
    str | None,
    typer.Option(
        "--metric",
        help="Validation metric to rank by; what a callback of the file watches otherwise, else "
        "loss.",
    ),
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Runs at a time; one for each core otherwise.")
]
MaxRuns = Annotated[int | None, typer.Option(min=1, help="Runs that are begun now.")]
MaxSeconds = Annotated[
    float | None, typer.Option(min=0.0, help="Seconds until runs are stopped and saved.")
]
Folder = Annotated[
    Path | None,
    typer.Option(
        "--output-dir",
        help="The sweep's folder; the same command goes on with one that was cut. Below sweeps/ "
        "otherwise.",
    ),
]


def sweep(  # noqa: PLR0913, PLR0917  options, each a wish of its own
    file: File,
    settings: Varied = None,
    seeds: Seeds = None,
    random: Random = None,
    optuna: Optuna = None,
    metric: MetricName = None,
    workers: Workers = None,
    max_runs: MaxRuns = None,
    max_seconds: MaxSeconds = None,
    output_dir: Folder = None,
    allow_code: AllowCode = False,
) -> None:
    """Train a pipeline with several settings and seeds. Ranks them and writes a comparison."""
    from forge_plugins.sweeps.axis import parse_axis, parse_seeds
    from forge_plugins.sweeps.sweep import Asked, Budget, Sweep

    axes = [parse_axis(text) for text in settings or ()]
    of_each: Sequence[int | None] = (None,) if seeds is None else parse_seeds(seeds)
    how = _how(axes, random, optuna)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    many = workers or cores or 1
    threads = max(1, (cores or 1) // many)
    budget = Budget(runs=max_runs, seconds=max_seconds, workers=many, threads=threads)
    with code_allowed(allow_code):
        pipeline, digest = _checked(file, axes)
        goal = _goal(pipeline, metric)
        about = {
            "file": file, "pipeline": digest, "settings": settings or [], "seeds": list(of_each),
            "how": how, "metric": goal.metric,
        }  # fmt: skip
        with closing(_opened(output_dir, pipeline.run.name)) as owner:
            before = _before(owner.folder, about)
            asked = Asked(
                file=file, folder=owner.folder, seeds=of_each, goal=goal, about=about,
                pruned=before.get("pruned", ()),
            )  # fmt: skip
            search = _search(axes, random, optuna, goal, before)
            _trained(Sweep(asked, search, budget, typer.echo), pipeline, goal, owner.folder)


def _trained(running: Sweep, pipeline: PipelineConfig, goal: Goal, folder: Path) -> None:
    """Train, and show what there is also of a sweep that is interrupted."""
    from forge_kernel.errors import INTERRUPTS
    from forge_plugins.sweeps.worker import prepared

    try:
        with prepared(pipeline):
            running.run()
    except INTERRUPTS:
        _show(running, goal, folder)
        raise
    _show(running, goal, folder)


def _how(axes: Sequence[Axis], random: int | None, optuna: int | None) -> str:
    """Grid, random or Optuna, where the settings allow it."""
    from importlib.util import find_spec

    from forge_kernel.errors import ConfigError, Fault, Mark

    if random is not None and optuna is not None:
        raise ConfigError([Fault("--random and --optuna exclude each other: name one of them")])
    if random is None and optuna is None:
        faults = [
            Fault("a range is drawn from: say how often with --random N or --optuna N", axis.key,
                  Mark("--set"), ("or name the values: 1e-3,3e-3",))
            for axis in axes if axis.span is not None
        ]  # fmt: skip
        if faults:
            raise ConfigError(faults)
        return "grid"
    if not any(axis.varies for axis in axes):
        hint = "--set optimizer.with.lr=log:1e-4..1e-2"
        raise ConfigError([Fault("there is nothing to draw: no setting varies", hints=(hint,))])
    if random is not None:
        return f"random {random}"
    if find_spec("optuna") is None:
        hint = f"install it with: {_INSTALL}; --random N needs nothing"
        raise ConfigError([Fault("--optuna needs the package optuna", hints=(hint,))])
    return f"optuna {optuna}"


def _checked(file: str, axes: Sequence[Axis]) -> tuple[PipelineConfig, str]:
    """The pipeline and its digest, when each value of each setting could be run."""
    from forge_kernel.config.yaml_file import write_yaml
    from forge_kernel.planning.catalog import Catalog
    from forge_kernel.planning.pipeline_file import check_document, fill, read_document
    from forge_kernel.planning.plan import plan

    catalog = Catalog.installed()
    first = {axis.key: _ends(axis)[0] for axis in axes}
    result: PipelineConfig | None = None
    for axis in [None, *axes]:
        for value in ("",) if axis is None else _ends(axis)[1:]:
            values = first if axis is None else {**first, axis.key: value}
            document = read_document(file, [f"{key}={text}" for key, text in values.items()])
            pipeline = check_document(document, catalog)
            _ = plan(pipeline, catalog, document=document)
            result = result or pipeline
    assert result is not None
    digest = hashlib.sha256(write_yaml(fill(result)).encode()).hexdigest()[:16]
    return result, digest


def _ends(axis: Axis) -> Sequence[str]:
    """What is looked at beforehand: all values, or both ends of a range."""
    if axis.span is None:
        return axis.values
    return [axis.span.shown(axis.span.low), axis.span.shown(axis.span.high)]


def _goal(pipeline: PipelineConfig, metric: str | None) -> Goal:
    """What is ranked by: what was asked for, what a callback watches, else the loss."""
    from forge_kernel.planning.catalog import Catalog
    from forge_plugins.sweeps.outcome import Goal

    watched = {
        use.config.metric: use.config.mode == "max"
        for use in pipeline.callbacks
        if hasattr(use.config, "metric") and hasattr(use.config, "mode")
    }
    name = metric or next(iter(watched), "loss")
    if name in watched:
        return Goal(name, watched[name])
    from forge_kernel.contract.metric_info import MetricInfos

    return Goal(name, MetricInfos(Catalog.installed().metrics()).of(name).goal == "max")


def _opened(output_dir: Path | None, name: str) -> Any:
    """The sweep's folder, owned by this process."""
    from forge_kernel.errors import ConfigError, Fault
    from forge_kernel.run_folder.owner import LOCK, Owner
    from forge_kernel.storage.atomic_files import make_folder
    from forge_plugins.sweeps.sweep import FILE

    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    folder = output_dir or Path("sweeps") / f"{name}-{now}-{secrets.token_hex(2)}"
    try:
        _ = make_folder(folder)
        names = {path.name for path in folder.iterdir()} - {LOCK}
        if names and FILE not in names:
            hint = f"name a new one, or one that holds {FILE} to go on with it"
            raise ConfigError([Fault(f"the folder {folder} is not empty", hints=(hint,))])
        owner = Owner(folder)
        owner.acquire()
    except OSError as error:
        raise ConfigError([Fault(f"cannot make the folder {folder}: {error}")]) from error
    return owner


def _before(folder: Path, about: dict[str, Any]) -> dict[str, Any]:
    """What the sweep had come to, when it goes on.

    Raises:
        ConfigError: the folder is another sweep's.
    """
    from forge_kernel.errors import ConfigError, Fault
    from forge_plugins.sweeps.sweep import FILE

    try:
        before = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError([Fault(f"{folder / FILE} cannot be read: {error}")]) from error
    other = [name for name, value in about.items() if before.get(name) != value]
    if other:
        hint = "repeat the command as it was, or name another --output-dir"
        told = ", ".join(f"{name} was {before.get(name)}" for name in other)
        raise ConfigError([Fault(f"{folder} is of another sweep: {told}", hints=(hint,))])
    return dict(before)


def _search(
    axes: Sequence[Axis], random: int | None, optuna: int | None, goal: Goal, before: dict[str, Any]
) -> Search:
    """Where the configurations come from."""
    from forge_plugins.sweeps.search import ListSearch, OptunaSearch
    from forge_plugins.sweeps.variant import drawn, grid

    if optuna is not None:
        return OptunaSearch(axes, optuna, 0, largest=goal.largest, known=before.get("variants", ()))
    return ListSearch(grid(axes) if random is None else drawn(axes, random, 0))


def _show(running: Sweep, goal: Goal, folder: Path) -> None:
    """The ranked table, the comparison and how to go on."""
    from forge_plugins.reports.page import FILE_NAME, write_report
    from forge_plugins.reports.run_data import read_run
    from forge_plugins.sweeps.outcome import ranked, table

    rows = ranked(running.rows(), goal)
    typer.echo()
    for line in table(rows, goal):
        typer.echo(line)
    folders = running.folders()
    if folders:
        write_report([read_run(each) for each in folders], folder / FILE_NAME)
        typer.echo(f"comparison: {folder / FILE_NAME}")
    if running.stopped:
        typer.echo(f"{running.stopped}; go on: the same command with --output-dir {folder}")
