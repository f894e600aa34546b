"""`forge new`: a working plugin package, or a commented pipeline."""

from __future__ import annotations

import keyword
import re
from pathlib import Path
from typing import Annotated

import typer

from forge_kernel.errors import ConfigError, Fault

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Write a plugin or a pipeline.")


def _module_name(name: str) -> str:
    """The importable name.

    Raises:
        ConfigError: the name does not make one.
    """
    module = name.replace("-", "_")
    if not re.fullmatch(r"[a-z][a-z0-9_]{1,40}", module) or keyword.iskeyword(module):
        hint = "use small letters, digits and hyphens, a letter first: acme-loss"
        raise ConfigError([Fault(f"'{name}' makes no package name", hints=(hint,))])
    return module


@app.command("plugin")
def plugin_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the package: acme-loss.")],
    kind: Annotated[str, typer.Option(help="What it is: observers, gradients, loss ...")] = "observers",
    directory: Annotated[Path, typer.Option(help="Where to make the folder.")] = Path(),
) -> None:
    """Write a package with one plugin, its tests and settings, ready to install."""
    from forge_kernel.cli.scaffold import KINDS, package_files
    from forge_kernel.config.spelling import did_you_mean

    module = _module_name(name)
    if kind not in KINDS:
        hints = (*did_you_mean(kind, KINDS), f"allowed: {', '.join(KINDS)}")
        raise ConfigError([Fault(f"there is no template for the kind '{kind}'", hints=hints)])
    folder = directory / name
    if folder.exists():
        raise ConfigError([Fault(f"{folder} is there already")])
    for file, text in package_files(name, module, kind).items():
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    print(f"{folder}: a plugin of the kind {kind}")
    print(f"  try it:  cd {folder} && pip install -e . && pytest && forge plugins {module}")


@app.command("pipeline")
def pipeline_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the run; the file's name.")],
    directory: Annotated[Path, typer.Option(help="Where to write the file.")] = Path(),
) -> None:
    """Write a commented pipeline file that runs."""
    from forge_kernel.cli.scaffold import pipeline_text

    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", name):
        raise ConfigError([Fault(f"'{name}' makes no name of a run")])
    file = directory / f"{name}.yaml"
    if file.exists():
        raise ConfigError([Fault(f"{file} is there already")])
    file.write_text(pipeline_text(name), encoding="utf-8")
    print(f"{file}: try it with: forge run {file}")
