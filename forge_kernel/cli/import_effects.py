"""What importing a plugin does beside importing: files, network, processes, threads, settings.

Seen by Python's audit events, which tell what its code asks of the system, and by comparing the
process's state before and after. Compiled extensions can do more unseen: this is no wall.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points
from multiprocessing.connection import Connection
from typing import Any, Final

SECONDS: Final = 120.0
_WRITES: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_FILES: Final = {
    "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.chmod",
    "os.truncate", "shutil.rmtree", "shutil.move", "tempfile.mkstemp", "tempfile.mkdtemp",
}  # fmt: skip
_NETWORK: Final = {
    "socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname",
    "urllib.Request", "ftplib.connect", "smtplib.connect",
}  # fmt: skip
_PROCESSES: Final = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"}
_COMPILED: Final = ("__pycache__", ".pyc")


class Effects:
    """What audit events of one thread's import have told, by kind; each once."""

    def __init__(self) -> None:
        self.seen: dict[str, dict[str, None]] = {"files": {}, "network": {}, "processes": {}}
        self.listens = False

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook; it cannot be taken away again, so it is told when to listen."""
        if not self.listens:
            return
        if event == "open":
            self._opened(*arguments)
        elif event in _FILES:
            self._add("files", f"{event} {arguments[0]}")
        elif event in _NETWORK:
            self._add("network", f"{event} {arguments[-1]}")
        elif event in _PROCESSES:
            self._add("processes", f"{event} {arguments[0] if arguments else ''}".strip())

    def _opened(self, path: Any, mode: Any, flags: Any) -> None:
        written = (isinstance(mode, str) and set(mode) & set("wax+")) or (
            isinstance(flags, int) and flags & _WRITES
        )
        if written and not isinstance(path, int):  # a file that is open already was told then
            name = os.fsdecode(path) if isinstance(path, str | bytes) else str(path)
            self._add("files", f"writes {name}")

    def _add(self, kind: str, what: str) -> None:
        if kind == "files" and any(part in what for part in _COMPILED):
            return  # Python's own, of what it imports
        self.seen[kind][what] = None


def _state() -> dict[str, Any]:
    """Of the process, what an import has no business with."""
    import torch

    handlers = {
        number.name: repr(signal.getsignal(number))
        for number in signal.valid_signals()
        if isinstance(number, signal.Signals)
    }
    return {
        "environment": dict(os.environ),
        "signals": handlers,
        "search path": list(sys.path),
        "folder": os.getcwd(),
        "threads of torch": torch.get_num_threads(),
        "torch's dtype": str(torch.get_default_dtype()),
        "grad mode": torch.is_grad_enabled(),
        "random state of torch": hash(torch.get_rng_state().numpy().tobytes()),
        "warning filters": len(warnings.filters),
    }


def _changes(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    for name, known in before.items():
        now = after[name]
        if now == known:
            continue
        if isinstance(known, dict):
            names = sorted(
                key for key in known.keys() | now.keys() if known.get(key) != now.get(key)
            )
            yield f"{name} ({', '.join(names)})"
        else:
            yield name


def effects_of(key: str) -> dict[str, Any]:
    """Import one plugin here and say what else happened.

    Args:
        key: `<kind>.<name>`.
    """
    (entry,) = entry_points(group="forge_kernel.plugins", name=key)
    effects, printed, error = Effects(), io.StringIO(), None
    sys.addaudithook(effects.hear)
    before, threads, modules = _state(), set(threading.enumerate()), len(sys.modules)
    begun = time.perf_counter()
    effects.listens = True
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            entry.load()
    except BaseException as raised:  # noqa: BLE001  that it raises is what is asked
        error = f"{type(raised).__name__}: {raised}"
    effects.listens = False
    seconds = time.perf_counter() - begun
    started = [thread.name for thread in threading.enumerate() if thread not in threads]
    return {
        **{kind: list(names) for kind, names in effects.seen.items()},
        "threads": started,
        "changes": list(_changes(before, _state())),
        "prints": printed.getvalue().strip()[:200],
        "modules": len(sys.modules) - modules,
        "seconds": round(seconds, 3),
        "error": error,
    }


def examined(keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """`effects_of` for each, in a process of its own; what hangs or dies is told as its error.

    Forked where torch stands it (Linux), so that torch is imported once.
    """
    forks = sys.platform == "linux"
    _import_ours()
    for key in keys:
        context = (
            multiprocessing.get_context("fork") if forks else multiprocessing.get_context("spawn")
        )
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_send_effects, args=(there, key))
        process.start()
        there.close()
        result: dict[str, Any] = {"error": f"its import has not ended after {SECONDS:.0f} s"}
        if here.poll(SECONDS):
            try:
                result = here.recv()
            except EOFError:
                process.join()
                result = {"error": f"its import ended the process with {process.exitcode}"}
        process.kill()
        process.join()
        yield result


def _import_ours() -> None:
    """torch and the kernel: what they do is not a plugin's doing."""
    import torch  # noqa: F401

    import forge_kernel.api
    import forge_kernel.embedding  # noqa: F401


def _send_effects(connection: Connection, key: str) -> None:
    _import_ours()
    connection.send(effects_of(key))
