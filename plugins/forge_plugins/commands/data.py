"""`forge data`: what a data file holds, and how good its samples are."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from forge_plugins.formats.quality import Assessment
    from forge_plugins.formats.table import Table

SHOWN = 20  # record numbers told for each reason


class InputForm(StrEnum):
    """What inputs are."""

    FEATURES = "features"
    TOKENS = "tokens"


class TargetForm(StrEnum):
    """What targets are; `auto`: classes when there is a target of integers."""

    AUTO = "auto"
    CLASS = "class"
    NUMBER = "number"
    NEXT = "next"
    NONE = "none"


def data(  # noqa: PLR0913, PLR0917  as many as the command has options
    file: Annotated[str, typer.Argument(metavar="FILE", help="a data file, or shipped:NAME")],
    form: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="as data.with.format")
    ] = "auto",
    inputs: Annotated[InputForm, typer.Option("--input", help="as data.with.input")] = (
        InputForm.FEATURES
    ),
    target: Annotated[TargetForm, typer.Option(help="as data.with.target")] = TargetForm.AUTO,
    classes: Annotated[int | None, typer.Option(min=1, help="labels are below it")] = None,
    vocabulary: Annotated[int | None, typer.Option(min=1, help="tokens are below it")] = None,
    threshold: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="as data.with.quality_threshold")
    ] = 0.5,
    integers: Annotated[str, typer.Option(metavar="TYPE", help="as data.with.integers")] = "uint16",
    length: Annotated[int, typer.Option(min=1, help="as data.with.length")] = 128,
    cache_dir: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="as data.with.cache_dir")
    ] = None,
    trust_pickle: Annotated[
        bool, typer.Option("--trust-pickle", help="run a pickle as it is")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="as one JSON object")] = False,
) -> None:
    """Tell a data file's format, fields, counts, label balance, and samples of low quality."""
    from forge_kernel.errors import ConfigError, Fault
    from forge_plugins.data.file import data_file
    from forge_plugins.formats.fault import DataFault
    from forge_plugins.formats.format import Reading
    from forge_plugins.formats.installed import names
    from forge_plugins.formats.opening import open_table
    from forge_plugins.formats.quality import assess
    from forge_plugins.formats.token_file import TYPES

    for word, known in ((form, ("auto", *names())), (integers, TYPES)):
        if word not in known:
            hint = f"there are: {', '.join(known)}"
            raise ConfigError([Fault(f"'{word}' is unknown", hints=(hint,))])
    try:
        table = open_table(
            data_file(file),
            form,
            Reading(lenient=True, trust_pickle=trust_pickle, integers=integers, length=length),
            cache_dir=cache_dir,
        )
        meant = _meant(table) if target is TargetForm.AUTO else target.value
        assessment = assess(
            table,
            inputs=inputs.value,
            target=meant,  # type: ignore[arg-type]  # checked by the enumeration
            classes=classes,
            vocabulary=vocabulary,
        )
    except DataFault as fault:
        hints = (fault.hint,) if fault.hint else ()
        message = str(fault).removesuffix(f"; {fault.hint}")
        raise ConfigError([Fault(message, hints=hints)]) from fault
    told = _told(table, assessment, meant, threshold)
    typer.echo(json.dumps(told) if as_json else "\n".join(_lines(told)))


def _meant(table: Table) -> str:
    column = table.columns.get("target")
    if column is None:
        return "none"
    return (
        "class"
        if column.dtype.kind in "iub" and all(size == 1 for size in column.shape[1:])
        else "number"
    )


def _told(table: Table, found: Assessment, target: str, threshold: float) -> dict[str, Any]:
    import numpy as np

    from forge_plugins.formats.quality import REASONS

    kept = found.kept(threshold)
    shifted = target == "next" and "target" not in table.columns
    labels = {}
    if target == "class":
        answers = np.asarray(table.columns["target"]).reshape(len(table), -1)[kept]
        answers = answers[np.isfinite(answers)]
        values, counts = np.unique(answers, return_counts=True)
        labels = {str(int(v)): int(n) for v, n in zip(values, counts, strict=True) if v == int(v)}
    return {
        "file": str(table.file),
        "format": table.format,
        "records": len(table),
        "fields": {
            name: {"shape": list(column.shape[1:]), "type": str(column.dtype)}
            for name, column in table.columns.items()
        },
        "target": target,
        "threshold": threshold,
        "kept": len(kept),
        "left_out": found.left_out(threshold),
        "reasons": {
            reason: {
                "records": int(found.found[reason].sum()),
                "first": np.flatnonzero(found.found[reason])[:SHOWN].tolist(),
            }
            for reason in REASONS
            if found.found[reason].any()
        },
        "quality_deciles": [
            round(float(q), 6) for q in np.quantile(found.scores, np.linspace(0, 1, 11))
        ],
        "labels": labels,
        "length": int(np.prod(table.columns["input"].shape[1:])) - shifted,
    }


def _lines(told: dict[str, Any]) -> list[str]:
    lines = [f"{told['file']}: {told['format']}, {told['records']} records"]
    for name, field in told["fields"].items():
        lines.append(f"  {name}: {field['type']}, shape {field['shape']} in each record")
    lines.append(f"  numbers in an input: {told['length']}")
    lines.append(f"kept at quality {told['threshold']:g} and above: {told['kept']}")
    for reason, count in told["left_out"].items():
        lines.append(f"  left out, {reason}: {count}")
    for reason, about in told["reasons"].items():
        first = ", ".join(map(str, about["first"]))
        lines.append(f"found, {reason}: {about['records']} records: {first}")
    if told["labels"]:
        lines.append("labels among the kept:")
        lines += [f"  {label}: {count}" for label, count in told["labels"].items()]
    deciles = " ".join(f"{value:g}" for value in told["quality_deciles"])
    lines.append(f"quality, lowest to highest in tenths: {deciles}")
    return lines
