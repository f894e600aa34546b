"""`forge init`: a pipeline file for data of one's own, written after a look at them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Final

import typer

_SHIPPED: Final = "shipped:wine.csv"
_LONGEST: Final = 60


def init(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="a CSV or another table, a folder of pictures in a folder for each class, a text "
            "or a folder of texts; measurements of wines otherwise",
        ),
    ] = _SHIPPED,
    target: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="the column to predict; the most likely otherwise"),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="name of the run and of the file; by the data otherwise")
    ] = None,
) -> None:
    """Look at data and write NAME.yaml, a commented pipeline that learns them. Asks nothing."""
    from forge_kernel.cli.new import write_pipeline
    from forge_kernel.errors import ConfigError, Fault
    from forge_plugins.commands.first_pipeline import pipeline_text
    from forge_plugins.commands.suggestion import looked_at
    from forge_plugins.formats.errors import DataError

    try:
        suggestion = looked_at(data, target)
    except DataError as fault:
        hints = (fault.hint,) if fault.hint else ()
        message = str(fault).removesuffix(f"; {fault.hint}")
        raise ConfigError([Fault(message, hints=hints)]) from fault
    except OSError as error:
        raise ConfigError([Fault(f"{data} cannot be read: {error}")]) from error
    chosen = name or _name_of(data)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", chosen):
        hint = "give another with --name"
        raise ConfigError([Fault(f"'{chosen}' makes no name of a run", hints=(hint,))])
    file = Path(f"{chosen}.yaml")
    write_pipeline(file, lambda schema: pipeline_text(suggestion, chosen, schema))
    typer.echo("\n".join(suggestion.seen))
    typer.echo(f"to beat: {suggestion.baseline}")
    typer.echo(f"{file} is written; now: forge run {file}")


def _name_of(data: str) -> str:
    """The data's name, as a run can have it."""
    plain = Path(data.removeprefix("shipped:")).resolve().name.split(".")[0]
    return re.sub(r"[^A-Za-z0-9_-]+", "-", plain).strip("-_")[:_LONGEST] or "mine"
