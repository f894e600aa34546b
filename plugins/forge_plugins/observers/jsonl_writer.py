"""What sinks that append lines to a file of the run folder have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forge_kernel.api import Run, RunResult, hookimpl
from forge_plugins.observers.line_file import LineFile


class JsonlWriter:
    """Keeps the file in step with the checkpoints.

    A checkpoint keeps the number of lines: a resumed run cuts off what was written after them, so
    that the file is that of an uninterrupted run.
    """

    def __init__(self) -> None:
        self._file = LineFile()
        self._unsynced: OSError | None = None

    @hookimpl
    def on_checkpoint(self, run: Run, folder: Path) -> None:
        """Tell that the lines before this checkpoint could not be put on the disk."""
        del run, folder
        error, self._unsynced = self._unsynced, None
        if error is not None:
            raise error

    @hookimpl
    def on_run_end(self, run: Run, result: RunResult) -> None:
        """Close the file."""
        del run, result
        self._file.close()

    @hookimpl
    def on_error(self, run: Run, error: BaseException) -> None:
        """Close the file."""
        del run, error
        self._file.close()

    def state_dict(self) -> dict[str, Any]:
        """The number of lines in the file, which are on the disk before the checkpoint is.

        Where they cannot be put there the checkpoint is written nevertheless.
        """
        try:
            self._file.sync()
        except OSError as error:
            self._unsynced = error
        return {"lines": self._file.lines}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Where a resumed run goes on writing."""
        if not self._file.open:  # in mid-run, a rollback keeps the lines that led to it
            self._file.lines = int(state["lines"])
