"""Named columns of one length, mapped from a file or held in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from forge_plugins.formats.fault import DataFault

Column = NDArray[Any]

PROBLEM: Final = "problem"
"""Column of the lenient readers: 0, or the place of a record's defect in `PROBLEMS`, plus 1."""
PROBLEMS: Final = ("missing field", "wrong type", "wrong shape")


@dataclass(frozen=True)
class Table:
    """What a file holds.

    Args:
        file: where it was read.
        format: name of the format.
        columns: array by name, each of shape (records, ...); `input` is one of them.
        problems: defect by record, shape (records,), for a lenient reading; see `PROBLEMS`.
        content: hash of the file's content; empty for a table that was not read from one.
        records: the structured array whose fields the columns are, if they are.
    """

    file: Path
    format: str
    columns: Mapping[str, Column]
    problems: NDArray[np.uint8] | None = field(default=None)
    content: str = ""
    records: Column | None = None

    def __post_init__(self) -> None:
        if "input" not in self.columns:
            raise DataFault(
                self.file,
                f"there is no field 'input'; there are {sorted(self.columns)[:8]}",
                field="input",
                hint="name the inputs 'input' and the targets 'target'",
            )
        for name, column in self.columns.items():
            check_numeric(self.file, name, column.dtype)
            if not column.ndim:
                raise DataFault(
                    self.file,
                    "is a single number, not one for each record",
                    field=name,
                    hint="give an array whose first dimension counts the records",
                )
            if len(column) != len(self.columns["input"]):
                raise DataFault(
                    self.file,
                    f"has {len(column)} records and 'input' has {len(self.columns['input'])}",
                    field=name,
                    hint="give each field as many records",
                )
            if not all(column.shape[1:]):
                raise DataFault(
                    self.file, "holds no number in a record", field=name, hint="leave it out"
                )
        if not len(self):
            raise DataFault(self.file, "there are no records", hint="give at least one")

    def __len__(self) -> int:
        return len(self.columns["input"])


def check_numeric(file: Path, name: str, dtype: np.dtype[Any]) -> None:
    """Refuse what is no array of numbers.

    Raises:
        DataFault: objects, texts, records, complex numbers, times.
    """
    if dtype.kind not in "iufb" or dtype.itemsize > 8:
        raise DataFault(
            file,
            f"holds values of the type {dtype}, not numbers",
            field=name,
            hint="numbers are integers and floats of up to 64 bits",
        )


def take(column: Column, index: NDArray[np.int64]) -> Column:
    """Rows of a column as a fresh array, in native byte order; one gather, whatever it maps."""
    plain = np.asarray(column)  # a memmap's own indexing is slower
    # `take` copies a whole array that does not lie in one piece
    rows = np.take(plain, index, axis=0) if plain.flags.c_contiguous else plain[index]
    return rows if rows.dtype.isnative else rows.astype(rows.dtype.newbyteorder("="))


class Fields(dict[str, Column]):
    """Columns that are the fields of one structured array.

    Args:
        rows: the array, one record in each element.
        names: of the fields.
    """

    def __init__(self, rows: Column, names: Iterable[str]) -> None:
        super().__init__({name: rows[name] for name in names})
        self.rows = rows


def take_records(rows: Column, index: NDArray[np.int64], names: Iterable[str]) -> dict[str, Column]:
    """Fields of some records as fresh arrays, in native byte order.

    The records are gathered as they lie, by words: one gather of long rows, which is faster than a
    gather for each field with gaps between.
    """
    plain = np.asarray(rows)
    if not plain.flags.c_contiguous or plain.ndim != 1:
        return {name: take(rows[name], index) for name in names}
    word = next(size for size in (8, 4, 2, 1) if plain.dtype.itemsize % size == 0)
    words = plain.view(np.uint8).reshape(len(plain), -1).view(f"u{word}")
    found = np.take(words, index, axis=0).view(np.uint8).reshape(-1).view(plain.dtype)
    fresh = {}
    for name in names:
        column = np.ascontiguousarray(found[name])
        native = column.dtype.isnative
        fresh[name] = column if native else column.astype(column.dtype.newbyteorder("="))
    return fresh
