"""Records, one mapping of fields each, brought into columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np

from forge_plugins.formats.fault import DataFault
from forge_plugins.formats.table import PROBLEM, PROBLEMS, Column

BLOCK: Final = 4096
"""Records that are turned into arrays at a time."""
MAX_DEPTH: Final = 8
_EXACT: Final = 2**53  # integers beyond are not all floats


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


def _row(value: Any, budget: int, *, lenient: bool) -> Column:
    """One field of one record as an array of int64 or float32."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "iuf":
            raise _wrong_type(f"is an array of {value.dtype}, not of numbers")
        if value.dtype.kind == "u" and value.dtype.itemsize == 8 and (value > 2**63 - 1).any():
            raise _wrong_type("an integer does not fit 64 bits")
        if value.dtype.kind == "f":
            with np.errstate(over="ignore"):
                narrow = value.astype(np.float32)
            if (np.isfinite(value) & ~np.isfinite(narrow)).any():
                raise _wrong_type("a number is too large for 32-bit floats")
            return narrow
        return value.astype(np.int64)
    leaves: list[Any] = []
    shape = _leaves(value, leaves, budget)
    kinds = set(map(type, leaves))
    if lenient and type(None) in kinds:
        leaves = [float("nan") if leaf is None else leaf for leaf in leaves]
        kinds = kinds - {type(None)} | {float}
    strange = sorted(kind.__name__ for kind in kinds - {int, float})
    if strange:
        told = "null" if strange[0] == "NoneType" else strange[0]
        raise _wrong_type(f"holds a value of the type {told}, not a number")
    if kinds <= {int}:
        try:
            return np.array(leaves, np.int64).reshape(shape)
        except OverflowError:
            raise _wrong_type("an integer does not fit 64 bits") from None
    if int in kinds and any(type(leaf) is int and abs(leaf) > _EXACT for leaf in leaves):
        raise _wrong_type("an integer among floats is beyond 2**53 and would be rounded")
    wide = np.array(leaves, np.float64)
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float32)
    strange_numbers = ~np.isfinite(narrow)
    if strange_numbers.any() and np.isfinite(wide[strange_numbers]).any():
        raise _wrong_type("a number is too large for 32-bit floats")
    return narrow.reshape(shape)


