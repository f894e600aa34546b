"""Records, one mapping of fields each, brought into columns."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any, Final

import numpy as np

from forge_plugins.formats.columns import exact
from forge_plugins.formats.columns.column_writer import ColumnFolder
from forge_plugins.formats.columns.table import PROBLEMS, Column, absent
from forge_plugins.formats.errors import DataError
from forge_plugins.formats.format import Reading

BLOCK: Final = 4096
"""Records that are turned into arrays at a time."""
MAX_DEPTH: Final = 8
_EXACT: Final = 2**24  # integers beyond are not all 32-bit floats
_LONG: Final = 2.0**64  # a parser that has no longer integers makes floats of them
_NUMBERS: Final = frozenset({int, float, bool})
"""Types of what is a number: true and false are 1 and 0, as arrays of any format have them."""


class NoNumber:
    """What stands for a number in a file and is none.

    Args:
        text: as it stands there.
    """

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


_ABSENT: Final = (type(None), NoNumber)


def type_name(value: Any) -> str:
    """What a value is, for messages."""
    return value.text[:40] if isinstance(value, NoNumber) else type(value).__name__


class _DefectError(Exception):
    def __init__(self, kind: int, message: str, hint: str) -> None:
        self.kind, self.hint = kind, hint
        super().__init__(message)


def _missing(message: str) -> _DefectError:
    return _DefectError(0, message, "give every record the same fields")


def _wrong_type(message: str, hint: str = "give a number or lists of numbers") -> _DefectError:
    return _DefectError(1, message, hint)


def _wrong_shape(message: str) -> _DefectError:
    return _DefectError(2, message, "give every record as many numbers")


def _wrong_length(message: str) -> _DefectError:
    return _DefectError(3, message, "give every record a list of one length, or cut and fill them")


def _leaves(value: Any, found: list[Any], budget: int, depth: int = 0) -> tuple[int, ...]:
    """Append the leaves of nested lists; their shape."""
    if not isinstance(value, list | tuple):
        found.append(value)
        return ()
    if depth >= MAX_DEPTH:
        raise _wrong_shape(f"lists are nested deeper than {MAX_DEPTH}")
    if not any(issubclass(kind, list | tuple) for kind in set(map(type, value))):
        found.extend(value)
        shape: tuple[int, ...] = ()
    else:
        shapes = set()
        for part in value:
            shapes.add(_leaves(part, found, budget, depth + 1))
            if len(shapes) > 1:
                raise _wrong_shape("is ragged: its lists are not of one length")
        shape = shapes.pop()
    if len(found) > budget:
        raise _wrong_shape(f"holds more than {budget} numbers, more than the file has bytes")
    return (len(value), *shape)


def _array_row(value: Column) -> Column:
    """An array as int64 or float32."""
    if value.dtype.kind not in "iufb":
        raise _wrong_type(f"is an array of {value.dtype}, not of numbers")
    if value.dtype.kind == "u" and value.dtype.itemsize == 8 and (value > 2**63 - 1).any():
        raise _wrong_type("an integer does not fit 64 bits")
    if value.dtype.kind != "f":
        return value.astype(np.int64)
    with np.errstate(over="ignore"):
        narrow = value.astype(np.float32)
    if (np.isfinite(value) & ~np.isfinite(narrow)).any():
        raise _wrong_type("a number is too large for 32-bit floats")
    return narrow


def _row(value: Any, budget: int, *, lenient: bool) -> Column:
    """One field of one record as an array of int64 or float32."""
    if isinstance(value, np.ndarray):
        return _array_row(value)
    leaves: list[Any] = []
    shape = _leaves(value, leaves, budget)
    kinds = set(map(type, leaves))
    if lenient and not kinds.isdisjoint({type(None), NoNumber}):
        leaves = [float("nan") if isinstance(leaf, _ABSENT) else leaf for leaf in leaves]
        kinds = kinds - {type(None), NoNumber} | {float}
    if not kinds <= _NUMBERS:
        raise _no_number(leaves, kinds)
    if float not in kinds:
        try:
            return np.array(leaves, np.int64).reshape(shape)
        except OverflowError:
            raise _wrong_type("an integer does not fit 64 bits") from None
    for leaf in leaves if int in kinds else ():
        if type(leaf) is int and not exact.is_exact(leaf):
            raise _wrong_type(exact.rounded(leaf), exact.HINT)
    wide = np.array(leaves, np.float64)
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float32)
    strange_numbers = ~np.isfinite(narrow)
    if strange_numbers.any() and np.isfinite(wide[strange_numbers]).any():
        raise _wrong_type("a number is too large for 32-bit floats")
    return narrow.reshape(shape)


def _no_number(leaves: Sequence[Any], kinds: set[type]) -> _DefectError:
    """What to say of values that are no numbers."""
    if NoNumber in kinds:
        text = next(leaf.text for leaf in leaves if type(leaf) is NoNumber)
        named = text.lstrip("-") in ("NaN", "Infinity")
        message = "NaN and Infinity are not JSON" if named else f"{text[:40]} is beyond all floats"
        hint = "mend it, or set quality_threshold above 0 to leave such samples out"
        return _wrong_type(message, hint)
    strange = min(kind.__name__ for kind in kinds - _NUMBERS)
    message = "null" if strange == "NoneType" else strange
    return _wrong_type(f"holds a value of the type {message}, not a number")


def rows_of(values: Sequence[Any], dots: int | None = None) -> Column | None:
    """Many records' values of one field at once, as `_row` gives them one by one.

    Args:
        values: of the records.
        dots: in the values' JSON text; when they are as many as the numbers, all are floats.

    Returns:
        int64 or float32, shape (values, ...); None when they are not all alike or one may have a
        defect, so that each must be looked at.
    """
    flat, inner, kinds = _flat(values, dots)
    if kinds == {np.ndarray} and not inner:
        return _stacked(values)
    if not kinds or not kinds <= _NUMBERS or -1 in inner:
        return None
    if float not in kinds:
        try:
            return np.array(flat, np.int64).reshape(len(values), *inner)
        except OverflowError:
            return None
    # struct is three times as fast as numpy, and takes the same numbers
    try:
        wide = np.frombuffer(struct.pack(f"{len(flat)}d", *flat), np.float64)
    except struct.error:  # the dots were those of other things
        return None
    sizes = np.abs(wide)
    doubtful = (sizes >= _LONG) | ((sizes > _EXACT) if int in kinds else False)
    narrow = None if doubtful.any() else _narrowed(wide)
    return None if narrow is None else narrow.reshape(len(values), *inner)


def _flat(values: Sequence[Any], dots: int | None) -> tuple[Sequence[Any], list[int], set[type]]:
    """The leaves of nested lists, their shape (-1: ragged) and types."""
    inner: list[int] = []
    flat, kinds = values, set(map(type, values))
    for _ in range(MAX_DEPTH):
        if kinds != {list}:
            break
        widths = set(map(len, flat))
        inner.append(widths.pop() if len(widths) == 1 else -1)
        flat = list(chain.from_iterable(flat))
        plain = dots == len(flat) and bool(flat) and type(flat[0]) is float
        kinds = {float} if plain else set(map(type, flat))
    return flat, inner, kinds


def _stacked(values: Sequence[Column]) -> Column | None:
    if len({(part.dtype, part.shape) for part in values}) != 1:
        return None
    numbers = np.stack(values)
    if numbers.dtype.kind == "f":
        return _narrowed(numbers)
    whole = numbers.dtype.kind in "iub" and numbers.dtype != np.uint64
    return numbers.astype(np.int64) if whole else None


def _narrowed(wide: Column) -> Column | None:
    """As 32-bit floats; None when a finite number becomes infinite."""
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float32)
    strange = ~np.isfinite(narrow)
    return None if strange.any() and np.isfinite(wide[strange]).any() else narrow


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
                if not (self._lenient and isinstance(defect, _DefectError)):
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
        def refused(defect: _DefectError, name: str | None) -> DataError:
            fault = DataError(
                self._file, str(defect), record=number, field=name, place=place, hint=defect.hint
            )
            fault.__cause__ = defect
            return fault

        if not isinstance(record, Mapping):
            result = type_name(record)
            hint = "each record is an object with the fields input and target"
            raise refused(_wrong_type(f"the record is a {result}, not an object", hint), None)
        if self._input not in record and not self._shapes:
            if any(not isinstance(name, str) for name in record):
                hint = "name fields by texts"
                raise refused(_wrong_type("a field's name is no text", hint), None)
            fault = absent(self._file, self._input, record, number)
            fault.__cause__ = _missing(fault.message)
            raise fault
        rows = {}
        for name in self._names:
            if name not in record:
                if name in self._shapes:
                    raise refused(_missing("is missing"), name)
                continue
            if self._shapes and name not in self._shapes:
                raise refused(_missing("the first records do not have this field"), name)
            try:
                rows[name] = _row(record[name], self._budget, lenient=self._lenient)
            except _DefectError as defect:
                raise refused(defect, name) from defect
        return rows

    def _check_integers(self, name: str, rows: Sequence[dict[str, Column] | None]) -> None:
        """Whether the integers among a block's floats are floats."""
        for at, row in enumerate(rows):
            if row is not None and row[name].dtype == np.int64:
                item, kind = row[name][np.newaxis], np.dtype(np.float32)
                exact.check_exact(self._file, name, item, kind, self.count + at)

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
            wrong: tuple[str, _DefectError] | None = None
            for name in sorted({*self._shapes, *row}):
                if name not in row:
                    wrong = name, _missing("is missing")
                elif name not in self._shapes:
                    wrong = name, _missing("the first records do not have this field")
                elif row[name].shape != self._shapes[name]:
                    result, expected = list(row[name].shape), list(self._shapes[name])
                    kind = _wrong_length if len(result) == len(expected) == 1 else _wrong_shape
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


assert len(PROBLEMS) == 4, "the kinds of _DefectError are places in PROBLEMS"
