"""A disk after the power was lost, by POSIX alone: what was not synced may be there or not.

a file       its content at the last fsync; of what was written since, any part: each write
             whole, torn at a sector, as zeros, or not at all, in any order
a folder     its entries at the last fsync; of what was changed since, any part. A rename within
             a folder is one change: the new name is there or the old one is
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from file_layer import Listener, Operation

_SECTOR = 512
Entries = dict[str, int]


@dataclass
class _File:
    content: bytes = b""
    synced: bytes = b""
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)  # None: cut to a length


@dataclass
class _Folder:
    entries: Entries = field(default_factory=dict)
    synced: Entries = field(default_factory=dict)
    pending: list[Callable[[Entries], None]] = field(default_factory=list)


class Recorder(Listener):
    """Keeps every operation below a folder, with what the program had promised by then."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.steps: list[Operation | Any] = []
        self._files: dict[tuple[int, int], bytes] = {}

    def mark(self, promise: Any) -> None:
        """What holds from here on."""
        self.steps.append(promise)

    def before(self, operation: Operation) -> None:
        """An `open` that makes a file is told apart from one of a file that is there."""
        if operation.kind == "open" and operation.writes:
            self._new = not (self.root / operation.path).exists()

    def after(self, operation: Operation) -> None:
        """Keep it; of a file that native code has written, its content at the fsync."""
        if operation.kind == "open":
            if not operation.writes:
                return
            operation = Operation("create" if self._new else "reopen", operation.path)
            size = (self.root / operation.path).stat().st_size
            self.steps += [operation, Operation("truncate", operation.path, offset=size)]
            return
        if operation.kind == "fsync" and (self.root / operation.path).is_file():
            content = (self.root / operation.path).read_bytes()
            self.steps.append(Operation("native", operation.path, content=content))
        self.steps.append(operation)


class Disk:
    """The tree as it is for the program, and as it may be after a loss of power."""

    def __init__(self) -> None:
        self.nodes: list[_File | _Folder] = [_Folder()]

    def _find(self, path: str) -> int:
        node = 0
        for name in PurePosixPath(path).parts:
            folder = self.nodes[node]
            assert isinstance(folder, _Folder)
            node = folder.entries[name]
        return node

    def _folder_of(self, path: str) -> tuple[_Folder, str]:
        place = PurePosixPath(path)
        folder = self.nodes[self._find(str(place.parent))]
        assert isinstance(folder, _Folder)
        return folder, place.name

    def _change(self, folder: _Folder, change: Callable[[Entries], None]) -> None:
        change(folder.entries)
        folder.pending.append(change)

    def _file(self, path: str) -> _File:
        """A file; one that native code made is new here."""
        folder, name = self._folder_of(path)
        if name not in folder.entries:
            self._make(path, _File())
        node = self.nodes[folder.entries[name]]
        assert isinstance(node, _File)
        return node

    def _make(self, path: str, node: _File | _Folder) -> None:
        folder, name = self._folder_of(path)
        self.nodes.append(node)
        number = len(self.nodes) - 1
        self._change(folder, lambda entries: entries.update({name: number}))

    def apply(self, operation: Operation) -> None:
        """Do it, as the program sees it."""
        kind, path = operation.kind, operation.path
        if kind == "create":
            self._make(path, _File())
        elif kind == "mkdir":
            self._make(path, _Folder())
        elif kind == "rename":
            self._rename(path, operation.to)
        elif kind in ("unlink", "rmdir"):
            folder, name = self._folder_of(path)
            self._change(folder, lambda entries: entries.pop(name, None) and None)
        elif kind == "fsync":
            self._fsync(path)
        elif kind == "write":
            self._write(self._file(path), operation.offset, operation.content)
        elif kind == "truncate":
            file = self._file(path)
            file.content = file.content[: operation.offset].ljust(operation.offset, b"\0")
            file.pending.append((operation.offset, None))
        elif kind == "native" and self._file(path).content != operation.content:
            self._write(self._file(path), 0, operation.content)

    @staticmethod
    def _write(file: _File, offset: int, content: bytes) -> None:
        file.content = written(file.content, offset, content)
        file.pending.append((offset, content))

    def _rename(self, source: str, target: str) -> None:
        folder, name = self._folder_of(source)
        other, new = self._folder_of(target)
        number = folder.entries[name]
        if folder is other:
            self._change(folder, lambda entries: _renamed(entries, name, new, number))
            return
        self._change(other, lambda entries: entries.update({new: number}))
        self._change(folder, lambda entries: entries.pop(name, None) and None)

    def _fsync(self, path: str) -> None:
        node = self.nodes[self._find(path)]
        if isinstance(node, _File):
            node.synced = node.content
        else:
            node.synced = dict(node.entries)
        node.pending.clear()

    def lost(self, draw: random.Random, target: Path) -> None:
        """Write one state that the disk may have."""
        share = draw.choice((0.0, 0.2, 0.5, 0.8, 1.0))  # of what was not synced is there
        stack = [(0, target)]
        while stack:
            number, place = stack.pop()
            node = self.nodes[number]
            if isinstance(node, _File):
                place.write_bytes(_survived(node, share, draw))
                continue
            place.mkdir()
            entries = dict(node.synced)
            for change in node.pending:
                if draw.random() < share:
                    change(entries)
            stack += [(inner, place / name) for name, inner in entries.items()]


def _renamed(entries: Entries, name: str, new: str, number: int) -> None:
    if entries.get(name) == number:
        del entries[name]
    entries[new] = number


def written(content: bytes, offset: int, added: bytes) -> bytes:
    """A file's content after a write."""
    return content[:offset].ljust(offset, b"\0") + added + content[offset + len(added) :]


def _survived(file: _File, share: float, draw: random.Random) -> bytes:
    content = file.synced
    pending = list(file.pending)
    if draw.random() < 0.3:
        draw.shuffle(pending)
    for offset, added in pending:
        if draw.random() >= share:
            continue
        if added is None:
            content = content[:offset].ljust(offset, b"\0")
        else:
            content = written(content, offset, _torn(added, draw.random(), draw))
    return content


def _torn(added: bytes, kind: float, draw: random.Random) -> bytes:
    """What of a write is there: its length without its bytes, some sectors of it, or all."""
    if kind < 0.2:
        return bytes(len(added))
    if kind < 0.4:
        return added[: draw.randrange(len(added) + 1) // _SECTOR * _SECTOR]
    return added
