"""CSV and TSV, through pyarrow: encodings, delimiters, headers and types of columns are found."""

from __future__ import annotations

import gzip
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any, Final

from forge_plugins.formats.columns.column_writer import ColumnFolder
from forge_plugins.formats.columns.table import absent
from forge_plugins.formats.columns.typed import Typed, typed_cells
from forge_plugins.formats.errors import DataError
from forge_plugins.formats.format import Format, Reading
from forge_plugins.formats.readers.arrow import pyarrow_library
from forge_plugins.formats.readers.csv_dialect import Dialect, decoded, sniffed

MEMORY_FACTOR: Final = 24
"""Bytes that the reader may have for each byte of the file."""
MAX_TEXT: Final = 2**31
"""Bytes of a text, unpacked: more is for Parquet."""
MAX_COLUMNS: Final = 2**16
"""Of a text: each column of it takes some hundred bytes, however short it is."""
_PART: Final = 2**20


def _parts(stream: IO[bytes] | gzip.GzipFile) -> Iterator[bytes]:
    """What a file holds, and no more than one part beyond `MAX_TEXT`."""
    for _ in range(MAX_TEXT // _PART + 1):
        part = stream.read(_PART)
        if not part:
            return
        yield part


def _text(file: Path) -> bytes:
    """The whole file, unpacked where it is packed.

    Raises:
        DataError: it is broken or too long.
    """
    try:
        with gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb") as stream:
            result = b"".join(_parts(stream))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(file, f"cannot be unpacked: {error}", hint="write it anew") from error
    if len(result) > MAX_TEXT:
        hint = "write it as Parquet, which is read in parts"
        raise DataError(file, f"is a text of more than {MAX_TEXT} bytes", hint=hint)
    return result


def _named(file: Path, names: list[str], dialect: Dialect) -> list[str]:
    """The names of the columns, each once; a column without a name gets its number.

    Raises:
        DataError: two have one name.
    """
    if not dialect.header:
        return [f"column_{number + 1}" for number in range(len(names))]
    result = [name.strip() or f"column_{at + 1}" for at, name in enumerate(names)]
    for name, count in Counter(result).items():
        if count > 1:
            message = f"{count} columns have this name"
            raise DataError(file, message, place="line 1", field=name, hint="rename all but one")
    return result


def _parsed(arrow: Any, file: Path, text: str, dialect: Dialect) -> Any:
    """All cells as texts.

    Raises:
        DataError: a line has more or fewer cells than the first, there is none but a header, or
            there are too many columns.
    """
    across = text[: text.find("\n")].count(dialect.delimiter) + 1
    if across > MAX_COLUMNS:
        message = f"has {across} columns, and {MAX_COLUMNS} are read of a text"
        raise DataError(file, message, hint="write them as one array: .npy, .npz or .h5")
    wrong: list[Any] = []

    def refuse(row: Any) -> str:
        wrong.append(row)
        return "error"

    body = text.encode().removeprefix(b"\xef\xbb\xbf")
    del text
    reading = arrow.csv.ReadOptions(
        use_threads=False, block_size=max(2**16, min(len(body) + 1, 2**30)),
        autogenerate_column_names=True,
    )  # fmt: skip
    parsing = arrow.csv.ParseOptions(
        delimiter=dialect.delimiter, newlines_in_values=True, invalid_row_handler=refuse
    )
    try:
        names = arrow.csv.open_csv(arrow.BufferReader(body), reading, parsing).schema.names
        types = dict.fromkeys(names, arrow.string())
        converting = arrow.csv.ConvertOptions(
            column_types=types, strings_can_be_null=False, check_utf8=False
        )
        table = arrow.csv.read_csv(arrow.BufferReader(body), reading, parsing, converting)
    except arrow.ArrowInvalid as error:
        if wrong:
            row = wrong[0]
            at = None if row.number is None else f"line {row.number}"
            message = f"has {row.actual_columns} cells, and the first line {row.expected_columns}"
            hint = "write as many in each line; a cell that holds the delimiter stands in quotes"
            raise DataError(file, message, place=at, hint=hint) from error
        message = f"cannot be read: {str(error)[:160]}"
        raise DataError(file, message, hint="write it anew") from error
    return table


def cells_of(arrow: Any, file: Path) -> tuple[Dialect, Iterator[tuple[str, Any]]]:
    """How a file is written, and its columns as texts, one after the other.

    Raises:
        DataError: see `_parsed`, `_named` and `decoded`.
    """
    text, encoding = decoded(file, _text(file))
    dialect = sniffed(file, text, encoding)
    table = _parsed(arrow, file, text, dialect)
    head = [str(column[0].as_py()) for column in table.columns]
    names = _named(file, head, dialect)
    if len(table) - dialect.header < 1:
        message = f"there are no records, only the names {names[:8]}"
        raise DataError(file, message, hint="give at least one line of values")
    return dialect, (
        (name, column.slice(int(dialect.header)).combine_chunks())
        for name, column in zip(names, table.columns, strict=True)
    )


def _columns(file: Path) -> tuple[Dialect, Iterator[tuple[str, Typed]]]:
    arrow = pyarrow_library(file)
    dialect, cells = cells_of(arrow, file)
    return dialect, (
        (name, typed_cells(arrow, column, decimal_comma=dialect.decimal_comma))
        for name, column in cells
    )


def read_frame(file: Path, columns: ColumnFolder) -> None:
    """Write all columns, each with what it is; see `typed.Typed`.

    Raises:
        DataError: pyarrow is missing, or the file is broken.
    """
    dialect, parts = _columns(file)
    for name, (numbers, about) in parts:
        columns.append(name, numbers)
        columns.describe(name, about)
    columns.describe("", {"dialect": dialect.in_words()})


def read(file: Path, columns: ColumnFolder, reading: Reading, names: Collection[str]) -> None:
    """Write the columns that are named, which hold numbers and nothing else.

    Raises:
        DataError: one holds words or gaps, or the file is broken.
    """
    there = []
    _, parts = _columns(file)
    for name, (numbers, about) in parts:
        there.append(name)
        if name not in names:
            continue
        if about["kind"] == "text" or about["missing"]:
            what = "words" if about["kind"] == "text" else "cells without a value"
            hint = "data.file reads them where input_column is a list of columns"
            raise DataError(file, f"holds {what}", field=name, hint=hint)
        columns.append(name, numbers)
    columns.pass_over(name for name in there if name not in names)
    if reading.input not in there:
        raise absent(file, reading.input, there)


CSV: Final = Format(
    name="csv", suffixes=(".csv",), read=read, frame=read_frame, named_columns=True,
    sandboxed=True, memory_factor=MEMORY_FACTOR,
)  # fmt: skip
TSV: Final = Format(
    name="tsv", suffixes=(".tsv", ".tab"), read=read, frame=read_frame, named_columns=True,
    sandboxed=True, memory_factor=MEMORY_FACTOR,
)  # fmt: skip
