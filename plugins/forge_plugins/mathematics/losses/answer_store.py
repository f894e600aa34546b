"""A teacher's likeliest answers to many samples, in files: made once, found by what a sample holds.

    FOLDER/manifest.json           what they are of, and the hash of each file
    FOLDER/NAME.keys               of each sample its hash, where its rows begin, how many
    FOLDER/NAME.values, .classes   k log-probabilities (fp32) and classes (int32) of each row

A file that is not named in the manifest does not count: what was cut off leaves no trace.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final

import numpy as np
import torch
import xxhash
from torch import Tensor

from forge_plugins.mathematics.losses.chunked_distillation import TopAnswers

MANIFEST: Final = "manifest.json"
FORMAT: Final = 1
_KEY: Final = np.dtype([("key", "<u8"), ("check", "<u8"), ("begin", "<i8"), ("count", "<i8")])
_PARTS: Final = ("keys", "values", "classes")
_READ: Final = 2**24
"""Bytes that are hashed at a time."""


class StoreError(ValueError):
    """The folder holds no such answers; the message says why and how to mend it."""


def sample_keys(parts: Sequence[Tensor]) -> Any:
    """What tells samples apart: a hash of all that they hold.

    Args:
        parts: each of shape (samples, ...), on any device.

    Returns:
        uint64, shape (samples, 2).
    """
    rows = [np.ascontiguousarray(part.detach().cpu().numpy()) for part in parts]
    # the same numbers in another shape or type are another sample
    kind = xxhash.xxh3_64_intdigest(repr([(row.shape[1:], row.dtype.str) for row in rows]).encode())
    count = len(rows[0])
    flat = [row.reshape(count, -1).view(np.uint8) for row in rows]
    joined = np.ascontiguousarray(np.concatenate(flat, axis=1))
    result = np.empty((count, 2), np.uint64)
    for place in range(count):
        digest = xxhash.xxh3_128_intdigest(joined[place], seed=kind)
        result[place] = digest >> 64, digest & (2**64 - 1)
    return result


class AnswerStore:
    """Answers in a folder, read where they are asked for.

    Args:
        folder: where they lie.
        about: what they are of: plain data that another run compares with its own.
        shards: name, rows and file hashes of each part, as the manifest has them.
    """

    def __init__(
        self, folder: Path, about: Mapping[str, Any], shards: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        self.folder, self.about, self.shards = folder, dict(about), list(shards)
        self.count = int(about["k"])
        self._tables: list[tuple[Any, Any]] = []
        keys, places = [], []
        for number, shard in enumerate(self.shards):
            own = np.fromfile(folder / f"{shard['name']}.keys", _KEY)
            shape = (int(shard["rows"]), self.count)
            self._tables.append(tuple(  # type: ignore[arg-type]
                np.memmap(folder / f"{shard['name']}.{part}", kind, "r", shape=shape)
                for part, kind in (("values", "<f4"), ("classes", "<i4"))
            ) if shape[0] else (np.empty(shape, "<f4"), np.empty(shape, "<i4")))  # fmt: skip
            keys.append(own)
            places.append(np.full(len(own), number, np.int32))
        joined = np.concatenate(keys) if keys else np.empty(0, _KEY)
        order = np.argsort(joined["key"], kind="stable")
        self._keys = joined[order]
        self._shard = (np.concatenate(places) if places else np.empty(0, np.int32))[order]

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def bytes(self) -> int:
        """Of all files of answers."""
        return sum(
            (self.folder / f"{shard['name']}.{part}").stat().st_size
            for shard in self.shards
            for part in _PARTS
        )

    @classmethod
    def opened(cls, folder: Path) -> AnswerStore | None:
        """What a folder holds, each file compared with its hash; None: nothing yet.

        Raises:
            StoreError: it is damaged, or no folder of answers.
        """
        about = read_manifest(folder)
        if about is None:
            return None
        shards = about.pop("shards")
        for shard in shards:
            for part, digest in shard["files"].items():
                path = folder / f"{shard['name']}.{part}"
                if not path.is_file() or _digest(path) != digest:
                    raise StoreError(f"{path} is not what was written: {_ANEW}")
        return cls(folder, about, shards)

    def places(self, keys: Any) -> Any:
        """Where samples are among the keys; -1: nowhere.

        Args:
            keys: uint64, shape (samples, 2).
        """
        first = np.searchsorted(self._keys["key"], keys[:, 0])
        if not len(self._keys):
            return np.full(len(keys), -1)
        at = np.minimum(first, len(self._keys) - 1)
        same = (self._keys["key"][at] == keys[:, 0]) & (self._keys["check"][at] == keys[:, 1])
        return np.where(same, at, -1)

    def answers(self, keys: Any) -> TopAnswers:
        """The rows of samples, one sample after the other.

        Raises:
            KeyError: a sample has none.
        """
        places = self.places(keys)
        if (places < 0).any():
            raise KeyError(int((places < 0).sum()))
        values, classes = [], []
        for place in places.tolist():
            begin, count = int(self._keys["begin"][place]), int(self._keys["count"][place])
            table = self._tables[int(self._shard[place])]
            values.append(table[0][begin : begin + count])
            classes.append(table[1][begin : begin + count])
        return TopAnswers(
            torch.from_numpy(np.concatenate(values)),
            torch.from_numpy(np.concatenate(classes).astype(np.int64)),
        )

    def writer(self) -> ShardWriter:
        """For samples that are not here yet; to be used as a context."""
        return ShardWriter(self)


class ShardWriter:
    """Appends answers; they count when the context is left without an error.

    Args:
        store: what they are added to.
    """

    def __init__(self, store: AnswerStore) -> None:
        self.store = store
        self.rows = 0
        self.seen: set[int] = set()
        self._name = f"answers-{len(store.shards)}-{secrets.token_hex(4)}"
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> ShardWriter:
        folder = self.store.folder
        folder.mkdir(parents=True, exist_ok=True)
        for part in _PARTS:
            self._files[part] = (folder / f"{self._name}.{part}").open("xb")
        return self

    def new(self, keys: Any) -> Any:
        """Numbers of the samples that are neither in the store nor written yet, each once."""
        absent = np.flatnonzero(self.store.places(keys) < 0)
        result = []
        for place in absent.tolist():
            key = int(keys[place, 0])
            if key not in self.seen:
                self.seen.add(key)
                result.append(place)
        return np.array(result, np.int64)

    def add(self, keys: Any, counts: Any, answers: TopAnswers) -> None:
        """Write some samples.

        Args:
            keys: uint64, shape (samples, 2).
            counts: rows of each, shape (samples,).
            answers: of all their rows, one sample after the other.
        """
        entries = np.empty(len(keys), _KEY)
        entries["key"], entries["check"] = keys[:, 0], keys[:, 1]
        entries["count"] = counts
        entries["begin"] = self.rows + np.cumsum(counts) - counts
        self._files["keys"].write(entries.tobytes())
        values, classes = (part.cpu().numpy() for part in answers)
        self._files["values"].write(np.ascontiguousarray(values, "<f4").tobytes())
        self._files["classes"].write(np.ascontiguousarray(classes, "<i4").tobytes())
        self.rows += len(values)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        folder = self.store.folder
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        paths = {part: folder / f"{self._name}.{part}" for part in _PARTS}
        if error is not None:
            for path in paths.values():
                path.unlink()
            return
        files = {part: _digest(path) for part, path in paths.items()}
        shard = {"name": self._name, "rows": self.rows, "files": files}
        _write_manifest(folder, self.store.about, [*self.store.shards, shard])


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What a folder says of its answers, with its `shards`; None: nothing yet.

    Raises:
        StoreError: it is damaged, or no folder of answers.
    """
    path = folder / MANIFEST
    if not path.is_file():
        if folder.exists() and (not folder.is_dir() or _has_others(folder)):
            raise StoreError(
                f"{folder} holds something else: name a folder of its own, or one that is not there"
            )
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        seal, about = data["seal"], data["about"]
        whole = seal == _seal(about) and about["format"] == FORMAT
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is damaged: {_ANEW}") from error
    if not whole:
        raise StoreError(f"{path} is damaged, or of another version: {_ANEW}")
    return dict(about)


_ANEW: Final = "remove the folder, and it is made anew"


def _has_others(folder: Path) -> bool:
    """Whether there is anything but what a cut-off writing left."""
    return any(not item.name.startswith(("answers-", MANIFEST)) for item in folder.iterdir())


def _write_manifest(folder: Path, about: Mapping[str, Any], shards: Sequence[Any]) -> None:
    body = {**about, "format": FORMAT, "shards": list(shards)}
    part = folder / f"{MANIFEST}.{secrets.token_hex(4)}"
    with part.open("w", encoding="utf-8") as file:
        json.dump({"about": body, "seal": _seal(body)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    part.replace(folder / MANIFEST)


def _seal(body: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())


def _digest(path: Path) -> str:
    result = xxhash.xxh3_128()
    size = path.stat().st_size
    with path.open("rb") as file:
        for _ in range(0, size, _READ):
            result.update(file.read(_READ))
    return result.hexdigest()


def digest_of(paths: Sequence[Path]) -> str:
    """One hash of several files, of their names too."""
    result = xxhash.xxh3_128()
    for path in paths:
        result.update(f"{path.name}:{_digest(path)}".encode())
    return result.hexdigest()
