"""Columns that were read once, kept as `.npy` files under the hash of what they were read from."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import numpy as np

from forge_plugins.formats.fault import DataFault
from forge_plugins.formats.table import Column, check_numeric

VERSION: Final = 1
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


def _write(file: Path, path: Path, name: str, column: Column | Iterator[Column]) -> None:
    """One column as `.npy`, block by block when it comes so."""
    if isinstance(column, np.ndarray):
        check_numeric(file, name, column.dtype)
        np.save(path, np.ascontiguousarray(column), allow_pickle=False)
        return
    count, first = 0, None
    with path.open("wb") as stream:
        for block in column:
            if first is None:
                first = block[:0]
                np.lib.format.write_array_header_1_0(stream, _about(first, 2**62))
                start = stream.tell()
            stream.write(np.ascontiguousarray(block, first.dtype).tobytes())
            count += len(block)
        if first is None:
            raise DataFault(file, "there are no records", field=name, hint="give at least one")
        stream.seek(0)
        np.lib.format.write_array_header_1_0(stream, _about(first, count))
        assert stream.tell() == start, "numpy pads headers for a growing first dimension"


def _about(rows: Column, count: int) -> dict[str, object]:
    told = np.lib.format.header_data_from_array_1_0(np.ascontiguousarray(rows))
    return {**told, "shape": (count, *rows.shape[1:])}


def keep(
    file: Path, folder: Path, key: str, columns: Mapping[str, Column | Iterator[Column]]
) -> dict[str, Column]:
    """Write columns under a key and map them.

    They are written elsewhere and renamed, so that no process sees half of them; of two that do so
    at once, one finds the other's.

    Raises:
        DataFault: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as scratch:
            building = Path(scratch) / key
            building.mkdir()
            for number, (name, column) in enumerate(columns.items()):
                _write(file, building / f"{number}.npy", name, column)
            sizes = [(building / f"{number}.npy").stat().st_size for number in range(len(columns))]
            manifest = json.dumps({"columns": list(columns), "sizes": sizes, "source": file.name})
            (building / _MANIFEST).write_text(manifest, encoding="utf-8")
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
