"""Pickles: lists of records, columns, or one after the other in a file."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from forge_plugins.formats.columns.column_writer import ColumnFolder
from forge_plugins.formats.columns.gather import Column
from forge_plugins.formats.columns.table import absent, check_numeric
from forge_plugins.formats.errors import DataError
from forge_plugins.formats.format import Format, Reading
from forge_plugins.formats.readers.pickle_values import (
    Placeholder,
    RefusedError,
    opened,
    plain,
)
from forge_plugins.formats.readers.records_to_columns import (
    RecordColumns,
    check_lengths,
    column_parts,
    is_record,
)
from forge_plugins.formats.readers.unpickler import BrokenError, DataUnpickler

PART: Final = 4096
"""Records that are brought into columns at a time."""
MAX_TRUSTED: Final = 2**28
"""Bytes of a pickle that is run as it is: it is in memory as a whole."""
_MAX_ROW: Final = 2**22
"""Numbers of one field of one record."""
_BLOCK: Final = 2**22
_ROLES: Final = ("input", "target")
"""What two arrays without names are."""
_STREAM: Final = 2**14  # bytes that are read ahead: the unpickler copies them for each pickle
_RESERVE: Final = 2**22  # bytes to say in that the memory is used up
_SIGN: Final = 2**24  # bytes between two signs of life
_HINT: Final = (
    "pickle containers, numbers, numpy arrays or torch tensors only; or, if you trust whoever "
    "wrote the file with your account, set trust_pickle: true and run with --allow-code"
)
_FORMS: Final = "pickle a list of records, an object of columns, or one such object after the other"
_SMALLER: Final = (
    "pickle columns as numpy arrays, {'input': x, 'target': y}, which need no more memory than the "
    "file has bytes, or write JSON Lines, HDF5 or npz, which are read in parts"
)


def read_pickle(
    file: Path, columns: ColumnFolder, reading: Reading, names: Collection[str]
) -> None:
    """Write the columns of the pickles in a file, one after the other.

    Args:
        file: the pickles. With `trust_pickle` there is one, in memory as a whole.
        columns: where they are written.
        reading: which columns are read, whether it is `lenient`, see `RecordColumns`, and whether
            the pickle is trusted.
        names: those that `reading` tells.

    Raises:
        DataError: one is broken, holds what is not allowed, too much at once, or no records of
            numbers.
    """
    del names
    content = Content(file, columns, reading)
    try:
        if reading.trust_pickle:
            _trusted(file, content)
        else:
            _pickles(file, content, columns.alive)
    except RefusedError as error:
        raise DataError(file, f"is refused: {error}", hint=_HINT) from error
    content.close()


class _Stream(io.FileIO):
    """A file that gives a sign of life now and then while it is read."""

    def __init__(self, file: Path, alive: Callable[[], None]) -> None:
        super().__init__(file)
        self._alive, self._since = alive, 0

    def readinto(self, buffer: Any, /) -> int | None:
        count = super().readinto(buffer)
        self._since += count or 0
        if self._since >= _SIGN:
            self._alive()
            self._since = 0
        return count


def _pickles(file: Path, content: Content, alive: Callable[[], None]) -> None:
    size, begin = file.stat().st_size, 0
    reserve = bytearray(_RESERVE)
    with io.BufferedReader(_Stream(file, alive), _STREAM) as stream:
        while begin < size:
            place = f"pickle at byte {begin}"
            try:
                _add_next(stream, content)
            except BrokenError as error:
                hint = "it is no whole pickle: write it anew"
                raise DataError(file, f"is broken: {error}", place=place, hint=hint) from error
            except MemoryError as error:
                # room for the message: the frames of the error hold what the pickle holds
                reserve.clear()
                error.__traceback__ = None
                message = (
                    f"needs more memory than a file of {size} bytes may have, or declares a "
                    "length that is not there"
                )
                raise DataError(file, message, place=place, hint=_SMALLER) from None
            begin = stream.tell()


def _add_next(stream: BinaryIO, content: Content) -> None:
    unpickler = DataUnpickler(stream)
    value = unpickler.read()
    content.add(value, has_names=unpickler.has_names)


def _trusted(file: Path, content: Content) -> None:
    size = file.stat().st_size
    if size > MAX_TRUSTED:
        message = (
            f"{size} bytes; a pickle that is run is in memory as a whole: {MAX_TRUSTED} may be"
        )
        raise DataError(
            file, message, hint="pickle arrays or lists of numbers, which need no trust"
        )
    try:
        value = pickle.loads(file.read_bytes())  # noqa: S301  asked for
    except Exception as error:
        message = f"{type(error).__name__}: {str(error)[:200]}"
        raise DataError(file, f"cannot be unpickled: {message}", hint=_HINT) from error
    content.add(value)


class Content:
    """What the pickles of a file hold, on its way into columns.

    Args:
        file: for the messages.
        columns: where the columns are written.
        reading: which columns are read, and whether it is lenient.
    """

    def __init__(self, file: Path, columns: ColumnFolder, reading: Reading) -> None:
        self._file, self._columns, self._reading = file, columns, reading
        self._records = RecordColumns(file, columns, _MAX_ROW, reading)
        self._whole = 0  # records that came as arrays

    def add(self, value: Any, *, has_names: bool = True) -> None:
        """What one pickle holds.

        Args:
            value: the records, the columns, or one record.
            has_names: it may hold what stands for arrays and objects; without it, it is of
                numbers, texts and containers alone, which need no look at each.

        Raises:
            DataError: they are no records or columns of numbers.
            RefusedError: what is asked for holds something that is no data.
        """
        result = self._columns_of(opened(value))
        if isinstance(result, Mapping) and result and _are_arrays([*result.values()]):
            self._add_arrays(result)
        elif isinstance(result, Mapping) and is_record(result, self._reading):
            self._take([result], has_names)
        elif isinstance(result, list | tuple):
            for begin in range(0, len(result), PART):
                self._take(result[begin : begin + PART], has_names)
        else:
            for part in column_parts(self._file, result, self._reading.names, PART):
                self._take(part, has_names)
        if self._whole and self._records.count:
            message = "holds records and columns of arrays in turns"
            raise DataError(self._file, message, hint=_FORMS)

    def _columns_of(self, value: Any) -> Any:
        """Columns by name, without those that nobody asks for; all else as it is.

        One array is the inputs, two are inputs and targets.
        """
        result = value
        if isinstance(result, list | tuple) and len(result) == len(_ROLES):
            parts = [
                part if isinstance(part, Mapping | Placeholder) else opened(part) for part in result
            ]
            result = dict(zip(_ROLES, parts, strict=True)) if _are_arrays(parts) else result
        elif isinstance(result, np.ndarray) and result.ndim:
            result = {"input": result}
        if not isinstance(result, Mapping) or is_record(result, self._reading):
            return result
        names = self._reading.names
        self._columns.pass_over(n for n in result if isinstance(n, str) and n not in names)
        if names[0] not in result:
            raise absent(self._file, names[0], [n for n in result if isinstance(n, str)])
        return {name: opened(result[name]) for name in names if name in result}

    def _take(self, records: Sequence[Any], has_names: bool) -> None:
        self._records.take([self._record(part) for part in records] if has_names else records)

    def _record(self, record: Any) -> Any:
        """A record with what is asked for as numbers, lists and arrays, and nothing of the rest."""
        result = opened(record)
        if not isinstance(result, Mapping):
            return result
        asked = {n: _number(plain(result[n], 2)) for n in self._reading.names if n in result}
        return {**dict.fromkeys(result), **asked}

    def _add_arrays(self, found: Mapping[str, Column]) -> None:
        if self._whole and set(found) != set(self._columns.names()):
            message = f"has the columns {sorted(found)}, not {sorted(self._columns.names())}"
            raise DataError(self._file, message, record=self._whole, hint=_FORMS)
        lengths = {name: len(column) for name, column in found.items()}
        if self._whole:
            check_lengths(self._file, lengths)
        for name, column in found.items():
            check_numeric(self._file, name, column.dtype)
            first = self._columns.first(name)
            if self._whole and first is not None:
                self._check_alike(name, first, column)
            for rows in _blocks(column):
                self._columns.append(name, rows)
        self._whole += lengths[self._reading.input]

    def _check_alike(self, name: str, first: Column, column: Column) -> None:
        hint = "give every object columns of the same types and shapes"
        message = None
        if first.shape[1:] != column.shape[1:]:
            message = f"has the shape {list(column.shape[1:])}, not {list(first.shape[1:])}"
        elif first.dtype.newbyteorder("=") != column.dtype.newbyteorder("="):
            message = f"has the type {column.dtype}, not {first.dtype}"
        if message is not None:
            raise DataError(self._file, message, field=name, record=self._whole, hint=hint)

    def close(self) -> None:
        """After the last pickle.

        Raises:
            DataError: there are no records.
        """
        if not self._whole:
            self._records.close()


def _blocks(column: Column) -> Iterator[Column]:
    """Rows of an array, a few megabytes at a time; an empty one is one block."""
    row = max(1, column.nbytes // max(1, len(column)))
    step = max(1, _BLOCK // row)
    for begin in range(0, max(1, len(column)), step):
        yield column[begin : begin + step]


def _number(value: Any) -> Any:
    single = isinstance(value, np.generic) or (isinstance(value, np.ndarray) and not value.ndim)
    return value.item() if single else value


def _are_arrays(values: list[Any]) -> bool:
    return all(isinstance(value, np.ndarray) and value.ndim > 0 for value in values)


FORMAT: Final = Format(
    name="pickle",
    suffixes=(".pkl", ".pickle"),
    read=read_pickle,
    version=5,
    shaped_by=("lenient", "trust_pickle"),  # what was read with trust must not be found without it
    sandboxed=True,
    memory_factor=2,
)
"""Read by the library's unpickler, which calls nothing that a pickle names."""
