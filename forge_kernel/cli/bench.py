"""`forge bench`: run a script of `benchmarks/`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer


def bench_command(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A script's name.")] = None,
    folder: Annotated[Path, typer.Option(help="Where the scripts are.")] = Path("benchmarks"),
) -> None:
    """Run a benchmark and print its table. Without a name, list the scripts of benchmarks/."""
    from forge_kernel.config.spelling import did_you_mean
    from forge_kernel.errors import ConfigError, Fault

    scripts = {file.stem: file for file in sorted(folder.glob("[a-z]*.py"))}
    if not scripts:
        hint = "benchmarks are part of the checkout: run this at its root, or use --folder"
        raise ConfigError([Fault(f"there are no benchmarks in {folder}", hints=(hint,))])
    if name is None:
        for known, file in scripts.items():
            text = file.read_text(encoding="utf-8")
            print(f"  {known:<16} {text.lstrip().lstrip(chr(34)).partition(chr(10))[0]}")
        return
    if name not in scripts:
        hints = (*did_you_mean(name, scripts), f"there are: {', '.join(scripts)}")
        raise ConfigError([Fault(f"there is no benchmark '{name}'", hints=hints)])
    done = subprocess.run([sys.executable, str(scripts[name])], check=False)  # noqa: S603  ours
    raise typer.Exit(3 if done.returncode else 0)
