"""Configurations that older versions wrote into run folders, in today's words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from forge_kernel.config.document import Document, Path, show_path, walk
from forge_kernel.errors import ConfigError, Fault
from forge_kernel.planning.catalog import Catalog
from forge_kernel.planning.pipeline_file import load_named
from forge_kernel.renamed import KINDS, PLUGINS


def migrated(document: Document, catalog: Catalog) -> Document:
    """A recorded configuration with today's names, in place.

    What a user writes by hand is refused under its old name, with the new one; what a run has
    written about itself is read on. Kinds and plugins stand in `forge_kernel.renamed`; a plugin's
    configuration says in `renamed` what a setting is called today (`adapt.figure: metric`) or where
    of the run it is (`ignore: run.ignore_index`), and in `renamed_values` what became of its
    values. What stands there under its new name already stays.

    Args:
        document: a run folder's `config.yaml`, with the overrides.
        catalog: the installed plugins.

    Raises:
        ConfigError: two plugins gave one setting of the run different values.
    """
    for old, new in KINDS.items():
        if old in document.data:
            named = document.data.pop(old)
            document.data.setdefault(new, named)
    for path, value in walk(document.data):
        names = PLUGINS.get(str(path[0]), {}) if path else {}  # others may have such a name
        if isinstance(value, dict) and isinstance(value.get("use"), str) and value["use"] in names:
            value["use"] = names[value["use"]]
    classes, _ = load_named(document, catalog)
    configs = {name: result.info.config for (_, name), result in classes.items()}
    moved: dict[str, Any] = {}
    run = document.data.get("run")
    chosen = run if isinstance(run, dict) else {}
    for path, value in list(walk(document.data)):
        config = configs.get(value.get("use", "")) if isinstance(value, Mapping) else None
        settings = value.get("with") if config is not None else None
        if not isinstance(settings, dict):
            continue
        values = getattr(config, "renamed_values", {})
        for old, new in getattr(config, "renamed", {}).items():
            if new.startswith("run."):
                _move_to_run(document, path, settings, (old, new), chosen, moved)
                continue
            for place in _places(settings, old.split(".")[:-1]):
                last = old.rpartition(".")[2]
                if last in place:
                    given = place.pop(last)
                    table = values.get(last, {})
                    hashable = isinstance(given, str | int | float | bool)
                    place.setdefault(new, table.get(given, given) if hashable else given)
    chosen.update(moved)
    return document


def _places(settings: dict[str, Any], within: list[str]) -> list[dict[str, Any]]:
    """The mappings at a path of keys, of which `*` is any."""
    places = [settings]
    for key in within:
        inner = [v for place in places for k, v in place.items() if key in ("*", k)]
        places = [value for value in inner if isinstance(value, dict)]
    return places


def _move_to_run(
    document: Document,
    path: Path,
    settings: dict[str, Any],
    names: tuple[str, str],
    chosen: Mapping[str, Any],
    moved: dict[str, Any],
) -> None:
    """Take a setting that the whole run has today out of a plugin's."""
    old, new = names[0], names[1].removeprefix("run.")
    if old not in settings:
        return
    given = settings.pop(old)
    if given is None or new in chosen:
        return
    if moved.setdefault(new, given) != given:
        raise ConfigError([_contradiction(document, path, new, moved[new], given)])


def _contradiction(document: Document, path: Path, name: str, first: Any, other: Any) -> Fault:
    message = (
        f"this run was made with the values {first!r} and {other!r} of what is run.{name} today, "
        "which has one value"
    )
    return Fault(message, show_path(path), document.mark(path), (f"choose: --set run.{name}=...",))
