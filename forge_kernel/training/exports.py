"""The folders that exporters write, each committed whole with its manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from forge_kernel.storage.atomic_files import (
    clear_abandoned_folders,
    committed_folder,
    make_folder,
    manifest_of,
    write_json,
)


def write_exports(
    folder: Path, exporters: Iterable[tuple[str, Callable[[Path], Any]]]
) -> tuple[dict[str, str], dict[str, BaseException]]:
    """One folder for each exporter; of two with one name the later gets underscores.

    What a run has learned is not lost by an exporter that fails, nor by the next one not written.

    Args:
        folder: the run folder.
        exporters: names, and what fills a folder and gives its manifest's facts.

    Returns:
        Folders written, by name, relative to the run folder; and what others failed of.
    """
    written: dict[str, str] = {}
    failed: dict[str, BaseException] = {}
    for name, fill in exporters:
        while name in written or name in failed:
            name += "_"  # noqa: PLW2901  the next free name
        final = folder / "exports" / name
        try:
            make_folder(final.parent)
            clear_abandoned_folders(final)
            with committed_folder(final) as partial:
                manifest = dict(fill(partial))
                files = manifest_of(partial)
                write_json(partial / "manifest.json", {**manifest, "files": files})
        except (Exception, SystemExit) as error:  # noqa: BLE001  told by name; the other exports are written
            failed[name] = error
            continue
        written[name] = str(final.relative_to(folder))
    return written, failed
