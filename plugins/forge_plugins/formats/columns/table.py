"""Named columns of one length, mapped from a file or held in memory."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from forge_plugins.formats.columns.gather import Column, Rows, take
from forge_plugins.formats.columns.source_file import Source
from forge_plugins.formats.errors import DataError

__all__ = ["PROBLEMS", "Column", "Rows", "Table", "absent", "check_numeric", "take"]

PROBLEMS: Final = ("missing field", "wrong type", "wrong shape", "wrong length")
"""Defects that lenient readers note: for each record 0, or the defect's place here plus 1."""
_SHOWN: Final = 8


@dataclass(frozen=True)
class Table:
    """What a file holds.

    Args:
        file: where it was read.
        format: name of the format.
        columns: array by role, each of shape (records, ...): `input`, and `target` where there is
            one.
        problems: defect by record, shape (records,), for a lenient reading; see `PROBLEMS`.
        content: hash of the file's content; empty for a table that was not read from one.
        source: the file, to be watched while columns lie in it; None when none does.
        settings: what else shaped the columns: format, version and settings of the reader.
        names: what the file calls a role, where it is not the role's own name.
        others: the file's columns that nobody asked for, as far as they are known.
    """

    file: Path
    format: str
    columns: Mapping[str, Column | Rows]
    problems: NDArray[np.uint8] | None = field(default=None)
    content: str = ""
    source: Source | None = None
    settings: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    others: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if "input" not in self.columns:
            raise self.without("input")
        for role, column in self.columns.items():
            name = self.name_of(role)
            check_numeric(self.file, name, column.dtype)
            if not column.ndim:
                raise DataError(
                    self.file,
                    "is a single number, not one for each record",
                    field=name,
                    hint="give an array whose first dimension counts the records",
                )
            if len(column) != len(self.columns["input"]):
                raise DataError(
                    self.file,
                    f"has {len(column)} records and '{self.name_of('input')}' has "
                    f"{len(self.columns['input'])}",
                    field=name,
                    hint="give each field as many records",
                )
            if not all(column.shape[1:]):
                raise DataError(
                    self.file, "holds no number in a record", field=name, hint="leave it out"
                )
        if not len(self):
            raise DataError(self.file, "there are no records", hint="give at least one")

    def __len__(self) -> int:
        return len(self.columns["input"])

    def name_of(self, role: str) -> str:
        """What the file calls the column of a role."""
        return self.names.get(role, role)

    def without(self, role: str) -> DataError:
        """What to say when there is no column of a role."""
        there = {self.name_of(other) for other in self.columns} | {*self.others}
        return absent(self.file, self.name_of(role), there)


def absent(file: Path, name: str, there: Collection[str], record: int | None = None) -> DataError:
    """What to say when a file does not have the column that is asked for.

    Args:
        file: the file.
        name: of the column.
        there: the names of the columns that it has.
        record: the record that does not have it, if they may differ.
    """
    near = difflib.get_close_matches(name, there, 1)
    shown = sorted(there)
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    message = f"there is no field '{name}'; there are {shown[:_SHOWN]}{more}"
    meant = f"did you mean '{near[0]}'? " if near else ""
    hint = f"{meant}input_column and target_column say which columns are read"
    return DataError(file, message, field=name, record=record, hint=hint)


def check_numeric(file: Path, name: str, dtype: np.dtype[Any]) -> None:
    """Refuse what is no array of numbers.

    Raises:
        DataError: objects, texts, records, complex numbers, times.
    """
    if dtype.kind not in "iufb" or dtype.itemsize > 8:
        raise DataError(
            file,
            f"holds values of the type {dtype}, not numbers",
            field=name,
            hint="numbers are integers and floats of up to 64 bits",
        )
