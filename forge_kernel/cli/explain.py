"""`forge explain`: a value of a pipeline and what set it."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from forge_kernel.cli.options import AsJson, File, Settings


def explain_command(
    file: File,
    key: Annotated[str, typer.Argument(metavar="KEY", help="For example gradients[0].with.alpha.")],
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Show where a value comes from. The file and line, the argument or the default."""
    from forge_kernel.config.document import look_up, show_path, walk
    from forge_kernel.config.layers import parse_key
    from forge_kernel.config.spelling import did_you_mean
    from forge_kernel.errors import ConfigError, Fault
    from forge_kernel.planning.catalog import Catalog
    from forge_kernel.planning.pipeline_file import check_document, fill, read_document

    catalog = Catalog.installed()
    document = read_document(file, settings or ())
    filled = fill(check_document(document, catalog))
    path = parse_key(key)
    try:
        value = look_up(filled, path or (key,))
    except KeyError as error:
        known = [show_path(result) for result, _ in walk(filled) if result]
        hints = did_you_mean(key, known)
        raise ConfigError([Fault(f"there is no setting '{key}'", hints=hints)]) from error
    assert path is not None, "a key that was found has been read"
    mark = document.values.get(path)
    origin = str(mark) if mark is not None else _default_origin(path)
    if as_json:
        print(json.dumps({"key": key, "value": value, "set_by": origin}))
        return
    print(f"{key} = {json.dumps(value)}")
    print(f"  set by {origin}")
    if mark is not None:
        print("\n".join(mark.frame()))


def _default_origin(path: tuple[str | int, ...]) -> str:
    if path[0] == "run":
        return "the default of run"
    return f"the default of the {path[0]} plugin (see: forge plugins)"
