"""Small things found out about a file's content, kept beside the cache so as not to look again.

A memo is a convenience: where it cannot be written, or is damaged, things are found out anew.
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
from numpy.typing import NDArray

_FOLDER: Final = "memos"


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
            result = json.loads(self._path(key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return result["value"] if isinstance(result, dict) and result.get("key") == [*key] else None

    def keep(self, *key: str, value: Mapping[str, Any]) -> bool:
        """Keep an object; whether it could be written."""
        text = json.dumps({"key": [*key], "value": value}).encode()
        return self._write(self._path(key), lambda stream: stream.write(text))

    def numbers(self, *key: str) -> NDArray[np.int64] | None:
        """The numbers that were kept under a key, mapped; None when there are none."""
        try:
            result = np.load(self._path(key, ".npy"), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError):
            return None
        return result if result.dtype == np.int64 and result.ndim == 1 else None

    def keep_numbers(self, *key: str, numbers: NDArray[np.int64]) -> bool:
        """Keep numbers; whether they could be written."""
        return self._write(
            self._path(key, ".npy"), lambda stream: np.save(stream, numbers, allow_pickle=False)
        )

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
