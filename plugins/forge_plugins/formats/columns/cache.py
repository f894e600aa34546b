"""Columns that were read once, kept as `.npy` files under the hash of what they were read from."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import xxhash

from forge_plugins.formats.columns.column_writer import DEFECTS
from forge_plugins.formats.columns.gather import Column
from forge_plugins.formats.columns.metadata_cache import Memos, file_hash
from forge_plugins.formats.columns.source_file import SETTLED
from forge_plugins.formats.errors import DataError

if sys.platform != "win32":
    import fcntl

VERSION: Final = 6
"""Of the folders' form and of what all readers share."""
_MANIFEST: Final = "manifest.json"
_SEAL: Final = "xxh3_128"
_VERIFIED: Final = "verified"
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


def _sealed(manifest: dict[str, Any]) -> str:
    """A manifest's text with the hash of the rest of it."""
    body = {name: value for name, value in manifest.items() if name != _SEAL}
    return json.dumps({**body, _SEAL: xxhash.xxh3_128_hexdigest(json.dumps(body).encode())})


def _stamp(file: Path) -> list[int]:
    """What changes when a file is written to or is another; as in `Source.content`."""
    about = file.stat()
    return [about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns]


def _is_intact(folder: Path, files: list[Path], hashes: list[str], *, verify: bool) -> bool:
    """Whether files are as they were written.

    They are read and hashed unless that was done before and their stamps are what they were.
    """
    memos = Memos(folder.parent)
    stamps = [_stamp(file) for file in files]
    known = None if verify else memos.find(_VERIFIED, folder.name)
    if known is not None and known["stamps"] == stamps and known["hashes"] == hashes:
        return True
    now = time.time()
    if [file_hash(file) for file in files] != hashes:
        return False
    settled = all(abs(now - max(stamp[3:]) / 1e9) > SETTLED for stamp in stamps)
    if settled:
        memos.keep(_VERIFIED, folder.name, value={"stamps": stamps, "hashes": hashes})
    return True


@dataclass(frozen=True)
class Kept:
    """What a cache folder holds.

    Args:
        columns: array by name, mapped.
        defects: of the records, for a lenient reading, mapped; None for another.
        others: names of the file's columns that were not read.
        about: what was described of columns.
    """

    columns: dict[str, Column]
    defects: Column | None
    others: tuple[str, ...]
    about: dict[str, dict[str, Any]] = field(default_factory=dict)


def _mapped(folder: Path, *, verify: bool = False, fresh: bool = False) -> Kept | None:
    """What a cache folder holds; None if there is none or it is not whole.

    Args:
        folder: of the cache.
        verify: hash its files whatever their stamps say.
        fresh: it was written just now by this process: its files are not hashed again.
    """
    try:
        text = (folder / _MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        if text != _sealed(manifest):
            return None
        paths = [folder / name for name in manifest["files"]]
        if not fresh and not _is_intact(folder, paths, manifest["hashes"], verify=verify):
            return None
        files = {path.name: np.load(path, mmap_mode="r", allow_pickle=False) for path in paths}
        columns = {name: files[f"{number}.npy"] for number, name in enumerate(manifest["columns"])}
        others, about = tuple(manifest["others"]), manifest.get("about", {})
        return Kept(columns, files.get(DEFECTS), others, about)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def cached(folder: Path, key: str, *, verify: bool = False) -> Kept | None:
    """What was kept under a key; None if there is nothing.

    Args:
        folder: the cache.
        key: from `content_key`.
        verify: read all of them and compare their hashes; else that is done when a file's inode,
            size or times are not what they were then.
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
        verify: see `cached`.

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
                result = _mapped(folder / key, fresh=True)
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
        "hashes": [file_hash(item) for item in files],
        "source": file.name,
    }
    (building / _MANIFEST).write_text(_sealed(manifest), encoding="utf-8")
    _to_disk(building / _MANIFEST)
    result = _mapped(building, fresh=True)
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
