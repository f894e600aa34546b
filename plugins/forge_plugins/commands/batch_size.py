"""`forge batch-size`: which batch size suits this machine."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer

from forge_kernel.cli.options import AsJson, File, Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from forge_plugins.batch_sizes.measurement import Measurement

WORDS = {"memory": "not enough memory", "data": "more than there are samples"}


def batch_size(
    file: File,
    settings: Settings = None,
    key: Annotated[
        str, typer.Option(metavar="KEY", help="the setting that holds the batch size")
    ] = "data.with.batch_size",
    smallest: Annotated[int, typer.Option(min=1, help="first size; it is doubled")] = 16,
    largest: Annotated[int | None, typer.Option(min=1, help="largest size to try")] = None,
    memory: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            metavar="GIB",
            help="memory that a trial may take; 80 % of what is free otherwise",
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="of measured steps for each size")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Measure the fastest batch size. Trains a few steps at growing sizes; prints samples per
    second and memory of each.

    Each size runs in its own process, which is ended before it takes more memory than it
    may. The learning rate is not adapted: a larger batch trains differently.
    """
    import psutil

    from forge_kernel.planning.catalog import Catalog
    from forge_kernel.planning.pipeline_file import check_document, read_document
    from forge_plugins.batch_sizes.measurement import recommended, search
    from forge_plugins.batch_sizes.watched import watched_trial

    named = list(settings or ())
    catalog = Catalog.installed()
    _ = check_document(read_document(file, [*named, f"{key}={smallest}"]), catalog)
    free = psutil.virtual_memory().available
    limit = int(memory * 2**30) if memory is not None else int(free * 0.8)

    def measure(size: int) -> Measurement:
        return watched_trial(file, named, key, size, seconds=seconds, memory_limit=limit)

    result = list(_shown(search(measure, smallest, largest), quiet=as_json))
    best = recommended(result)
    if as_json:
        print(json.dumps({
            "key": key,
            "sizes": [dataclasses.asdict(each) for each in result],
            "recommended": None if best is None else best.batch_size,
        }))  # fmt: skip
    elif best is None:
        print(f"\nno size from {smallest} on could be measured")
    else:
        print(f"\nthe smallest of the fastest: --set {key}={best.batch_size}")
    if best is None:
        raise typer.Exit(3)


def _shown(measurements: Iterator[Measurement], *, quiet: bool) -> Iterator[Measurement]:
    """Print a line for each as it comes."""
    if not quiet:
        print(f"  {'batch size':>10}  {'samples/s':>12}  {'ms/step':>9}  {'peak memory':>12}")
    for each in measurements:
        if not quiet:
            print(_line(each), flush=True)
        yield each


def _line(each: Measurement) -> str:
    if each.samples_per_second is None or each.step_seconds is None or each.peak_bytes is None:
        return f"  {each.batch_size:>10}  {WORDS[each.outcome]}"
    return (
        f"  {each.batch_size:>10}  {each.samples_per_second:>12,.0f}  "
        f"{each.step_seconds * 1e3:>9.1f}  {each.peak_bytes / 2**20:>8,.0f} MiB"
    )
