"""Pickles: lists of records, columns, or one after the other in a file, in bounded memory."""

from __future__ import annotations

import mmap
import pickle
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from forge_plugins.formats.column_file import ColumnFolder
from forge_plugins.formats.fault import DataFault
from forge_plugins.formats.format import Format, Reading
from forge_plugins.formats.gather import Column
from forge_plugins.formats.pickle_codes import BrokenError
from forge_plugins.formats.pickle_machine import PART, Growing, Machine, plain
from forge_plugins.formats.pickle_values import RefusedError
from forge_plugins.formats.records import RecordColumns, check_lengths, not_a_list, records_of
from forge_plugins.formats.table import PROBLEM, check_numeric

MAX_TRUSTED: Final = 2**28
"""Bytes of a pickle that is run as it is: it is in memory as a whole."""
_MAX_ROW: Final = 2**22
"""Numbers of one field of one record."""
_BLOCK: Final = 2**22
_HINT: Final = (
    "pickle containers, numbers, numpy arrays or torch tensors only; or, if you trust whoever "
    "wrote the file with your account, set trust_pickle: true"
)
_FORMS: Final = "pickle a list of records, an object of columns, or one such object after the other"


def read_pickle(
    file: Path, columns: ColumnFolder, reading: Reading, names: Collection[str] | None = None
) -> None:
    """Write the columns of the pickles in a file, one after the other.

    Args:
        file: the pickles. With `trust_pickle` there is one, in memory as a whole.
        columns: where they are written.
        reading: whether it is `lenient`, see `RecordColumns`, and whether the pickle is trusted.
        names: all are written.

    Raises:
        DataFault: one is broken, holds what is not allowed, too much at once, or no records of
            numbers.
    """
    del names
    content = _Content(file, columns, lenient=reading.lenient)
    if reading.trust_pickle:
        _trusted(file, content)
    else:
        with file.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        _pickles(file, memoryview(mapped), content)  # whose arrays view it to the end
    content.close()


def _pickles(file: Path, view: memoryview, content: _Content) -> None:
    place = 0
    try:
        for number in range(len(view)):
            machine = Machine(view, content.take)
            value, place = machine.run(place)
            content.add(machine, value, number)
            if place >= len(view):
                break
    except RefusedError as error:
        raise DataFault(file, f"is refused: {error}", hint=_HINT) from error
    except BrokenError as error:
        hint = "it is no whole pickle: write it anew"
        raise DataFault(
            file, f"is broken: {error}", place=f"byte {error.place}", hint=hint
        ) from error


def _trusted(file: Path, content: _Content) -> None:
    size = file.stat().st_size
    if size > MAX_TRUSTED:
        told = f"{size} bytes; a pickle that is run is in memory as a whole: {MAX_TRUSTED} may be"
        raise DataFault(file, told, hint="pickle arrays or lists of numbers, which need no trust")
    try:
        value = pickle.loads(file.read_bytes())  # noqa: S301  asked for
    except Exception as error:
        told = f"{type(error).__name__}: {str(error)[:200]}"
        raise DataFault(file, f"cannot be unpickled: {told}", hint=_HINT) from error
    try:
        content.add(None, value, 0)
    except RefusedError as error:
        raise DataFault(file, f"is refused: {error}", hint=_HINT) from error


