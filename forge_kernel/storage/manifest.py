"""A checkpoint's manifest: what each of its files is, under a hash of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from forge_kernel.errors import CheckpointError
from forge_kernel.storage import atomic_files
from forge_kernel.storage.hashes import sha256, xxh3_128

MANIFEST: Final = "manifest.json"
SEAL: Final = "sha256"
SEALED_SINCE: Final = 3
"""The first format whose manifests carry their own hash."""
_HASHES: Final[Mapping[str, Callable[[Path], str]]] = {"xxh3_128": xxh3_128, "sha256": sha256}


def _content(facts: Mapping[str, Any]) -> bytes:
    return atomic_files.json_text(facts).encode("utf-8", "backslashreplace")


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write a manifest with the SHA-256 of the rest of its text as its last entry."""
    body = {name: value for name, value in facts.items() if name != SEAL}
    sealed = {**body, SEAL: hashlib.sha256(_content(body)).hexdigest()}
    atomic_files.write_bytes(folder / MANIFEST, _content(sealed))


def read_manifest(folder: Path) -> dict[str, Any]:
    """A folder's manifest, as it was written.

    Raises:
        CheckpointError: it is altered, or is no manifest.
        OSError: it cannot be read.
    """
    content = (folder / MANIFEST).read_bytes()
    facts = json.loads(content)
    if not isinstance(facts, dict) or not isinstance(facts.get("format"), int):
        raise CheckpointError(f"{folder / MANIFEST} is no manifest of a checkpoint")
    if SEAL in facts or facts["format"] >= SEALED_SINCE:
        body = {name: value for name, value in facts.items() if name != SEAL}
        # the text is compared too: what JSON reads the same (a blank, a doubled key) is altered
        same = facts.get(SEAL) == hashlib.sha256(_content(body)).hexdigest()
        if not same or content != _content(facts):
            raise CheckpointError(f"{folder} is damaged: {MANIFEST} is not as it was written")
    return facts


def entry(file: Path) -> dict[str, int | str]:
    """What a manifest says of a file."""
    return {"bytes": file.stat().st_size, "xxh3_128": xxh3_128(file)}


def check_files(folder: Path, files: Mapping[str, Any], required: Iterable[str]) -> None:
    """Compare every byte with a manifest, of this format or an older one.

    Raises:
        CheckpointError: a file is missing, not listed though it is required, or has changed.
    """
    for name in required:
        if name not in files:
            raise CheckpointError(f"{folder} is damaged: {MANIFEST} does not list {name}")
    for name, known in files.items():
        wrong = _difference(folder / name, name, known)
        if wrong is not None:
            raise CheckpointError(f"{folder} is damaged: {wrong}")


def _difference(file: Path, name: str, known: Mapping[str, Any]) -> str | None:
    if not file.is_file():
        return f"{name} is missing"
    size = file.stat().st_size
    if size != known["bytes"]:
        return f"{name} has {size} bytes, not {known['bytes']}"
    kinds = [kind for kind in _HASHES if kind in known]
    if not kinds:
        return f"{MANIFEST} has no hash of {name}"
    if any(_HASHES[kind](file) != known[kind] for kind in kinds):
        return f"the content of {name} has changed"
    return None


def unlisted(folder: Path, files: Mapping[str, Any]) -> list[str]:
    """Files below a folder that its manifest does not list."""
    below = (path for path in folder.rglob("*") if not path.is_dir())
    names = (path.relative_to(folder).as_posix() for path in below)
    return sorted(name for name in names if name not in files and name != MANIFEST)
