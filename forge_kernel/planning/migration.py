"""Configurations that older versions wrote into run folders, in today's words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from forge_kernel.config.document import Document, Path, show_path, walk
from forge_kernel.errors import ConfigError, Fault
from forge_kernel.planning.catalog import Catalog
from forge_kernel.planning.pipeline_file import load_named


def migrated(document: Document, catalog: Catalog) -> Document:
    """A recorded configuration whose settings have moved since, in place.

    What a user writes by hand is refused under its old name, with the new one; what a run has
    written about itself is read on. A plugin's configuration says in `renamed` where a setting is
    today: `run.NAME`. One that the run has under its new name already stays.

    Args:
        document: a run folder's `config.yaml`, with the overrides.
        catalog: the installed plugins.

    Raises:
        ConfigError: two plugins gave one setting of the run different values.
    """
    classes, _ = load_named(document, catalog)
    renamed = {
        name: getattr(found.info.config, "renamed", None) for (_, name), found in classes.items()
    }
    moved: dict[str, Any] = {}
    run = document.data.get("run")
    chosen = run if isinstance(run, dict) else {}
    for path, value in list(walk(document.data)):
        table = renamed.get(value.get("use", "")) if isinstance(value, Mapping) else None
        settings = value.get("with") if table else None
        for old in [old for old in table or () if isinstance(settings, dict) and old in settings]:
            assert table is not None
            assert isinstance(settings, dict)
            given, new = settings.pop(old), table[old].removeprefix("run.")
            if given is None or new in chosen:
                continue
            if moved.setdefault(new, given) != given:
                raise ConfigError([_contradiction(document, path, new, moved[new], given)])
    chosen.update(moved)
    return document


def _contradiction(document: Document, path: Path, name: str, one: Any, other: Any) -> Fault:
    message = (
        f"this run was made with the values {one!r} and {other!r} of what is run.{name} today, "
        "which has one value"
    )
    return Fault(message, show_path(path), document.mark(path), (f"choose: --set run.{name}=...",))
