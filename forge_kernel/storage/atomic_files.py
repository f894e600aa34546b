"""Files and folders that are whole or absent, also after a crash of the machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from forge_kernel.storage.hashes import sha256

_BESIDE: Final = re.compile(r"\..+\.[0-9a-f]{8}")  # as `write_bytes` names what is not whole yet


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


def make_folder(folder: Path) -> list[Path]:
    """Make a folder and those above it, each entry on the disk before the next; it may be there.

    Returns:
        Those that were made, the innermost first.
    """
    missing: list[Path] = []
    place = folder
    while not place.is_dir() and len(missing) < len(folder.parts):
        missing.append(place)
        place = place.parent
    for made in reversed(missing):
        made.mkdir(exist_ok=True)
        sync_folder(made.parent)
    return missing


def _sync_tree(folder: Path) -> None:
    for place, _, names in os.walk(folder):
        for name in names:
            sync_file(Path(place) / name)
        sync_folder(Path(place))


def remove_folder(folder: Path) -> None:
    """Remove a committed folder, or leave it whole: none is seen under its name half gone.

    Where that fails, what is left is cleared with what cut commits leave.
    """
    gone = folder.with_name(f".{folder.name}.partial-{uuid.uuid4().hex[:8]}")
    with suppress(OSError):
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def clear_abandoned_files(folder: Path) -> None:
    """Remove what cut writes of files left in a folder, by who alone writes there."""
    for path in list(folder.iterdir()):
        if _BESIDE.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def clear_abandoned_folders(final: Path) -> None:
    """Remove what commits of a folder left that were cut; nothing while another one is at it.

    One that was moved aside and has nothing in its place is put back.
    """
    for partial in final.parent.glob(f".{final.name}.partial-*"):
        with _locked(partial) as alone:
            if not alone:
                return
            shutil.rmtree(partial, ignore_errors=True)
    for old in final.parent.glob(f".{final.name}.replaced-*"):
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(final)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold a folder's lock, which ends with the process; whether it could be had."""
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


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
        with _locked(partial):  # so that `clear_abandoned_folders` knows that somebody is at it
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
