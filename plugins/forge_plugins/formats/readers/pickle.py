"""Pickles: lists of records, columns, or one after the other in a file, in bounded memory."""

from __future__ import annotations

import mmap
import pickle
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from forge_plugins.formats.columns.column_writer import ColumnFolder
from forge_plugins.formats.columns.gather import Column
from forge_plugins.formats.columns.table import absent, check_numeric
from forge_plugins.formats.errors import DataError
from forge_plugins.formats.format import Format, Reading
from forge_plugins.formats.readers.pickle_codes import BrokenError
from forge_plugins.formats.readers.pickle_machine import PART, Growing, Machine, opened, plain
from forge_plugins.formats.readers.pickle_values import Opaque, RefusedError
from forge_plugins.formats.readers.records_to_columns import (
    RecordColumns,
    check_lengths,
    first_defects,
    is_record,
    not_a_list,
    records_of,
)

MAX_TRUSTED: Final = 2**28
"""Bytes of a pickle that is run as it is: it is in memory as a whole."""
_MAX_ROW: Final = 2**22
"""Numbers of one field of one record."""
_BLOCK: Final = 2**22
_ROLES: Final = ("input", "target")
"""What two arrays without names are."""
_HINT: Final = (
    "pickle containers, numbers, numpy arrays or torch tensors only; or, if you trust whoever "
    "wrote the file with your account, set trust_pickle: true"
)
_FORMS: Final = "pickle a list of records, an object of columns, or one such object after the other"


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
    if reading.trust_pickle:
        _trusted(file, content)
    else:
        with file.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        _pickles(file, memoryview(mapped), content)  # whose arrays view it to the end
    content.close()


def _pickles(file: Path, view: memoryview, content: Content) -> None:
    place = 0
    try:
        for number in range(len(view)):
            machine = Machine(view, content.take)
            value, place = machine.run(place)
            content.add(machine, value, number)
            if place >= len(view):
                break
    except RefusedError as error:
        raise DataError(file, f"is refused: {error}", hint=_HINT) from error
    except BrokenError as error:
        hint = "it is no whole pickle: write it anew"
        raise DataError(
            file, f"is broken: {error}", place=f"byte {error.place}", hint=hint
        ) from error


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
    try:
        content.add(None, value, 0)
    except RefusedError as error:
        raise DataError(file, f"is refused: {error}", hint=_HINT) from error


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
        self._by_column: dict[str, tuple[RecordColumns, list[Column]]] = {}
        self._whole = 0  # records that came as arrays

    def take(self, column: str | None, items: Any) -> None:
        """A part of a long list: of records, or of a column."""
        if column is None:
            self._records.take([self._record(item) for item in items])
            return
        if self._records.count or self._whole:
            raise self._mixed()
        if column not in self._reading.names:
            self._columns.pass_over([column])
            return
        if column not in self._by_column:
            noted: list[Column] = []
            alone = replace(self._reading, input=column, target=None)
            reader = RecordColumns(self._file, self._columns, _MAX_ROW, alone, note=noted.append)
            self._by_column[column] = reader, noted
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
        result = self._columns_of(opened(value))
        if isinstance(result, Mapping) and result and _are_arrays([*result.values()]):
            self._add_arrays(result)
        elif isinstance(result, Mapping) and is_record(result, self._reading):
            self._records.take([self._record(result)])
        else:
            if isinstance(result, Mapping):
                result = {n: _listed(column) for n, column in result.items()}
            records = records_of(self._file, result, self._reading.names)
            for begin in range(0, len(records), PART):
                self._records.take([self._record(part) for part in records[begin : begin + PART]])
        if self._whole and self._records.count:
            raise self._mixed()

    def _columns_of(self, value: Any) -> Any:
        """Columns by name, without those that nobody asks for; all else as it is.

        One array is the inputs, two are inputs and targets.
        """
        result = value
        if isinstance(result, list | tuple) and len(result) == len(_ROLES):
            parts = [
                part if isinstance(part, Mapping | Opaque) else plain(part, 1) for part in result
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
        return {name: plain(result[name], 1) for name in names if name in result}

    def _record(self, record: Any) -> Any:
        """A record with what is asked for as numbers, lists and arrays, and nothing of the rest."""
        result = opened(record)
        if not isinstance(result, Mapping):
            return result
        asked = {n: _number(plain(result[n], 2)) for n in self._reading.names if n in result}
        return {**dict.fromkeys(result), **asked}

    def _mixed(self) -> DataError:
        message = "holds records, columns of arrays and columns of lists in turns"
        return DataError(self._file, message, hint=_FORMS)

    def _rest_of_columns(self, machine: Machine, value: dict[Any, Any]) -> None:
        for name, column in value.items():
            if name not in self._reading.names:
                continue
            if isinstance(column, Growing) and column.handed:
                machine.rest(column)
                continue
            whole = plain(column, 1)
            if not isinstance(whole, list | np.ndarray):
                raise not_a_list(self._file, name, type(whole).__name__)
            for begin in range(0, len(whole), PART):
                self.take(name, whole[begin : begin + PART])

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
            DataError: there are no records, or columns differ in length.
        """
        if not self._by_column:
            if not self._whole:
                self._records.close()
            return
        asked = {n: self._by_column[n] for n in self._reading.names if n in self._by_column}
        if self._reading.input not in asked:
            raise absent(self._file, self._reading.input, [*self._columns.others(), *asked])
        check_lengths(self._file, {name: reader.count for name, (reader, _) in asked.items()})
        if self._reading.lenient:
            self._columns.note(
                first_defects([np.concatenate(noted) for _, noted in asked.values()])
            )


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
    single = isinstance(value, np.generic) or (isinstance(value, np.ndarray) and not value.ndim)
    return value.item() if single else value


def _are_arrays(values: list[Any]) -> bool:
    return all(isinstance(value, np.ndarray) and value.ndim > 0 for value in values)


FORMAT: Final = Format(
    name="pickle",
    suffixes=(".pkl", ".pickle"),
    read=read_pickle,
    version=4,
    shaped_by=("lenient", "trust_pickle"),  # what was read with trust must not be found without it
)
"""Read by a machine of our own."""
