"""Named columns of one length, mapped from a file or held in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from forge_plugins.formats.fault import DataFault
from forge_plugins.formats.gather import Column, Rows, take
from forge_plugins.formats.source import Source

__all__ = ["PROBLEM", "PROBLEMS", "Column", "Rows", "Table", "check_numeric", "take"]

PROBLEM: Final = "problem"
"""Column of the lenient readers: 0, or the place of a record's defect in `PROBLEMS`, plus 1."""
PROBLEMS: Final = ("missing field", "wrong type", "wrong shape", "wrong length")


@dataclass(frozen=True)
class Table:
    """What a file holds.

    Args:
        file: where it was read.
        format: name of the format.
        columns: array by name, each of shape (records, ...); `input` is one of them.
        problems: defect by record, shape (records,), for a lenient reading; see `PROBLEMS`.
        content: hash of the file's content; empty for a table that was not read from one.
        source: the file, to be watched while columns lie in it; None when none does.
        settings: what else shaped the columns: format, version and settings of the reader.
    """

    file: Path
    format: str
    columns: Mapping[str, Column | Rows]
    problems: NDArray[np.uint8] | None = field(default=None)
    content: str = ""
    source: Source | None = None
    settings: tuple[str, ...] = ()

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
