"""Options that several commands share."""

from __future__ import annotations

import sys
import textwrap
from typing import Annotated

import typer

File = Annotated[
    str, typer.Argument(metavar="FILE", help="A pipeline file, or the name of a shipped one.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a value (run.seed=3); repeatable."),
]
AllowCode = Annotated[
    bool,
    typer.Option(
        "--allow-code", help="Run code that the file names (functions, pickles): you trust it."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


def folded(line: str, width: int) -> str:
    """A line for people, folded where a terminal shows it; for a program it stays one line."""
    if not sys.stdout.isatty() or len(line) <= width:
        return line
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.fill(
        line, max(width, 20), subsequent_indent=indent, drop_whitespace=True,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def visible(text: str) -> str:
    """A line of others as a terminal may show it: without signs that it would obey."""
    return "".join(sign if sign.isprintable() else "\ufffd" for sign in text)
