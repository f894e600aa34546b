"""SIGINT and SIGTERM ask a run to stop; installed by the command line only."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType
from typing import Any, Final

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """The first signal asks the run to stop at the next step's edge, the second ends it at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def is_set(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        name = signal.Signals(number).name
        _tell(f"\nforge: {name}: stopping after this step and saving (again: at once)\n")

    def __enter__(self) -> Interrupt:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _tell(text: str) -> None:
    """Say something on the terminal in a signal's handler.

    Past Python's own stream: the signal may have come in the middle of a write to it, and writing
    there once more raises an error in the one that was interrupted.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):  # there is no terminal
        os.write(sys.stderr.fileno(), text.encode())
