"""One column written block by block as a `.npy` file, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from forge_plugins.formats.columns.exact import check_exact
from forge_plugins.formats.columns.table import Column, check_numeric
from forge_plugins.formats.errors import DataError

DEFECTS: Final = "defects.npy"
"""Beside the columns, which are numbered: a user's column may have any name."""
_ROWS: Final = 2**20  # bytes that are brought to another type at a time


def _header(stream: BinaryIO, rows: Column, count: int) -> None:
    header = np.lib.format.header_data_from_array_1_0(np.ascontiguousarray(rows[:0]))
    np.lib.format.write_array_header_1_0(stream, {**header, "shape": (count, *rows.shape[1:])})


class ColumnFile:
    """A `.npy` file that grows.

    The first block tells the type. When floats follow integers, what was written is brought to the
    floats' type, so that a column is of integers only where all its rows are.

    Args:
        file: the data file that is read, for messages.
        path: the `.npy` file.
        name: of the column.
    """

    def __init__(self, file: Path, path: Path, name: str) -> None:
        self._file, self._path, self._name = file, path, name
        self._stream: BinaryIO | None = None
        self._first: Column = np.zeros(0)
        self.count = 0

    @property
    def first(self) -> Column:
        """No row, of the rows' shape and type."""
        return self._first

    def append(self, rows: Column) -> None:
        """Write rows of the shape of the earlier ones.

        Raises:
            DataError: they are no numbers, or integers among floats that are none of those floats.
        """
        if self._stream is None:
            check_numeric(self._file, self._name, rows.dtype)
            self._open(rows)
        elif rows.dtype.kind == "f" and self._first.dtype.kind != "f":
            self._widen(rows.dtype)
        elif self._first.dtype.kind == "f":
            check_exact(self._file, self._name, rows, self._first.dtype, self.count)
        assert self._stream is not None
        assert rows.shape[1:] == self._first.shape[1:], "readers check shapes"
        self._stream.write(np.ascontiguousarray(rows, self._first.dtype).data)
        self.count += len(rows)

    def _open(self, rows: Column) -> None:
        self._first = rows[:0].copy()
        self._stream = self._path.open("wb")
        _header(self._stream, self._first, 2**62)  # numpy pads headers for a growing first number

    def _widen(self, dtype: np.dtype[Any]) -> None:
        """Write what is there again as floats."""
        count = self.close()
        earlier = self._path.with_suffix(".integers")
        self._path.rename(earlier)
        self._open(np.zeros((0, *self._first.shape[1:]), dtype))
        written = np.load(earlier, mmap_mode="r", allow_pickle=False)
        step = max(1, _ROWS * len(written) // max(1, written.nbytes))
        assert self._stream is not None
        for begin in range(0, count, step):
            rows = written[begin : begin + step]
            check_exact(self._file, self._name, rows, dtype, begin)
            self._stream.write(np.ascontiguousarray(rows, dtype).data)
        self.count = count
        earlier.unlink()

    def close(self) -> int:
        """Finish the file.

        Returns:
            Its rows.

        Raises:
            DataError: there are none.
        """
        if self._stream is None:
            hint = "give at least one"
            raise DataError(self._file, "there are no records", field=self._name, hint=hint)
        with self._stream as stream:
            stream.seek(0)
            _header(stream, self._first, self.count)
        return self.count


class ColumnFolder:
    """The columns of one data file, each a `.npy` file named by its number, and what else is known.

    Args:
        file: the data file that is read, for messages.
        folder: an empty folder.
        alive: called now and then while rows are written; a reader that takes long calls it too.
    """

    def __init__(self, file: Path, folder: Path, alive: Callable[[], None] = lambda: None) -> None:
        self._file, self._folder, self.alive = file, folder, alive
        self._columns: dict[str, ColumnFile | None] = {}
        self._defects: ColumnFile | None = None
        self._others: dict[str, None] = {}
        self._about: dict[str, dict[str, Any]] = {}

    def path(self, name: str) -> Path:
        """Where a column lies that the caller writes as a whole `.npy` file."""
        self._columns.setdefault(name, None)
        return self._folder / f"{list(self._columns).index(name)}.npy"

    def append(self, name: str, rows: Column) -> None:
        """Write rows of a column."""
        self.alive()
        column = self._columns.get(name)
        if column is None:
            column = self._columns[name] = ColumnFile(self._file, self.path(name), name)
        column.append(rows)

    def note(self, defects: Column) -> None:
        """The defects of the next records, for a lenient reading; see `PROBLEMS`.

        Args:
            defects: uint8, shape (records,).
        """
        if self._defects is None:
            self._defects = ColumnFile(self._file, self._folder / DEFECTS, "defects")
        self._defects.append(defects)

    def pass_over(self, names: Iterable[str]) -> None:
        """Columns that the file has and nobody asked for."""
        self._others.update(dict.fromkeys(names))

    def describe(self, name: str, about: dict[str, Any]) -> None:
        """Keep what a column is beside its numbers, for JSON; "" stands for the whole file."""
        self._about[name] = about

    def names(self) -> list[str]:
        """Of the columns so far."""
        return list(self._columns)

    def others(self) -> list[str]:
        """Names of the columns that were passed over so far."""
        return list(self._others)

    def first(self, name: str) -> Column | None:
        """No row of a column, of its shape and type; None when it has none so far."""
        column = self._columns.get(name)
        return None if column is None else column.first

    def close(self) -> dict[str, Any]:
        """Finish all files.

        Returns:
            For JSON: `columns`, their names in the order of their numbers; `others`, the names of
            those that were passed over; `files`, the names of all files; `about`, what was
            described.
        """
        for column in (*self._columns.values(), self._defects):
            if column is not None:
                column.close()
        files = [f"{number}.npy" for number in range(len(self._columns))]
        return {
            "columns": list(self._columns),
            "others": list(self._others),
            "files": files if self._defects is None else [*files, DEFECTS],
            "about": self._about,
        }

    def abandon(self) -> None:
        """Let go of what is half written."""
        for column in (*self._columns.values(), self._defects):
            if column is not None and column._stream is not None:
                column._stream.close()
