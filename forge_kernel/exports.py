"""The folders that exporters write, each committed whole with its manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from forge_kernel.durable import committed_folder, manifest_of, write_json


def write_exports(
    folder: Path, exporters: Iterable[tuple[str, Callable[[Path], Any]]]
) -> dict[str, str]:
    """One folder for each exporter; of two with one name the later gets underscores.

    Args:
        folder: the run folder.
        exporters: names, and what fills a folder and gives its manifest's facts.

    Returns:
        Folders written, by name, relative to the run folder.
    """
    written: dict[str, str] = {}
    for name, fill in exporters:
        while name in written:
            name += "_"  # noqa: PLW2901  the next free name
        final = folder / "exports" / name
        final.parent.mkdir(exist_ok=True)
        with committed_folder(final) as partial:
            manifest = dict(fill(partial))
            files = manifest_of(partial)
            write_json(partial / "manifest.json", {**manifest, "files": files})
        written[name] = str(final.relative_to(folder))
    return written
