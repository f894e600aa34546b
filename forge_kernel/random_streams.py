"""Whose the process's random streams are: the program's, or one of its runs'.

Python, numpy and torch each have one ambient stream for the whole process. The program and its runs
(in threads, or one inside a callback of another) use them in turn: whoever comes in finds them as
it left them. So what a run draws never depends on what another draws in between.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

from forge_kernel.errors import RunError
from forge_kernel.random_state import StreamState

WAIT_SECONDS: Final = 600.0  # for another run in this process to end its step


class _Owner:
    """Whose the ambient streams are, and their states while they are not in use."""

    __slots__ = ("active", "saved")

    def __init__(self) -> None:
        self.saved: StreamState | None = None
        self.active = True


_lock = threading.RLock()
_program = _Owner()
_resident = _program  # whose the ambient streams are now
_inside: list[_Owner] = []  # those at work, the innermost last; all in the thread with the lock
_waiting = 0


def _switch(owner: _Owner) -> None:
    """Give the ambient streams to an owner; the lock is held."""
    global _resident  # noqa: PLW0603  the streams are the process's, and so is their owner
    if owner is _resident:
        return
    _resident.saved = StreamState.read()
    _resident = owner
    if owner.saved is not None:
        owner.saved.write()
        owner.saved = None


def _wait() -> None:
    global _waiting  # noqa: PLW0603  see `_switch`
    _waiting += 1
    try:
        taken = _lock.acquire(timeout=WAIT_SECONDS)
    finally:
        _waiting -= 1
    if not taken:
        raise RunError(
            f"another run in this process has been inside a step for {WAIT_SECONDS:.0f} s; perhaps "
            "one of its hooks waits for this run. Start the runs in processes of their own"
        )


class RunStreams:
    """The ambient streams of one run, which other runs of the process neither see nor move.

    A run takes them for a step at a time. Alone, that costs a lock that nobody else wants. Runs in
    several threads step in turn, each on its own streams, so that each is what it is alone; a run
    inside a callback of another gives the streams back where that one goes on.

    Args:
        takes_turns: False for a run that is spread over ranks: inside a step they wait for each
            other, so that none of them can wait for its turn.
    """

    def __init__(self, *, takes_turns: bool = True) -> None:
        self._owner = _Owner()
        self._takes_turns = takes_turns

    def take(self) -> None:
        """Begin a stretch of work that draws.

        Raises:
            RunError: another run of this process does not end its step.
        """
        if not self._takes_turns:
            return
        if not _lock.acquire(blocking=False):
            _wait()
        owner = self._owner
        _inside.append(owner)
        if _resident is not owner:
            _switch(owner)

    def give(self) -> None:
        """End the stretch; the streams stay this run's until somebody else takes them."""
        if not self._takes_turns:
            return
        _ = _inside.pop()
        if _inside and _inside[-1] is not _resident:
            _switch(_inside[-1])
        _lock.release()
        if _waiting:
            time.sleep(1e-5)  # whoever waits comes in before this thread asks again

    def __enter__(self) -> None:
        self.take()

    def __exit__(self, *_: object) -> None:
        self.give()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """For a whole run: afterwards streams, grad mode, determinism and threads are as found."""
        with _lock:
            found = _resident
            self._owner.saved = StreamState.read()
        grad = torch.is_grad_enabled()
        deterministic = torch.are_deterministic_algorithms_enabled()
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        threads = torch.get_num_threads()
        try:
            yield
        finally:
            with _lock:
                self._owner.active = False
                if _resident is self._owner:
                    _switch(found if found.active else _program)
            torch.set_grad_enabled(grad)
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
