"""A checkpoint's manifest: what each of its files is, under a hash of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from forge_kernel.errors import CheckpointError
from forge_kernel.storage.atomic_files import write_bytes
from forge_kernel.storage.hashes import sha256, xxh3_128
from forge_kernel.storage.seal import SEAL, is_as_written, sealed

MANIFEST: Final = "manifest.json"
SEALED_SINCE: Final = 3
"""The first format whose manifests carry their own hash."""
_HASHES: Final[Mapping[str, Callable[[Path], str]]] = {"xxh3_128": xxh3_128, "sha256": sha256}


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write a manifest with the SHA-256 of the rest of its text as its last entry."""
    write_bytes(folder / MANIFEST, sealed(facts))


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
    needs_seal = SEAL in facts or facts["format"] >= SEALED_SINCE
    if needs_seal and not is_as_written(content, facts):
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
