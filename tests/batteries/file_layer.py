"""What a program asks of the file system below one folder, seen operation by operation.

Whoever listens is asked before each operation (and may refuse it with an error, or end the process)
and told after it. Of what native code writes only the `fsync` is seen.
"""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass(frozen=True)
class Operation:
    """One call.

    Args:
        kind: `open`, `write`, `truncate`, `fsync`, `rename`, `unlink`, `mkdir` or `rmdir`.
        path: relative to the folder.
        to: of a rename.
        offset, content: of a write; `offset` also the length after a `truncate`.
        writes: of an `open`: it may change the file.
    """

    kind: str
    path: str
    to: str = ""
    offset: int = 0
    content: bytes = b""
    writes: bool = False


class Listener:
    """Base of those that are asked and told."""

    def before(self, operation: Operation) -> None:
        """May raise, or not return."""

    def after(self, operation: Operation) -> None:
        """It has been done."""


class _Raw(io.FileIO):
    """A file whose writes are told."""

    def __init__(self, layer: Layer, name: str, *given: Any, **named: Any) -> None:
        self._layer, self._name = layer, name
        super().__init__(*given, **named)

    def write(self, content: Any) -> int:  # type: ignore[override]
        data = bytes(content)
        at_end = "a" in self.mode
        offset = os.fstat(self.fileno()).st_size if at_end else self.tell()
        with self._layer.told(Operation("write", self._name, offset=offset, content=data)):
            return super().write(data)


class Layer:
    """Stands before the functions of `os` and before `open`.

    Args:
        root: only what is below it is seen.
        listener: who is asked and told.
    """

    def __init__(self, root: Path, listener: Listener) -> None:
        self._root = f"{root.resolve()}/"
        self._listener = listener
        self._descriptors: dict[int, str] = {}

    @contextmanager
    def told(self, operation: Operation) -> Iterator[None]:
        """Ask before, tell after."""
        self._listener.before(operation)
        yield
        self._listener.after(operation)

    def _name(self, path: Any, dir_fd: int | None = None) -> str | None:
        """The path below the root; None: it is elsewhere."""
        if isinstance(path, int):
            return self._descriptors.get(path)
        text = os.fsdecode(os.fspath(path))
        if dir_fd is not None:
            text = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), text)
        text = os.path.normpath(os.path.join(os.getcwd(), text))
        if f"{text}/" == self._root:
            return "."
        return text[len(self._root) :] if text.startswith(self._root) else None

    def __enter__(self) -> Layer:
        self._real: dict[tuple[Any, str], Any] = {}
        for name in ("fsync", "unlink", "remove", "mkdir", "rmdir", "rename", "replace"):
            self._patch(os, name, getattr(self, f"_{name}", None) or self._plain(name))
        for name in ("open", "close", "pwrite", "ftruncate", "truncate"):
            self._patch(os, name, getattr(self, f"_{name}"))
        self._patch(io, "open", self._opened)
        self._patch(builtins, "open", self._opened)
        return self

    def __exit__(self, *_: object) -> None:
        for (module, name), real in self._real.items():
            setattr(module, name, real)

    def _patch(self, module: Any, name: str, function: Callable[..., Any]) -> None:
        self._real[module, name] = getattr(module, name)
        setattr(module, name, function)

    def _call(self, name: str, *given: Any, **named: Any) -> Any:
        return self._real[os, name](*given, **named)

    def _plain(self, name: str) -> Callable[..., Any]:
        """A call with one path, such as `mkdir`."""
        kind = {"remove": "unlink"}.get(name, name)

        def called(path: Any, *given: Any, dir_fd: int | None = None, **named: Any) -> Any:
            below = self._name(path, dir_fd)
            if dir_fd is not None:
                named["dir_fd"] = dir_fd
            if below is None:
                return self._call(name, path, *given, **named)
            with self.told(Operation(kind, below)):
                return self._call(name, path, *given, **named)

        return called

    def _fsync(self, descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        below = self._name(os.readlink(f"/proc/self/fd/{number}"))
        if below is None:
            return self._call("fsync", descriptor)
        with self.told(Operation("fsync", below)):
            os.fstat(number)  # the battery itself does not wait for the disk
        return None

    def _rename(self, source: Any, target: Any, **named: Any) -> None:
        from_, to = self._name(source), self._name(target)
        if from_ is None or to is None:
            return self._call("rename", source, target, **named)
        with self.told(Operation("rename", from_, to)):
            return self._call("rename", source, target, **named)

    _replace = _rename

    def _open(
        self, path: Any, flags: int, *given: Any, dir_fd: int | None = None, **kw: Any
    ) -> int:
        below = self._name(path, dir_fd)
        if dir_fd is not None:
            kw["dir_fd"] = dir_fd
        if below is None:
            return int(self._call("open", path, flags, *given, **kw))
        with self.told(Operation("open", below, writes=bool(flags & _WRITING))):
            descriptor = int(self._call("open", path, flags, *given, **kw))
        self._descriptors[descriptor] = below
        return descriptor

    def _close(self, descriptor: int) -> None:
        self._descriptors.pop(descriptor, None)
        self._call("close", descriptor)

    def _pwrite(self, descriptor: int, content: Any, offset: int) -> int:
        below = self._descriptors.get(descriptor)
        if below is None:
            return int(self._call("pwrite", descriptor, content, offset))
        with self.told(Operation("write", below, offset=offset, content=bytes(content))):
            return int(self._call("pwrite", descriptor, content, offset))

    def _ftruncate(self, descriptor: int, length: int) -> None:
        below = self._descriptors.get(descriptor)
        if below is None:
            return self._call("ftruncate", descriptor, length)
        with self.told(Operation("truncate", below, offset=length)):
            return self._call("ftruncate", descriptor, length)

    def _truncate(self, path: Any, length: int) -> None:
        below = self._name(path)
        if below is None:
            return self._call("truncate", path, length)
        with self.told(Operation("truncate", below, offset=length)):
            return self._call("truncate", path, length)

    def _opened(
        self, file: Any, mode: str = "r", buffering: int = -1, *given: Any, **kw: Any
    ) -> Any:
        below = self._name(file)
        writes = any(letter in mode for letter in "wax+")
        real = self._real[io, "open"]
        if below is None or kw.get("opener"):
            return real(file, mode, buffering, *given, **kw)
        if not writes:
            with self.told(Operation("open", below)):
                return real(file, mode, buffering, *given, **kw)
        plain = mode.replace("b", "").replace("t", "")
        closefd = kw.pop("closefd", True)
        with self.told(Operation("open", below, writes=True)):
            raw = _Raw(self, below, file, plain, closefd=closefd)
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *given, **kw)