class _Builder:
    """Collects blocks of rows."""

    def __init__(self, file: Path, budget: int, *, lenient: bool) -> None:
        self._file, self._budget, self._lenient = file, budget, lenient
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._blocks: dict[str, list[Column]] = {}
        self._problems: list[Column] = []

    def take(self, block: Sequence[tuple[int, str | None, Any]]) -> None:
        """One block of (record number, place, record)."""
        rows: list[dict[str, Column] | None] = []
        defects = np.zeros(len(block), np.uint8)
        for at, (number, place, record) in enumerate(block):
            try:
                rows.append(self._rows(number, place, record))
                if not self._shapes and not self._lenient:
                    self._settle(rows)
            except DataFault as fault:
                defect = fault.__cause__
                if not (self._lenient and isinstance(defect, _DefectError)):
                    self._check(block, rows, defects)  # an earlier record may have a wrong shape
                    raise
                defects[at] = defect.kind + 1
                rows.append(None)
        if not self._shapes:
            self._settle(rows)
        self._check(block, rows, defects)
        for name, shape in self._shapes.items():
            found = [row[name] for row in rows if row is not None]
            stacked = np.stack(found) if found else np.zeros((0, *shape), np.int64)
            whole = np.zeros((len(block), *shape), stacked.dtype)
            whole[defects == 0] = stacked
            self._blocks.setdefault(name, []).append(whole)
        self._problems.append(defects)

    def _rows(self, number: int, place: str | None, record: Any) -> dict[str, Column]:
        def refused(defect: _DefectError, name: str | None) -> DataFault:
            fault = DataFault(
                self._file, str(defect), record=number, field=name, place=place, hint=defect.hint
            )
            fault.__cause__ = defect
            return fault

        if not isinstance(record, Mapping):
            found = type(record).__name__
            hint = "each record is an object with the fields input and target"
            raise refused(_wrong_type(f"the record is a {found}, not an object", hint), None)
        if any(not isinstance(name, str) for name in record):
            raise refused(_wrong_type("a field's name is no text", "name fields by texts"), None)
        rows = {}
        for name in sorted({*self._shapes, *record}):
            if name not in record:
                raise refused(_missing("is missing"), name)
            if self._shapes and name not in self._shapes:
                raise refused(_missing("the first records do not have this field"), name)
            try:
                rows[name] = _row(record[name], self._budget, lenient=self._lenient)
            except _DefectError as defect:
                raise refused(defect, name) from defect
        return rows

    def _settle(self, rows: Sequence[dict[str, Column] | None]) -> None:
        """What the first record is like, or most of the first block in a lenient reading."""
        good = [row for row in rows if row is not None]
        kinds = Counter(tuple((name, row[name].shape) for name in sorted(row)) for row in good)
        if not kinds:
            raise DataFault(
                self._file,
                f"none of the first {len(rows)} records can be used",
                hint="look at them with quality_threshold: 0",
            )
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
                    found, expected = list(row[name].shape), list(self._shapes[name])
                    wrong = name, _wrong_shape(f"has the shape {found}, not {expected}")
                if wrong:
                    break
            if wrong is None:
                continue
            name, defect = wrong
            number, place, _ = block[at]
            if not self._lenient:
                raise DataFault(
                    self._file,
                    str(defect),
                    record=number,
                    field=name,
                    place=place,
                    hint=defect.hint,
                )
            defects[at], rows[at] = defect.kind + 1, None

    def columns(self) -> dict[str, Column]:
        """All of it; integers where all are integers, else 32-bit floats."""
        if not self._problems:
            raise DataFault(self._file, "there are no records", hint="give at least one")
        columns = {
            name: np.concatenate(
                blocks
                if all(block.dtype == np.int64 for block in blocks)
                else [block.astype(np.float32) for block in blocks]
            )
            for name, blocks in self._blocks.items()
        }
        if PROBLEM in columns:
            raise DataFault(self._file, "is a reserved name", field=PROBLEM, hint="rename it")
        if self._lenient:
            columns[PROBLEM] = np.concatenate(self._problems)
        return columns


def columns_of_records(
    file: Path, records: Iterable[tuple[int, str | None, Any]], budget: int, *, lenient: bool
) -> dict[str, Column]:
    """Bring records into columns.

    Args:
        file: for the messages.
        records: (number, place or None, record); a record maps names to numbers or lists.
        budget: numbers that one field of one record may hold at most.
        lenient: a record with a defect is noted in the column `problem` (see `PROBLEMS`) and its
            numbers are 0, and null among floats becomes NaN; otherwise the first is an error.

    Raises:
        DataFault: a field is missing, of another type or of another shape; there is no record.
    """
    builder = _Builder(file, budget, lenient=lenient)
    iterator = iter(records)
    while block := list(islice(iterator, BLOCK)):
        builder.take(block)
    return builder.columns()


def records_of(file: Path, value: Any) -> Iterable[tuple[int, str | None, Any]]:
    """The records of a list of mappings or of a mapping of columns.

    Raises:
        DataFault: it is neither, or the columns are not of one length.
    """
    if isinstance(value, list | tuple):
        return ((number, None, record) for number, record in enumerate(value))
    forms = "give a list of records or one object of columns, with the fields input and target"
    if not isinstance(value, Mapping) or any(not isinstance(name, str) for name in value):
        raise DataFault(file, f"the whole is a {type(value).__name__}", hint=forms)
    for name, column in value.items():
        if not isinstance(column, list | tuple):
            found = type(column).__name__
            raise DataFault(file, f"the column is a {found}, not a list", field=name, hint=forms)
    lengths = {name: len(column) for name, column in value.items()}
    if not lengths:
        raise DataFault(file, "there are no fields", hint=forms)
    count = lengths.get("input", next(iter(lengths.values())))
    for name, length in lengths.items():
        if length != count:
            raise DataFault(
                file,
                f"has {length} records, other columns have {count}",
                field=name,
                record=min(length, count),
                hint="give each column as many records",
            )
    return (
        (number, None, {name: column[number] for name, column in value.items()})
        for number in range(count)
    )


assert len(PROBLEMS) == 3, "the kinds of _DefectError are places in PROBLEMS"
