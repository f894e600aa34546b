"""Whose the process's random streams are: those of the thread whose run is at work.

Python, numpy and torch each have one ambient stream for the whole process. Runs in several threads
use them in turn: whoever comes in finds them as it left them. So what a run draws never depends on
what another one draws in between.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any, Final

from forge_kernel.errors import RunError
from forge_kernel.storage.random_state import STREAMS_LOCK, StreamState, torch_settings_kept

WAIT_SECONDS: Final = 600.0  # for another run in this process to end its step


class _Owner:
    """A thread's streams, while they are not the ambient ones."""

    __slots__ = ("depth", "saved")

    def __init__(self) -> None:
        self.saved: StreamState | None = None
        self.depth = 0  # runs of the thread, one inside a callback of the other


class _Ambient:
    """Whose the ambient streams are now; changed by the thread that holds the lock."""

    def __init__(self) -> None:
        self.program = _Owner()  # the main thread's, and of all code outside of runs
        self.resident = self.program
        self.thread = 0  # the thread that is the resident; 0: it is to be looked up
        self.waiting = 0  # threads
        self._owners = threading.local()

    def own(self) -> _Owner:
        """The owner that this thread is."""
        owner: _Owner | None = getattr(self._owners, "owner", None)
        if owner is None:
            main = threading.current_thread() is threading.main_thread()
            owner = self._owners.owner = self.program if main else _Owner()
        return owner

    def give(self, owner: _Owner) -> None:
        """Make an owner's streams the ambient ones."""
        self.thread = get_ident() if owner is self.own() else 0
        if owner is self.resident:
            return
        self.resident.saved = StreamState.read()
        self.resident = owner
        if owner.saved is not None:
            owner.saved.write()
            owner.saved = None

    def wait(self) -> None:
        """Wait for the lock."""
        self.waiting += 1
        try:
            taken = STREAMS_LOCK.acquire(timeout=WAIT_SECONDS)
        finally:
            self.waiting -= 1
        if not taken:
            raise RunError(
                f"another run in this process has been inside a step for {WAIT_SECONDS:.0f} s; "
                "perhaps one of its hooks waits for this run. Start the runs in processes of "
                "their own"
            )


_AMBIENT: Final = _Ambient()


class RunStreams:
    """The ambient streams of one run, which runs in other threads neither see nor move.

    A run takes them for a step at a time. Alone, that costs a lock that nobody else wants. Runs in
    several threads step in turn, each on its own streams, so that each is what it is alone.

    Args:
        takes_turns: False for a run that is spread over ranks: inside a step they wait for each
            other, so that none of them can wait for its turn.
    """

    def __init__(self, *, takes_turns: bool = True) -> None:
        self._takes_turns = takes_turns

    def __enter__(self) -> None:
        """Begin a stretch of work that draws.

        Raises:
            RunError: another run of this process does not end its step.
        """
        if not self._takes_turns:
            return
        if not STREAMS_LOCK.acquire(False):
            _AMBIENT.wait()
        if _AMBIENT.thread != get_ident():
            _AMBIENT.give(_AMBIENT.own())

    def __exit__(self, *_: object) -> None:
        """End the stretch; the streams stay as they are until another thread takes them."""
        if not self._takes_turns:
            return
        STREAMS_LOCK.release()
        if _AMBIENT.waiting:
            time.sleep(1e-5)  # whoever waits comes in before this thread asks again

    def holding(self, work: Callable[[Any], None]) -> Callable[[Any], None]:
        """`work` as such a stretch: what `with` does, in half the time, for each step."""
        if not self._takes_turns:
            return work
        acquire, release, ambient = STREAMS_LOCK.acquire, STREAMS_LOCK.release, _AMBIENT

        def held(argument: Any) -> None:
            if not acquire(False):
                ambient.wait()
            try:
                if ambient.thread != get_ident():
                    ambient.give(ambient.own())
                work(argument)
            finally:
                release()
            if ambient.waiting:
                time.sleep(1e-5)

        return held

    @contextmanager
    def drawing(self, state: StreamState) -> Iterator[Callable[[], None]]:
        """For a long stretch that draws from streams of its own; outside nothing has moved.

        Args:
            state: where these streams begin.

        Yields:
            What is called between two parts of the stretch: another run may have its turn there.
        """
        with self:
            outside = StreamState.read()
            state.write()

            def turn() -> None:
                nonlocal outside
                if not (self._takes_turns and _AMBIENT.waiting):
                    return
                own = StreamState.read()
                outside.write()
                self.__exit__()
                self.__enter__()
                outside = StreamState.read()
                own.write()

            try:
                yield turn
            finally:
                outside.write()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """For a whole run: afterwards streams, grad mode, determinism and threads are as found."""
        owner = _AMBIENT.own()
        with STREAMS_LOCK:
            _AMBIENT.give(owner)
            result = StreamState.read()
            owner.depth += 1
        try:
            with torch_settings_kept():
                yield
        finally:
            with STREAMS_LOCK:
                _AMBIENT.give(owner)
                result.write()
                owner.depth -= 1
                if not owner.depth:
                    _AMBIENT.give(_AMBIENT.program)
