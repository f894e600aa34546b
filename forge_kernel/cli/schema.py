"""`forge schema`: JSON Schemas for editors, readers and checks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from forge_kernel.cli.options import Settings
from forge_kernel.errors import ConfigError, Fault

_MAKE: Final = (
    "run it in the checkout, whose schemas/ it compares, or make one: forge schema --write schemas"
)


def schema_command(
    file: Annotated[
        str | None, typer.Argument(metavar="[FILE]", help="Compose the schema of this pipeline.")
    ] = None,
    settings: Settings = None,
    write: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write all schemas below this folder.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Verify that schemas/ is up to date (exit 1 if not).")
    ] = False,
) -> None:
    """Print, write or verify the schemas. Without options: the schema of pipeline files."""
    from forge_kernel.planning.catalog import Catalog
    from forge_kernel.planning.pipeline_file import compose_schema, load_named, read_document
    from forge_kernel.planning.schemas import all_schemas, schema_text

    catalog = Catalog.installed()
    if write is not None or check:
        folder = write or Path("schemas")
        texts = {name: schema_text(schema) for name, schema in all_schemas(catalog).items()}
        if write is not None:
            _write(folder, texts)
        if check:
            if not folder.is_dir():
                raise ConfigError([Fault(f"there is no folder {folder} here", hints=(_MAKE,))])
            _verify(folder, texts)
        return
    if file is None:
        print(json.dumps(all_schemas(catalog)["pipeline.schema.json"], indent=1))
        return
    classes, _ = load_named(read_document(file, settings or ()), catalog)
    composed: dict[str, Any] = compose_schema(catalog, classes)
    print(json.dumps(composed, indent=1))


def _write(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    for stale in sorted(set(_present(folder)) - set(texts)):
        (folder / stale).unlink()
    print(f"{folder}: {len(texts)} schemas")


def _present(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*.json")]


def _verify(folder: Path, texts: dict[str, str]) -> None:
    present = set(_present(folder))
    stale = sorted(
        name
        for name, text in texts.items()
        if name not in present or (folder / name).read_text(encoding="utf-8") != text
    )
    extra = sorted(present - set(texts))
    for name in stale:
        print(f"{folder / name}: not up to date")
    for name in extra:
        print(f"{folder / name}: of no installed plugin")
    if stale or extra:
        print(f"mend with: forge schema --write {folder}")
        raise typer.Exit(1)
    print(f"{folder}: up to date ({len(texts)} schemas)")
