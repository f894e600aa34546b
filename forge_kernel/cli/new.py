"""`forge new`: a working plugin package, or a commented pipeline."""

from __future__ import annotations

import keyword
import re
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Final

import typer

from forge_kernel.errors import ConfigError, Fault

MAX_NAME: Final = 40

SCHEMA: Final = "pipeline.schema.json"

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Create a plugin package or a pipeline file."
)


def _module_name(name: str) -> str:
    """The importable name.

    Raises:
        ConfigError: the name does not make one, or it is that of a module that is there.
    """
    module = name.replace("-", "_")
    if (
        len(module) > MAX_NAME
        or not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", module)
        or keyword.iskeyword(module)
    ):
        hint = f"use small letters, digits and hyphens, at most {MAX_NAME}: acme-loss"
        raise ConfigError([Fault(f"'{name}' makes no package name", hints=(hint,))])
    if module in sys.stdlib_module_names or _is_module(module):
        hint = "choose a name of your own: acme-loss"
        raise ConfigError([Fault(f"there is a module '{module}' already", hints=(hint,))])
    return module


def _is_module(name: str) -> bool:
    """Whether a module of that name is installed; a mere folder is none."""
    spec = find_spec(name)
    return spec is not None and spec.origin is not None


def _write(files: dict[Path, str]) -> None:
    """Write new files.

    Raises:
        ConfigError: one of them cannot be written.
    """
    for file, text in files.items():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError([Fault(f"cannot write {file}: {error.strerror}")]) from error


def write_pipeline(file: Path, text: Callable[[str], str]) -> None:
    """Write a new pipeline file, and the schema beside it where none lies above.

    Args:
        file: that is not there yet.
        text: gives the file's text, of where its schema lies.

    Raises:
        ConfigError: it is there already, or cannot be written.
    """
    from forge_kernel.planning.catalog import Catalog
    from forge_kernel.planning.schemas import all_schemas, schema_text

    if file.exists() or file.is_symlink():
        hint = "give another name, or take it away"
        raise ConfigError([Fault(f"{file} is there already", hints=(hint,))])
    schema = _schema_above(file)
    files: dict[Path, str] = {}
    if schema is None:
        schema = SCHEMA
        files[file.parent / SCHEMA] = schema_text(all_schemas(Catalog.installed())[SCHEMA])
    _write({**files, file: text(schema)})


def _schema_above(file: Path) -> str | None:
    """The way from a file to the nearest schemas/ above it; None: there is none."""
    place = file.resolve().parent
    for depth, folder in enumerate((place, *place.parents)):
        if (folder / "schemas" / SCHEMA).is_file():
            return f"{'../' * depth}schemas/{SCHEMA}"
    return None


@app.command("plugin")
def plugin_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the package: acme-loss.")],
    kind: Annotated[
        str, typer.Option(help="What it is: observers, gradients, loss ...")
    ] = "observers",
    directory: Annotated[Path, typer.Option(help="Where to make the folder.")] = Path(),
) -> None:
    """Create a package with one plugin, its tests and settings, ready to install."""
    from forge_kernel.cli.scaffold import KINDS, package_files
    from forge_kernel.config.spelling import did_you_mean
    from forge_kernel.contract.plugin import Kind
    from forge_kernel.planning.catalog import Catalog

    module = _module_name(name)
    if kind not in KINDS:
        hints = (*did_you_mean(kind, KINDS), f"allowed: {', '.join(KINDS)}")
        raise ConfigError([Fault(f"there is no template for the kind '{kind}'", hints=hints)])
    if module in Catalog.installed().names(Kind(kind)):
        hint = f"see: forge plugins {kind}.{module}"
        raise ConfigError([Fault(f"there is a plugin '{kind}.{module}' already", hints=(hint,))])
    folder = directory / name
    if folder.exists():
        raise ConfigError([Fault(f"{folder} is there already")])
    files = package_files(name, module, kind)
    _write({folder / file: text for file, text in files.items()})
    print(f"{folder}: a plugin of the kind {kind}")
    print(f"  try it:  cd {folder} && pip install -e '.[dev]' && pytest && forge plugins {module}")


@app.command("pipeline")
def pipeline_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the run; the file's name.")],
    directory: Annotated[Path, typer.Option(help="Where to write the file.")] = Path(),
) -> None:
    """Create a commented pipeline file that runs, and the schema that editors check it by.

    The schema is the nearest schemas/pipeline.schema.json above the file; one is written beside
    the file where there is none.
    """
    from forge_kernel.cli.scaffold import pipeline_text

    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", name):
        raise ConfigError([Fault(f"'{name}' makes no name of a run")])
    file = directory / f"{name}.yaml"
    write_pipeline(file, lambda schema: pipeline_text(name, schema))
    print(f"{file}: try it with: forge run {file}")
