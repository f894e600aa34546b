"""`forge generate`: let a trained language model write."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def generate(  # noqa: PLR0913, PLR0917  as many as the command has options
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="a run folder, or a model's folder")
    ],
    prompt: Annotated[
        str, typer.Option(help="the beginning of the text; - reads it from standard input")
    ],
    max_tokens: Annotated[int, typer.Option(min=1, help="most tokens to write")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0: the likeliest token each time")
    ] = 0.0,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="only so many of the likeliest tokens")
    ] = None,
    top_p: Annotated[
        float, typer.Option(help="only the likeliest tokens that have this probability together")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="of the choices")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="put the prompt into the model's chat template")
    ] = False,
    device: Annotated[str, typer.Option(help="as run.device")] = "cpu",
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="also run code that the run's file names")
    ] = False,
) -> None:
    """Write on after a prompt with a trained language model. The text comes as it is written."""
    from forge_kernel import load_run
    from forge_kernel.errors import ConfigError, Fault

    text = sys.stdin.read() if prompt == "-" else prompt
    run = load_run(folder, device=device, allow_code=allow_code)
    try:
        pieces = run.stream(
            text, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
            seed=seed, chat=chat,
        )  # fmt: skip
        for piece in pieces:
            typer.echo(piece, nl=False)
    except ValueError as error:
        raise ConfigError([Fault(f"{folder}: {error}")]) from error
    typer.echo()
