"""Records, one mapping of fields each, brought into columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, Final

import numpy as np

from forge_plugins.formats.columns import exact
from forge_plugins.formats.columns.column_writer import ColumnFolder
from forge_plugins.formats.columns.table import Column, absent
from forge_plugins.formats.errors import DataError
from forge_plugins.formats.format import Reading
from forge_plugins.formats.readers.field_values import (
    DefectError,
    missing,
    row_of,
    rows_of,
    type_name,
    wrong_length,
    wrong_shape,
    wrong_type,
)

BLOCK: Final = 4096
"""Records that are turned into arrays at a time."""
Places = Callable[[int], str | None]
"""Tells the place in the file of a record of a block, by its number in the block."""


def nowhere(number: int) -> None:
    """The place of a record that has none but its number."""
    del number


class RecordColumns:
    """Brings the fields of records that are asked for into columns, block by block.

    Args:
        file: for the messages.
        columns: where the columns are written.
        budget: numbers that one field of one record may hold at most.
        reading: which fields are read. When it is lenient, a record with a defect is noted (see
            `PROBLEMS`) and its numbers are 0, and null among floats becomes NaN; otherwise the
            first is an error.
        note: takes the defects of each block instead of `columns`.
    """

    def __init__(
        self,
        file: Path,
        columns: ColumnFolder,
        budget: int,
        reading: Reading,
        *,
        note: Callable[[Column], None] | None = None,
    ) -> None:
        self._file, self._columns = file, columns
        self._budget, self._lenient = budget, reading.lenient
        self._names, self._input = reading.names, reading.input
        self._note = note or columns.note
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.count = 0

    def take(
        self,
        records: Sequence[Any],
        places: Places = nowhere,
        dots: int | None = None,
        exactly: Callable[[], Sequence[Any]] | None = None,
    ) -> None:
        """The next records, each a mapping of names to numbers or lists.

        Args:
            records: the records.
            places: tells where each stands.
            dots: in the JSON text of the records, which saves looking at the type of each number:
                if there are as many as numbers, each number has one and is a float.
            exactly: gives the records anew with integers of any length, which are floats in
                `records`.

        Raises:
            DataError: a field that is asked for is missing, of another type or of another shape.
        """
        if not records:
            return
        if isinstance(records[0], Mapping):
            self._columns.pass_over(
                name for name in records[0] if isinstance(name, str) and name not in self._names
            )
        alike = self._alike(records, dots)
        if alike is None:
            if exactly is not None:
                records = exactly()
            for begin in range(0, len(records), BLOCK):
                self._take_each(
                    [
                        (self.count + at, places(begin + at), record)
                        for at, record in enumerate(records[begin : begin + BLOCK])
                    ]
                )
            return
        self._shapes = self._shapes or {name: rows.shape[1:] for name, rows in alike.items()}
        self._write(alike, np.zeros(len(records), np.uint8))

    def close(self) -> None:
        """After the last record.

        Raises:
            DataError: there was none.
        """
        if not self.count:
            raise DataError(self._file, "there are no records", hint="give at least one")

    def _alike(self, records: Sequence[Any], dots: int | None) -> dict[str, Column] | None:
        """The fields of records that are all alike; None when they must be looked at one by one."""
        if set(map(type, records)) != {dict} or self._input not in records[0]:
            return None
        names = [name for name in self._names if name in records[0]]
        if len(names) < len(self._names) and any(self._names[-1] in record for record in records):
            return None
        try:
            values = {name: list(map(itemgetter(name), records)) for name in names}
        except KeyError:
            return None
        if set(map(len, records)) != {len(names)}:
            dots = None  # some are in fields that nobody asks for
        if dots is not None:
            dots -= sum(name.count(".") for name in names) * len(records)
        lists = [name for name in names if type(values[name][0]) is list]
        rest = {name: rows_of(values[name]) for name in names if name not in lists[:1]}
        whole = all(rows is not None and rows.dtype == np.int64 for rows in rest.values())
        result = {name: rows_of(values[name], dots if whole else None) for name in lists[:1]} | rest
        columns = {name: rows for name in names if (rows := result[name]) is not None}
        shapes = {name: rows.shape[1:] for name, rows in columns.items()}
        return (
            columns if len(columns) == len(names) and shapes == (self._shapes or shapes) else None
        )

    def _write(self, columns: Mapping[str, Column], defects: Column) -> None:
        for name, rows in columns.items():
            self._columns.append(name, rows)
        if self._lenient:
            self._note(defects)
        self.count += len(defects)

    def _take_each(self, block: Sequence[tuple[int, str | None, Any]]) -> None:
        """One block of (record number, place, record), looked at one by one."""
        rows: list[dict[str, Column] | None] = []
        defects = np.zeros(len(block), np.uint8)
        first: DataError | None = None
        for at, (number, place, record) in enumerate(block):
            try:
                rows.append(self._rows(number, place, record))
                if not self._shapes and not self._lenient:
                    self._settle(rows)
            except DataError as fault:
                defect = fault.__cause__
                if not (self._lenient and isinstance(defect, DefectError)):
                    self._check(block, rows, defects)  # an earlier record may have a wrong shape
                    raise
                first = first or fault
                defects[at] = defect.kind + 1
                rows.append(None)
        if not self._shapes:
            self._settle(rows, first)
        self._check(block, rows, defects)
        columns = {}
        for name, shape in self._shapes.items():
            result = [row[name] for row in rows if row is not None]
            stacked = np.stack(result) if result else np.zeros((0, *shape), np.int64)
            if stacked.dtype != np.int64:
                self._check_integers(name, rows)
            kind = np.int64 if stacked.dtype == np.int64 else np.float32
            columns[name] = np.zeros((len(block), *shape), kind)
            columns[name][defects == 0] = stacked
        self._write(columns, defects)

    def _rows(self, number: int, place: str | None, record: Any) -> dict[str, Column]:
        def refused(defect: DefectError, name: str | None) -> DataError:
            fault = DataError(
                self._file, str(defect), record=number, field=name, place=place, hint=defect.hint
            )
            fault.__cause__ = defect
            return fault

        if not isinstance(record, Mapping):
            result = type_name(record)
            hint = "each record is an object with the fields input and target"
            raise refused(wrong_type(f"the record is a {result}, not an object", hint), None)
        if self._input not in record and not self._shapes:
            if any(not isinstance(name, str) for name in record):
                hint = "name fields by texts"
                raise refused(wrong_type("a field's name is no text", hint), None)
            fault = absent(self._file, self._input, record, number)
            fault.__cause__ = missing(fault.message)
            raise fault
        rows = {}
        for name in self._names:
            if name not in record:
                if name in self._shapes:
                    raise refused(missing("is missing"), name)
                continue
            if self._shapes and name not in self._shapes:
                raise refused(missing("the first records do not have this field"), name)
            try:
                rows[name] = row_of(record[name], self._budget, lenient=self._lenient)
            except DefectError as defect:
                raise refused(defect, name) from defect
        return rows

    def _check_integers(self, name: str, rows: Sequence[dict[str, Column] | None]) -> None:
        """Whether the integers among a block's floats are floats."""
        for at, row in enumerate(rows):
            if row is not None and row[name].dtype == np.int64:
                value, kind = row[name][np.newaxis], np.dtype(np.float32)
                exact.check_exact(self._file, name, value, kind, self.count + at)

    def _settle(
        self, rows: Sequence[dict[str, Column] | None], first: DataError | None = None
    ) -> None:
        """What the first record is like, or most of the first block in a lenient reading.

        Args:
            rows: of the block; None for those with a defect.
            first: the block's first defect.
        """
        good = [row for row in rows if row is not None]
        kinds = Counter(tuple((name, row[name].shape) for name in sorted(row)) for row in good)
        if not kinds:
            assert first is not None, "a row that is not there has a defect"
            message = f"{first.message}; none of the first {len(rows)} records can be used"
            raise DataError(
                self._file, message, record=first.record, field=first.field, place=first.place,
                hint=first.hint,
            ) from first  # fmt: skip
        self._shapes = dict(kinds.most_common(1)[0][0])

    def _check(
        self,
        block: Sequence[tuple[int, str | None, Any]],
        rows: list[dict[str, Column] | None],
        defects: Column,
    ) -> None:
        """The first block was read before its shapes were settled; all shapes are looked at."""
        for at, row in enumerate(rows):
            if row is None:
                continue
            wrong: tuple[str, DefectError] | None = None
            for name in sorted({*self._shapes, *row}):
                if name not in row:
                    wrong = name, missing("is missing")
                elif name not in self._shapes:
                    wrong = name, missing("the first records do not have this field")
                elif row[name].shape != self._shapes[name]:
                    result, expected = list(row[name].shape), list(self._shapes[name])
                    kind = wrong_length if len(result) == len(expected) == 1 else wrong_shape
                    wrong = name, kind(f"has the shape {result}, not {expected}")
                if wrong:
                    break
            if wrong is None:
                continue
            name, defect = wrong
            number, place, _ = block[at]
            if not self._lenient:
                raise DataError(
                    self._file,
                    str(defect),
                    record=number,
                    field=name,
                    place=place,
                    hint=defect.hint,
                )
            defects[at], rows[at] = defect.kind + 1, None


