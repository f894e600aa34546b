"""Signals ask a run to stop; installed by the command line only."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any, Final

from forge_kernel.errors import Ended

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""The closed terminal and the queue that warns of the end of its time ask like the others."""


def _end(number: int, frame: FrameType | None) -> None:
    del frame
    raise Ended(number)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """One line and an exit status of 128 + n for a signal, whatever the command is at."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:  # nohup: a hang-up is to be ignored
                signal.signal(number, _end)
        yield
    except Ended as ended:
        write_line(f"\nforge: {signal.Signals(ended.args[0]).name}: ended\n")
        sys.exit(ended.exit_status)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Interrupt:
    """The first signal asks the run to stop at the next step's edge, the second ends it at once.

    Before the first step nothing is lost: there the first one ends it.
    """

    owns_process = True  # a run that cannot be woken may end it

    def __init__(self) -> None:
        self.signal: int | None = None
        self._asked = False  # the run has begun to ask, so it is in its steps
        self._before: dict[int, Any] = {}

    def is_set(self) -> bool:
        """Whether a signal has come; asked by the run at each step's edge."""
        self._asked = True
        return self.signal is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        again, self.signal = self.signal is not None, number
        if again or not self._asked:
            raise KeyboardInterrupt
        name = signal.Signals(number).name
        write_line(f"\nforge: {name}: stopping after this step and saving (again: at once)\n")

    def __enter__(self) -> Interrupt:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def ended(self) -> int:
        """Say which signal ended the command; its exit status."""
        number = self.signal or signal.SIGINT
        when = "" if self._asked else " before the first step: nothing was trained"
        write_line(f"\nforge: {signal.Signals(number).name}: ended at once{when}\n")
        return 128 + number


def write_line(text: str) -> None:
    """Say something on the terminal in a signal's handler.

    Past Python's own stream: the signal may have come in the middle of a write to it, and writing
    there once more raises an error in the one that was interrupted.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):  # there is no terminal
        os.write(sys.stderr.fileno(), text.encode())
