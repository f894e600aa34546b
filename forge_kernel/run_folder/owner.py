"""Who may write a run folder: one process, by a lock that the system ends with it."""

from __future__ import annotations

import functools
import json
import os
import platform
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Literal

from forge_kernel.errors import ConfigError, Fault

LOCK: Final = "owner.json"
_PATIENCE_SECONDS: Final = 1.0
_PAUSE_SECONDS: Final = 0.02

State = Literal["held", "free", "foreign", "none"]


def boot_id() -> str | None:
    """What names this start of the machine, where the system has a name for it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None


def _facts() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": platform.node(), "boot": boot_id(), "since": time.time()}


class Owner:
    """The right to write a run folder, from set-up to the end.

    The lock counts, not what is written in the file: a process that is killed loses it at once,
    whatever clocks say. The file's content only names the owner. Locks need not reach other
    machines, so a folder whose owner was one of another machine and did not end is refused until
    somebody who knows better says so.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / LOCK
        self._descriptor: int | None = None
        self._made = False
        self.made_folders: tuple[Path, ...] = ()  # for it, the innermost first

    def acquire(self, *, take_over: bool = False) -> None:
        """Become the owner.

        Args:
            take_over: also of a folder whose owner was on another machine.

        Raises:
            ConfigError: another process is; nothing was written.
        """
        self._made = not self._file.exists()
        descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        locked = _locked(descriptor)
        before = _read(descriptor)
        foreign = bool(before) and before.get("host") != platform.node()
        if not locked or (foreign and not take_over):
            os.close(descriptor)
            fault = _foreign(self.folder, before) if locked else _held(self.folder, before)
            raise ConfigError([fault])
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_facts()).encode(), 0)
        self._descriptor = descriptor
        _OWNERS.add(self)
        _watch_forks()

    def release(self, *, unused: bool = False) -> None:
        """Leave the folder to others; may be called again.

        Args:
            unused: nothing was written: the file goes too, if it was made for this.
        """
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        with suppress(OSError):
            os.ftruncate(descriptor, 0)
            if unused and self._made:
                self._file.unlink()
        os.close(descriptor)

    def close(self) -> None:
        """Leave the folder to others."""
        self.release()

    def __del__(self) -> None:
        self.release()

    def close_inherited(self) -> None:
        """Give up the lock in a forked process, which does not end it in this one."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with suppress(OSError):
                os.close(descriptor)


_OWNERS: Final[weakref.WeakSet[Owner]] = weakref.WeakSet()


def _close_inherited() -> None:
    """A worker that outlives its parent must not hold what is the parent's."""
    for owner in list(_OWNERS):
        owner.close_inherited()


@functools.cache
def _watch_forks() -> None:
    """Once a process, when it first owns a folder: nothing is registered by an import."""
    os.register_at_fork(after_in_child=_close_inherited)


def look(folder: Path) -> tuple[State, Mapping[str, Any]]:
    """Who owns a run folder; nothing is written.

    Returns:
        `held` by a process of this machine; `free` again, though its owner did not end the run
        or has just ended it; `foreign`: of another machine, so that nothing is known; `none`: no
        owner is written down. Then what is known of the owner.
    """
    import fcntl

    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return "none", {}
    try:
        about = _read(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return "held", about
        if not about:
            return "none", {}
        return ("free" if about.get("host") == platform.node() else "foreign"), about
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    """Whether the lock could be had; who only looks at it holds it for a moment."""
    import fcntl

    for _ in range(max(1, round(_PATIENCE_SECONDS / _PAUSE_SECONDS))):
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(_PAUSE_SECONDS)
    return False


def _read(descriptor: int) -> dict[str, Any]:
    try:
        data = json.loads(os.pread(descriptor, 4096, 0) or b"{}")
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _named(about: Mapping[str, Any]) -> str:
    return f"process {about.get('pid', '?')} on {about.get('host', 'an unknown machine')}"


def _held(folder: Path, about: Mapping[str, Any]) -> Fault:
    hint = f"wait for it, or stop it: kill {about.get('pid', 'PID')} (it saves before it ends)"
    return Fault(f"{folder} is being written by {_named(about)}", hints=(hint,))


def _foreign(folder: Path, about: Mapping[str, Any]) -> Fault:
    return Fault(
        f"{folder} was being written by {_named(about)}, which has not ended its run, and from "
        "here it cannot be seen whether it is still at it",
        hints=("if that process is gone: forge resume --take-over",),
    )