def is_record(value: Mapping[Any, Any], reading: Reading) -> bool:
    """Whether an object is one record, not columns: its target is a single number.

    Args:
        value: the object.
        reading: what the target is called.
    """
    target = value.get(reading.target or "target")
    single = isinstance(target, np.ndarray) and not target.ndim
    return single or isinstance(target, int | float | np.generic)


def first_defects(columns: Sequence[Column]) -> Column:
    """The first defect of each record, where each column has noted its own.

    Args:
        columns: of each column, the defects, shape (records,).
    """
    first = columns[0]
    for other in columns[1:]:
        first = np.where(first == 0, other, first)
    return first


def column_parts(
    file: Path, value: Any, names: Sequence[str], count: int
) -> Iterator[list[dict[str, Any]]]:
    """The records of a mapping of columns, some at a time.

    Args:
        file: for the messages.
        value: the mapping of names to lists or arrays.
        names: of the columns that are read; the first must be there.
        count: records at a time.

    Raises:
        DataError: it is no such mapping, or the columns are not of one length.
    """
    forms = "give a list of records or one object of columns, with the fields input and target"
    if not isinstance(value, Mapping) or any(not isinstance(name, str) for name in value):
        raise DataError(file, f"the whole is a {type_name(value)}", hint=forms)
    if names[0] not in value:
        raise absent(file, names[0], value)
    asked = {name: value[name] for name in names if name in value}
    for name, column in asked.items():
        single = isinstance(column, np.ndarray) and not column.ndim
        if single or not isinstance(column, list | tuple | np.ndarray):
            raise not_a_list(file, name, type(column).__name__)
    check_lengths(file, {name: len(column) for name, column in asked.items()})
    for begin in range(0, len(asked[names[0]]), count):
        rows = zip(*(column[begin : begin + count] for column in asked.values()), strict=True)
        yield [dict(zip(asked, row, strict=True)) for row in rows]


def not_a_list(file: Path, name: str, found: str) -> DataError:
    """What to say of a column that is no list."""
    forms = "give a list of records or one object of columns, with the fields input and target"
    return DataError(file, f"the column is a {found}, not a list", field=name, hint=forms)


def check_lengths(file: Path, lengths: Mapping[str, int]) -> None:
    """Whether columns are of one length.

    Raises:
        DataError: they are not.
    """
    count = next(iter(lengths.values()), 0)
    for name, length in lengths.items():
        if length != count:
            raise DataError(
                file,
                f"has {length} records, other columns have {count}",
                field=name,
                record=min(length, count),
                hint="give each column as many records",
            )
