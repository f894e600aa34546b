"""Files and folders that are whole or absent, also after a crash of the machine."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from forge_kernel.storage.hashes import sha256


def sync_file(file: Path) -> None:
    """Wait until the file's bytes are on the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Wait until the folder's entries are on the disk (where the system can)."""
    if os.name == "nt":
        return
    sync_file(folder)


def json_text(data: Any) -> str:
    """Strict JSON.

    Raises:
        ValueError: NaN or an infinity in it.
    """
    return json.dumps(data, allow_nan=False, indent=1, ensure_ascii=False) + "\n"


def write_text(file: Path, text: str, *, durable: bool = True) -> None:
    """Replace a file's content in one step.

    Args:
        file: the file.
        text: its new content; halves of characters are escaped, as JSON has them.
        durable: also wait for the disk; without it a reader still sees the old or the new file.
    """
    write_bytes(file, text.encode("utf-8", "backslashreplace"), durable=durable)


def write_bytes(file: Path, content: bytes, *, durable: bool = True) -> None:
    """Replace a file's content in one step; see `write_text`."""
    beside = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    try:
        beside.write_bytes(content)
        if durable:
            sync_file(beside)
        beside.replace(file)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(file.parent)


def write_json(file: Path, data: Any, *, durable: bool = True) -> None:
    """Replace a file by strict JSON in one step."""
    write_text(file, json_text(data), durable=durable)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, each entry on the disk before the next; it may be there."""
    missing: list[Path] = []
    place = folder
    while not place.is_dir() and len(missing) < len(folder.parts):
        missing.append(place)
        place = place.parent
    for made in reversed(missing):
        made.mkdir(exist_ok=True)
        sync_folder(made.parent)


def _sync_tree(folder: Path) -> None:
    for place, _, names in os.walk(folder):
        for name in names:
            sync_file(Path(place) / name)
        sync_folder(Path(place))


@contextmanager
def committed_folder(final: Path) -> Iterator[Path]:
    """A folder that appears under its final name only when the block has ended well.

    Everything is written under `.<name>.partial-<id>` beside it, synced, then renamed in one
    step. A folder of that name that is there already is replaced.

    Args:
        final: where the folder is to stand; its parent must exist.
    """
    token = uuid.uuid4().hex[:8]
    partial = final.with_name(f".{final.name}.partial-{token}")
    partial.mkdir()
    try:
        yield partial
        _sync_tree(partial)
        if final.exists():
            old = final.with_name(f".{final.name}.replaced-{token}")
            final.rename(old)
            _in_place_of(old, partial, final)
        else:
            partial.rename(final)
            sync_folder(final.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _in_place_of(old: Path, partial: Path, final: Path) -> None:
    """Give the new folder its name; the old one goes once that is on the disk.

    Where the name cannot be given, the old one gets it back.
    """
    try:
        partial.rename(final)
    except BaseException:
        old.rename(final)
        raise
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def manifest_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below a folder, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in files
    }
