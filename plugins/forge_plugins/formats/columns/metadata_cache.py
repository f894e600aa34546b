"""Small things found out about a file's content, kept beside the cache so as not to look again.

A memo is a convenience: where it cannot be written, or is damaged, things are found out anew. Each
stands below the XXH3-128 of its text, which finds damage and is no defence against people.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import xxhash
from numpy.typing import NDArray

_FOLDER: Final = "memos"
_NUMBERS: Final = "numbers"
_BLOCK: Final = 1 << 18


def _hashed(body: bytes) -> bytes:
    return xxhash.xxh3_128_hexdigest(body).encode()


def file_hash(file: Path) -> str:
    """The XXH3-128 of a file's content, in hex."""
    digest = xxhash.xxh3_128()
    with file.open("rb", buffering=0) as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


class Memos:
    """JSON objects by key, one file each.

    Args:
        cache: the cache folder.
    """

    def __init__(self, cache: Path) -> None:
        self._folder = cache / _FOLDER

    def _path(self, key: tuple[str, ...], suffix: str = ".json") -> Path:
        name = hashlib.sha256("\0".join(key).encode("utf-8", "surrogateescape")).hexdigest()[:40]
        return self._folder / f"{name}{suffix}"

    def find(self, *key: str) -> dict[str, Any] | None:
        """What was kept under a key; None when nothing whole was."""
        try:
            head, _, body = self._path(key).read_bytes().partition(b"\n")
            if head != _hashed(body):
                return None
            result = json.loads(body)
        except (OSError, ValueError, RecursionError):
            return None
        return result["value"] if isinstance(result, dict) and result.get("key") == [*key] else None

    def keep(self, *key: str, value: Mapping[str, Any]) -> bool:
        """Keep an object; whether it could be written."""
        body = json.dumps({"key": [*key], "value": value}).encode()
        text = _hashed(body) + b"\n" + body
        return self._write(self._path(key), lambda stream: stream.write(text))

    def numbers(self, *key: str) -> NDArray[np.int64] | None:
        """The numbers that were kept under a key, mapped; None when there are none."""
        known, path = self.find(_NUMBERS, *key), self._path(key, ".npy")
        try:
            if known is None or known.get("xxh3_128") != file_hash(path):
                return None
            result = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError):
            return None
        return result if result.dtype == np.int64 and result.ndim == 1 else None

    def keep_numbers(self, *key: str, numbers: NDArray[np.int64]) -> bool:
        """Keep numbers; whether they could be written."""
        path = self._path(key, ".npy")
        if not self._write(path, lambda stream: np.save(stream, numbers, allow_pickle=False)):
            return False
        try:
            content = file_hash(path)
        except OSError:
            return False
        return self.keep(_NUMBERS, *key, value={"xxh3_128": content})

    def _write(self, path: Path, fill: Callable[[IO[bytes]], object]) -> bool:
        """Written elsewhere and renamed, so that nobody sees half of it."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._folder, prefix=".")
        except OSError:
            return False
        try:
            with os.fdopen(handle, "wb") as stream:
                fill(stream)
            Path(name).replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                Path(name).unlink(missing_ok=True)
            return False
        return True
