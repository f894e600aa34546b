"""Columns that were read once, kept as `.npy` files under the hash of what they were read from."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np

from forge_plugins.formats.column_file import ColumnFolder
from forge_plugins.formats.fault import DataFault
from forge_plugins.formats.table import Column

VERSION: Final = 2
"""Of the readers: a change of what they make of a file needs another one."""
_MANIFEST: Final = "manifest.json"


def default_folder() -> Path:
    """Where caches lie unless told: below the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "forge-kernel" / "data"


def content_hash(file: Path) -> str:
    """SHA-256 of a file's content, in hex.

    The content is hashed at each start: sizes and times do not tell every change.
    """
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def content_key(content: str, *settings: str) -> str:
    """The name of a cache: of a content hash and of what else shapes the columns."""
    text = "/".join((str(VERSION), *settings, content))
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def _mapped(folder: Path) -> dict[str, Column] | None:
    """The columns of a cache folder; None if there is none or it is not whole."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        columns = {}
        for number, name in enumerate(manifest["columns"]):
            column = folder / f"{number}.npy"
            if column.stat().st_size != manifest["sizes"][number]:
                return None
            columns[name] = np.load(column, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
    return columns


def cached(folder: Path, key: str) -> dict[str, Column] | None:
    """The columns that were kept under a key, mapped; None if there are none."""
    return _mapped(folder / key)


def keep(
    file: Path,
    folder: Path,
    key: str,
    fill: Callable[[ColumnFolder], None],
    check: Callable[[dict[str, Column]], object],
) -> dict[str, Column]:
    """Write columns under a key and map them.

    They are written elsewhere and renamed, so that no process sees half of them; of two that do so
    at once, one finds the other's.

    Args:
        file: the data file, for messages.
        folder: the cache.
        key: from `content_key`.
        fill: writes the columns.
        check: looks at the written columns; what it refuses is not kept.

    Raises:
        DataFault: the folder cannot be written, or what `fill` and `check` raise.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as scratch:
            building = Path(scratch) / key
            building.mkdir()
            columns = ColumnFolder(file, building)
            try:
                fill(columns)
                names = columns.close()
            finally:
                columns.abandon()
            sizes = [(building / f"{number}.npy").stat().st_size for number in range(len(names))]
            manifest = json.dumps({"columns": names, "sizes": sizes, "source": file.name})
            (building / _MANIFEST).write_text(manifest, encoding="utf-8")
            check(_mapped(building) or {})
            _place(building, folder / key, Path(scratch) / "old")
    except OSError as error:
        hint = "give cache_dir a folder that can be written and has room"
        raise DataFault(file, f"the cache {folder} cannot be written: {error}", hint=hint) from (
            error
        )
    found = _mapped(folder / key)
    if found is None:
        raise DataFault(
            file, f"the cache {folder / key} is broken again", hint="remove that folder"
        )
    return found


def _place(building: Path, target: Path, old: Path) -> None:
    """Rename into place; what lies there stays if it is whole."""
    try:
        building.rename(target)
    except OSError:
        if _mapped(target) is not None:
            return  # another process was faster
        target.rename(old)
        building.rename(target)
        shutil.rmtree(old, ignore_errors=True)