class _Content:
    """What the pickles of a file hold, on its way into columns."""

    def __init__(self, file: Path, columns: ColumnFolder, *, lenient: bool) -> None:
        self._file, self._columns, self._lenient = file, columns, lenient
        self._records = self._reader()
        self._by_column: dict[str, tuple[RecordColumns, list[Column]]] = {}
        self._whole = 0  # records that came as arrays

    def _reader(self, noted: list[Column] | None = None) -> RecordColumns:
        note = None if noted is None else noted.append
        return RecordColumns(self._file, self._columns, _MAX_ROW, lenient=self._lenient, note=note)

    def take(self, column: str | None, items: Any) -> None:
        """A part of a long list: of records, or of a column."""
        if column is None:
            self._records.take([_record(item) for item in items])
            return
        if self._records.count or self._whole:
            raise self._mixed()
        if column not in self._by_column:
            noted: list[Column] = []
            self._by_column[column] = self._reader(noted), noted
        rows = items if isinstance(items, np.ndarray) else [plain(item, 2) for item in items]
        self._by_column[column][0].take([{column: _number(row)} for row in rows])

    def add(self, machine: Machine | None, value: Any, number: int) -> None:
        """What one pickle holds, but for what was taken of it already."""
        if self._by_column and number:
            raise self._mixed()
        if isinstance(value, Growing) and value.handed:
            assert machine is not None
            machine.rest(value)
            return
        if isinstance(value, dict) and self._by_column:
            assert machine is not None
            self._rest_of_columns(machine, value)
            return
        found = plain(value)
        if isinstance(found, list) and len(found) in (2, 3) and _are_arrays(found):
            found = dict(zip(("input", "target", "weight"), found, strict=False))
        if isinstance(found, Mapping) and found and _are_arrays([*found.values()]):
            self._add_arrays(found)
        elif isinstance(found, Mapping) and _is_record(found):
            self._records.take([_record(found)])
        else:
            if isinstance(found, Mapping):
                found = {n: _listed(column) for n, column in found.items()}
            records = records_of(self._file, found)
            for begin in range(0, len(records), PART):
                self._records.take([_record(part) for part in records[begin : begin + PART]])
        if self._whole and self._records.count:
            raise self._mixed()

    def _mixed(self) -> DataFault:
        told = "holds records, columns of arrays and columns of lists in turns"
        return DataFault(self._file, told, hint=_FORMS)

    def _rest_of_columns(self, machine: Machine, value: dict[Any, Any]) -> None:
        for name, column in value.items():
            if not isinstance(name, str):
                raise DataFault(self._file, "a column's name is no text", hint=_FORMS)
            if isinstance(column, Growing) and column.handed:
                machine.rest(column)
                continue
            whole = plain(column, 1)
            if not isinstance(whole, list | np.ndarray):
                raise not_a_list(self._file, name, type(whole).__name__)
            for begin in range(0, len(whole), PART):
                self.take(name, whole[begin : begin + PART])

    def _add_arrays(self, found: Mapping[Any, Column]) -> None:
        if any(not isinstance(name, str) for name in found):
            raise DataFault(self._file, "a column's name is no text", hint="name columns by texts")
        if self._whole and set(found) != set(self._columns.names()):
            told = f"has the columns {sorted(found)}, not {sorted(self._columns.names())}"
            raise DataFault(self._file, told, record=self._whole, hint=_FORMS)
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
        self._whole += lengths.get("input", next(iter(lengths.values())))

    def _check_alike(self, name: str, first: Column, column: Column) -> None:
        hint = "give every object columns of the same types and shapes"
        told = None
        if first.shape[1:] != column.shape[1:]:
            told = f"has the shape {list(column.shape[1:])}, not {list(first.shape[1:])}"
        elif first.dtype.newbyteorder("=") != column.dtype.newbyteorder("="):
            told = f"has the type {column.dtype}, not {first.dtype}"
        if told is not None:
            raise DataFault(self._file, told, field=name, record=self._whole, hint=hint)

    def close(self) -> None:
        """After the last pickle.

        Raises:
            DataFault: there are no records, or columns differ in length.
        """
        if not self._by_column:
            if not self._whole:
                self._records.close()
            return
        check_lengths(
            self._file, {name: reader.count for name, (reader, _) in self._by_column.items()}
        )
        if self._lenient:
            noted = [np.concatenate(parts) for _, parts in self._by_column.values()]
            worst = noted[0]
            for other in noted[1:]:
                worst = np.where(worst == 0, other, worst)
            self._columns.append(PROBLEM, worst)


def _blocks(column: Column) -> Iterator[Column]:
    """Rows of an array, a few megabytes at a time; an empty one is one block."""
    row = max(1, column.nbytes // max(1, len(column)))
    step = max(1, _BLOCK // row)
    for begin in range(0, max(1, len(column)), step):
        yield column[begin : begin + step]


def _listed(column: Any) -> Any:
    if isinstance(column, np.ndarray):
        return list(column) if column.ndim else column.item()
    return column


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _record(record: Any) -> Any:
    found = plain(record, 1)
    if not isinstance(found, Mapping):
        return found
    return {
        name: value.item() if isinstance(value, np.ndarray) and not value.ndim else _number(value)
        for name, value in found.items()
    }


def _is_record(value: Mapping[Any, Any]) -> bool:
    """Whether an object is one record: its target is a single number."""
    target = value.get("target")
    single = isinstance(target, np.ndarray) and not target.ndim
    return single or isinstance(target, int | float | np.generic)


def _are_arrays(values: list[Any]) -> bool:
    return all(isinstance(value, np.ndarray) and value.ndim for value in values)


FORMAT: Final = Format(
    name="pickle",
    suffixes=(".pkl", ".pickle"),
    read=read_pickle,
    version=3,
    shaped_by=("lenient", "trust_pickle"),  # what was read with trust must not be found without it
)
"""Read by a machine of our own."""
