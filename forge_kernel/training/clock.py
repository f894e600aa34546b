"""Seconds of training, over all sessions of a run."""

from __future__ import annotations

import time

from forge_kernel.contract.values import Progress


class Clock:
    """Adds the time of this session to what `progress` has of those before.

    Args:
        progress: of the run.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._since: float | None = None

    def start(self) -> None:
        """From here on time passes."""
        self._since = time.monotonic()

    def seconds(self) -> float:
        """Seconds of training so far."""
        passed = 0.0 if self._since is None else time.monotonic() - self._since
        return self._progress.seconds + passed

    def accumulate_elapsed(self) -> None:
        """Put the seconds into `progress`, which is saved."""
        self._progress.seconds = self.seconds()
        if self._since is not None:
            self._since = time.monotonic()
