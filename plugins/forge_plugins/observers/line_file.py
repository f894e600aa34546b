"""A file of lines that a resumed run goes on with where its checkpoint stands."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TextIO


def keep_lines(file: Path, count: int) -> None:
    """Cut a file after its first `count` lines; a torn last line goes too."""
    end = 0
    with file.open("rb") as stream:
        for _, line in zip(range(count), stream, strict=False):
            if not line.endswith(b"\n"):
                break
            end += len(line)
    os.truncate(file, end)


def _sync(folder: Path) -> None:
    """A file whose entry is not on the disk may be gone after a crash, with all that it held."""
    if os.name == "nt":  # no folder is opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class LineFile:
    """Appends lines and knows how many there are; closed, it takes lines and writes none."""

    def __init__(self) -> None:
        self._stream: TextIO | None = None
        self.lines = 0

    @property
    def open(self) -> bool:
        """Whether lines are written."""
        return self._stream is not None

    def begin(self, file: Path) -> None:
        """Open the file after its first `lines` lines; what follows them is cut off."""
        if not file.exists():
            file.touch()
            _sync(file.parent)
        keep_lines(file, self.lines)
        self._stream = file.open("a", encoding="utf-8", newline="")

    def write(self, line: str) -> None:
        """Append a line, which readers see at once."""
        if self._stream is None:
            return
        self._stream.write(line + "\n")
        self._stream.flush()
        self.lines += 1

    def sync(self) -> None:
        """Wait until the lines are on the disk."""
        if self._stream is not None:
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
