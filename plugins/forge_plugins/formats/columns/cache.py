"""Columns that were read once, kept as `.npy` files under the hash of what they were read from."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from forge_plugins.formats.columns.column_writer import DEFECTS
from forge_plugins.formats.columns.gather import Column
from forge_plugins.formats.errors import DataError

if sys.platform != "win32":
    import fcntl

VERSION: Final = 5
"""Of the folders' form and of what all readers share."""
_MANIFEST: Final = "manifest.json"
_TRIES: Final = 1000


def default_folder(file: Path) -> Path:
    """Where caches lie unless told: below the user's cache folder.

    Args:
        file: the data file, for messages.

    Raises:
        DataError: the user has no folder.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        home = Path(base) if base else Path.home() / ".cache"
    except RuntimeError as error:
        hint = "give cache_dir, or set XDG_CACHE_HOME"
        raise DataError(file, f"there is no folder for a cache: {error}", hint=hint) from error
    return home / "forge-kernel" / "data"


def content_key(content: str, *settings: str) -> str:
    """The name of a cache: of a content hash and of what else shapes the columns."""
    text = "/".join((str(VERSION), *settings, content))
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def _checksum(file: Path) -> int:
    """CRC-32: against bits that flip, not against people, who could write another manifest."""
    result = 0
    with file.open("rb", buffering=0) as stream:
        while block := stream.read(2**18):
            result = zlib.crc32(block, result)
    return result


@dataclass(frozen=True)
class Kept:
    """What a cache folder holds.

    Args:
        columns: array by name, mapped.
        defects: of the records, for a lenient reading, mapped; None for another.
        others: names of the file's columns that were not read.
    """

    columns: dict[str, Column]
    defects: Column | None
    others: tuple[str, ...]


def _mapped(folder: Path, *, verify: bool = False) -> Kept | None:
    """What a cache folder holds; None if there is none or it is not whole."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        files = {}
        for number, name in enumerate(manifest["files"]):
            file = folder / name
            if file.stat().st_size != manifest["sizes"][number]:
                return None
            if verify and _checksum(file) != manifest["checksums"][number]:
                return None
            files[name] = np.load(file, mmap_mode="r", allow_pickle=False)
        columns = {name: files[f"{number}.npy"] for number, name in enumerate(manifest["columns"])}
        return Kept(columns, files.get(DEFECTS), tuple(manifest["others"]))
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def cached(folder: Path, key: str, *, verify: bool = False) -> Kept | None:
    """What was kept under a key; None if there is nothing.

    Args:
        folder: the cache.
        key: from `content_key`.
        verify: read all of them and compare their checksums.
    """
    return _mapped(folder / key, verify=verify)


@contextlib.contextmanager
def _alone(folder: Path, key: str) -> Iterator[None]:
    """Be the only process that builds under a key; the end of a process ends its claim."""
    if sys.platform == "win32":  # two may build the same, and one is kept
        yield
        return
    path = folder / f".lock-{key}"
    for _ in range(_TRIES):
        with path.open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                mine = path.stat().st_ino == os.fstat(lock.fileno()).st_ino
            except FileNotFoundError:
                mine = False
            if not mine:  # the last builder has removed it
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return
    raise OSError(f"{path} cannot be locked")


def keep(
    file: Path,
    folder: Path,
    key: str,
    fill: Callable[[Path], dict[str, Any]],
    check: Callable[[Kept], object],
    *,
    verify: bool = False,
) -> Kept:
    """Write columns under a key and map them, unless another process has done so.

    They are written beside and renamed, so that no process sees half of them; a process that finds
    another at it waits. What a killed one has left is removed.

    Args:
        file: the data file, for messages.
        folder: the cache.
        key: from `content_key`.
        fill: writes the columns into an empty folder; what `ColumnFolder.close` tells of them.
        check: looks at what was written; what it refuses is not kept.
        verify: columns that are there are kept only if their checksums are what they were.

    Raises:
        DataError: the folder cannot be written, or what `fill` and `check` raise.
    """
    building = folder / f".building-{key}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder, key):
            result = _mapped(folder / key, verify=verify)
            if result is None:
                try:
                    _build(file, building, fill, check)
                    _place(building, folder / key)
                finally:
                    shutil.rmtree(building, ignore_errors=True)
                result = _mapped(folder / key)
    except OSError as error:
        hint = "give cache_dir a folder that can be written and has room"
        raise DataError(file, f"the cache {folder} cannot be written: {error}", hint=hint) from (
            error
        )
    if result is None:
        raise DataError(
            file, f"the cache {folder / key} is broken again", hint="remove that folder"
        )
    return result


def _build(
    file: Path,
    building: Path,
    fill: Callable[[Path], dict[str, Any]],
    check: Callable[[Kept], object],
) -> None:
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    written = fill(building)
    files = [building / name for name in written["files"]]
    for item in files:
        _to_disk(item)
    manifest = {
        **written,
        "sizes": [item.stat().st_size for item in files],
        "checksums": [_checksum(item) for item in files],
        "source": file.name,
    }
    (building / _MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    _to_disk(building / _MANIFEST)
    result = _mapped(building)
    assert result is not None, "what was written just now is whole"
    check(result)


def _to_disk(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _place(building: Path, target: Path) -> None:
    """Rename into place; what lies there is not whole."""
    if target.exists():
        old = building.with_name(building.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        building.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        building.rename(target)
