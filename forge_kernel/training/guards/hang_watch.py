"""A run that stands still: the stacks of all threads are kept, then it is ended.

    no batch, step, validation or checkpoint for `run.hang_minutes`
      -> stacks.txt in the run folder, the event `hang`
      -> HangError in the thread that stands still; it wakes from Python code, from sleeping and
         from waiting for a lock, a socket or a process, and the run ends as of any error: the
         last whole step is saved
    still nothing, a minute later
      -> inside of C code that does not give way: on the command line the process is ended

The interpreter raises in another thread only between two of its instructions; a signal ends the
waiting of the main thread in the system, after which there is one.
"""

from __future__ import annotations

import ctypes
import faulthandler
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Final

from forge_kernel.errors import HangError
from forge_kernel.training.session_state import SessionState

STACKS: Final = "stacks.txt"
GRACE_SECONDS: Final = 60.0
_WAKE: Final = getattr(signal, "SIGURG", None)  # ignored unless somebody listens: it ends nothing


def _listen(number: int, frame: FrameType | None) -> None:
    """Nothing: that Python runs a handler at all is where the error is raised."""


class HangWatch:
    """Watches one run in a thread of its own.

    Args:
        session: set up; its thread is the one that calls.
        folder: for the stacks; None: they go to the standard error stream.
        inform: called from the watching thread with what it has seen.
        end: called when the thread does not wake either; None: the process is the caller's.
    """

    def __init__(
        self,
        session: SessionState,
        folder: Path | None,
        inform: Callable[[str], None],
        end: Callable[[str], None] | None,
    ) -> None:
        self.session, self.folder, self.inform, self.end = session, folder, inform, end
        minutes = session.settings.hang_minutes
        assert minutes is not None
        self.minutes, self.limit = minutes, 60 * minutes
        self._thread = threading.get_ident()
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._run, name="forge-hang-watch", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._watch.start()

    def stop(self) -> None:
        """Watch no longer."""
        self._ended.set()
        self._watch.join()

    def _signs(self) -> tuple[Any, ...]:
        """What changes while a run goes on."""
        session = self.session
        progress = session.run.progress
        seen = (session.forward.batches, session.validation.at, session.logged_at)
        return (*seen, session.saved_at, progress.step, progress.epoch, progress.place)

    def _run(self) -> None:
        grace = min(GRACE_SECONDS, self.limit)
        # an error that comes while a destructor runs is dropped by Python: there is a second one
        stages = (
            (self.limit, self._wake),
            (self.limit + grace / 2, self._raise),
            (self.limit + grace, self._give_up),
        )
        signs, since, done = self._signs(), time.monotonic(), 0
        while done < len(stages) and not self._ended.wait(min(1.0, self.limit / 10)):
            now = self._signs()
            if now != signs:
                signs, since, done = now, time.monotonic(), 0
            after, act = stages[done]
            if time.monotonic() - since > after:
                done += 1
                act()

    def _message(self) -> str:
        where = f"after step {self.session.run.progress.step}"
        return f"nothing has moved for {self.minutes:g} minutes (run.hang_minutes) {where}"

    def _wake(self) -> None:
        """Keep the stacks, then raise in the thread that stands still."""
        where = self._write_stacks()
        self.inform(f"{self._message()}; the stacks of all threads are in {where}")
        self._raise()

    def _raise(self) -> None:
        _ = ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(self._thread), ctypes.py_object(HangError)
        )
        if _WAKE is not None and self._thread == threading.main_thread().ident:
            signal.pthread_kill(self._thread, _WAKE)

    def _write_stacks(self) -> str:
        if self.folder is None:
            faulthandler.dump_traceback(all_threads=True)
            return "the standard error stream"
        file = self.folder / STACKS
        with file.open("a", encoding="utf-8") as stream:
            stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}: {self._message()}\n")
            stream.flush()
            faulthandler.dump_traceback(stream, all_threads=True)
        return STACKS

    def _give_up(self) -> None:
        what = f"{self._message()}, and its thread cannot be woken"
        self.inform(what)
        if self.end is not None:
            self.end(what)


@contextmanager
def watched(
    session: SessionState,
    folder: Path | None,
    inform: Callable[[str], None],
    end: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Watch while the block runs; nothing where `run.hang_minutes` is null.

    Args:
        session, folder, inform, end: as `HangWatch` has them.
    """
    if session.settings.hang_minutes is None:
        yield
        return
    watch = HangWatch(session, folder, inform, end)
    listens = _WAKE is not None and threading.current_thread() is threading.main_thread()
    before = signal.signal(_WAKE, _listen) if listens and _WAKE is not None else None
    watch.start()
    try:
        yield
    finally:
        watch.stop()
        if listens and _WAKE is not None:
            signal.signal(_WAKE, before)
