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
from pathlib import Path
from typing import Any, Final

import numpy as np

from forge_plugins.formats.fault import DataFault
from forge_plugins.formats.gather import Column

if sys.platform != "win32":
    import fcntl

VERSION: Final = 4
"""Of the folders' form and of what all readers share."""
_MANIFEST: Final = "manifest.json"
_TRIES: Final = 1000


def default_folder(file: Path) -> Path:
    """Where caches lie unless told: below the user's cache folder.

    Args:
        file: the data file, for messages.

    Raises:
        DataFault: the user has no folder.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        home = Path(base) if base else Path.home() / ".cache"
    except RuntimeError as error:
        hint = "give cache_dir, or set XDG_CACHE_HOME"
        raise DataFault(file, f"there is no folder for a cache: {error}", hint=hint) from error
    return home / "forge-kernel" / "data"


def content_key(content: str, *settings: str) -> str:
    """The name of a cache: of a content hash and of what else shapes the columns."""
    text = "/".join((str(VERSION), *settings, content))
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def _checksum(file: Path) -> int:
    """CRC-32: against bits that flip, not against people, who could write another manifest."""
    found = 0
    with file.open("rb", buffering=0) as stream:
        while block := stream.read(2**18):
            found = zlib.crc32(block, found)
    return found


def _mapped(folder: Path, *, verify: bool = False) -> dict[str, Column] | None:
    """The columns of a cache folder; None if there is none or it is not whole."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        columns = {}
        for number, name in enumerate(manifest["columns"]):
            column = folder / f"{number}.npy"
            if column.stat().st_size != manifest["sizes"][number]:
                return None
            if verify and _checksum(column) != manifest["checksums"][number]:
                return None
            columns[name] = np.load(column, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
    return columns


def cached(folder: Path, key: str, *, verify: bool = False) -> dict[str, Column] | None:
    """The columns that were kept under a key, mapped; None if there are none.

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
    fill: Callable[[Path], list[str]],
    check: Callable[[dict[str, Column]], object],
    *,
    verify: bool = False,
) -> dict[str, Column]:
    """Write columns under a key and map them, unless another process has done so.

    They are written beside and renamed, so that no process sees half of them; a process that finds
    another at it waits. What a killed one has left is removed.

    Args:
        file: the data file, for messages.
        folder: the cache.
        key: from `content_key`.
        fill: writes the columns into an empty folder, as `0.npy` and so on; their names.
        check: looks at the written columns; what it refuses is not kept.
        verify: columns that are there are kept only if their checksums are what they were.

    Raises:
        DataFault: the folder cannot be written, or what `fill` and `check` raise.
    """
    building = folder / f".building-{key}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder, key):
            found = _mapped(folder / key, verify=verify)
            if found is None:
                try:
                    _build(file, building, fill, check)
                    _place(building, folder / key)
                finally:
                    shutil.rmtree(building, ignore_errors=True)
                found = _mapped(folder / key)
    except OSError as error:
        hint = "give cache_dir a folder that can be written and has room"
        raise DataFault(file, f"the cache {folder} cannot be written: {error}", hint=hint) from (
            error
        )
    if found is None:
        raise DataFault(
            file, f"the cache {folder / key} is broken again", hint="remove that folder"
        )
    return found


def _build(
    file: Path,
    building: Path,
    fill: Callable[[Path], list[str]],
    check: Callable[[dict[str, Column]], object],
) -> None:
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    names = fill(building)
    columns = [building / f"{number}.npy" for number in range(len(names))]
    for column in columns:
        _to_disk(column)
    manifest: dict[str, Any] = {
        "columns": names,
        "sizes": [column.stat().st_size for column in columns],
        "checksums": [_checksum(column) for column in columns],
        "source": file.name,
    }
    (building / _MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    _to_disk(building / _MANIFEST)
    check(_mapped(building) or {})


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
