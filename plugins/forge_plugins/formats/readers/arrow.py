"""Parquet and Arrow files, through pyarrow, which the extra `parquet` installs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from forge_plugins.formats.columns.column_writer import ColumnFolder
from forge_plugins.formats.columns.table import Column, absent
from forge_plugins.formats.columns.typed import Typed, typed_column
from forge_plugins.formats.errors import DataError
from forge_plugins.formats.format import Format, Reading

PART: Final = 2**20
"""Bytes that are brought to numbers at a time, as the file tells them."""
MAX_EXPANSION: Final = 1000
"""Bytes that one stored byte may become; more is taken for a bomb,"""
SMALL: Final = 2**28
"""unless it is no more than this altogether: a column of one value is stored in a few bytes."""
_WIDTHS: Final = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}
"""Bytes of a value of Parquet's own types."""
_ROWS: Final = 2**13
_DEPTH: Final = 16
"""Lists in each other, and what wraps them."""


def pyarrow_library(file: Path) -> Any:
    """The library, with as little of a process as it can do with.

    Raises:
        DataError: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.csv
        import pyarrow.ipc
        import pyarrow.parquet

        # the default one reserves a gigabyte of addresses, more than a bounded process may have
        pyarrow.set_memory_pool(pyarrow.system_memory_pool())
        pyarrow.set_cpu_count(1)
        pyarrow.set_io_thread_count(1)
    except ImportError as error:
        message = "CSV, Parquet and Arrow files are read by pyarrow, which is not installed"
        raise DataError(file, message, hint="pip install pyarrow") from error
    return pyarrow


def _read(file: Path, columns: ColumnFolder, names: Sequence[str], *, parquet: bool) -> None:
    """Write columns; each is of numbers, or of lists of numbers of one length.

    Args:
        file: the file.
        columns: where they are written.
        names: of the columns that are written; nothing of others is unpacked.
        parquet: Parquet; else Arrow, as a file or as a stream.

    Raises:
        DataError: pyarrow is missing, the file is broken, or a column is there twice or holds
            nulls, texts or lists of several lengths.
    """
    arrow = pyarrow_library(file)
    count = written = 0
    most = max(SMALL, MAX_EXPANSION * file.stat().st_size)
    try:
        for batch in (_parquet if parquet else _batches)(arrow, file, columns, names):
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                if name not in names:
                    continue
                rows = _numbers(arrow, file, name, column, count)
                first = columns.first(name)
                if first is not None and first.shape[1:] != rows.shape[1:]:
                    raise _ragged(file, name, count)
                written += rows.nbytes
                if written > most:  # whatever the file says of itself
                    raise _expands(file, f"more than {most}")
                columns.append(name, rows)
            count += len(batch)
    except (arrow.ArrowException, OSError, ValueError) as error:
        message = f"cannot be read: {str(error)[:160]}"
        raise DataError(file, message, record=count, hint="write it anew") from error
    if not count:
        raise DataError(file, "there are no records", hint="give at least one")


def _asked(file: Path, columns: ColumnFolder, names: Sequence[str], schema: Any) -> list[str]:
    """Those of the columns that are asked for that are there.

    Raises:
        DataError: the first is not there, or one is there twice.
    """
    if names[0] not in schema.names:
        raise absent(file, names[0], schema.names)
    for name in names:
        if schema.names.count(name) > 1:
            message = f"{schema.names.count(name)} columns have this name"
            raise DataError(file, message, field=name, hint="rename all but one")
    columns.pass_over(name for name in schema.names if name not in names)
    return [name for name in names if name in schema.names]


def _parquet(arrow: Any, file: Path, columns: ColumnFolder, names: Sequence[str]) -> Iterator[Any]:
    """Some rows at a time; of a row group, one page of each column is unpacked."""
    with arrow.parquet.ParquetFile(file, memory_map=True, pre_buffer=False) as opened:
        asked = _asked(file, columns, names, opened.schema_arrow)
        groups = checked_parquet(file, opened, asked)
        rows = _rows(sum(group.total_byte_size for group in groups), opened.metadata.num_rows)
        yield from opened.iter_batches(batch_size=rows, columns=asked, use_threads=False)


def checked_parquet(file: Path, opened: Any, asked: Sequence[str]) -> list[Any]:
    """The row groups of a file that does not claim more than it can hold.

    Raises:
        DataError: it does.
    """
    groups = [opened.metadata.row_group(index) for index in range(opened.num_row_groups)]
    _check_expansion(file, groups, asked)
    return groups


def _check_expansion(file: Path, groups: Sequence[Any], asked: Sequence[str]) -> None:
    """Refuse a file that says itself that its numbers are out of all proportion to its size.

    Raises:
        DataError: naming the column that holds the most.
    """
    sizes: dict[str, int] = dict.fromkeys(asked, 0)
    for group in groups:
        for index in range(group.num_columns):
            chunk = group.column(index)
            name = chunk.path_in_schema.partition(".")[0]
            if name in sizes:
                width = _WIDTHS.get(chunk.physical_type, 0)
                sizes[name] += max(chunk.num_values * width, chunk.total_uncompressed_size)
    total = sum(sizes.values())
    if total > max(SMALL, MAX_EXPANSION * file.stat().st_size):
        raise _expands(file, str(total), max(sizes, key=lambda name: sizes[name]))


def _expands(file: Path, size: str, name: str | None = None) -> DataError:
    message = f"{file.stat().st_size} bytes expand to {size}"
    return DataError(file, message, field=name, hint="write it uncompressed if it is meant")


def _batches(arrow: Any, file: Path, columns: ColumnFolder, names: Sequence[str]) -> Iterator[Any]:
    """Some rows at a time; a record batch that is not packed lies mapped."""
    with arrow.memory_map(str(file)) as source:
        try:
            reader = arrow.ipc.open_file(source)
        except arrow.ArrowInvalid:
            source.seek(0)
            reader = arrow.ipc.open_stream(source)
            parts = iter(reader)
        else:
            parts = map(reader.get_batch, range(reader.num_record_batches))
        asked = _asked(file, columns, names, reader.schema)
        for batch in parts:
            rows = _rows(batch.nbytes, len(batch))
            for begin in range(0, len(batch), rows):
                yield batch.select(asked).slice(begin, rows)


def _rows(size: int, count: int) -> int:
    """Rows of `PART` bytes, where `count` have `size`."""
    return max(1, min(_ROWS, PART * count // max(1, size)))


def _numbers(arrow: Any, file: Path, name: str, column: Any, record: int) -> Column:
    """A column's rows as numbers, shape (rows, ...).

    Args:
        arrow: the library.
        file: for the messages.
        name: of the column.
        column: an array of Arrow.
        record: number of its first row.

    Raises:
        DataError: it holds nulls, lists of several lengths, or something else than numbers.
    """
    shape: list[int] = [len(column)]
    for _ in range(_DEPTH):
        if column.null_count:
            # each list above has as many numbers, so that a place tells the row
            place = int(arrow.compute.index(column.is_null(), True).as_py())
            at = record + place * shape[0] // max(1, len(column))
            raise DataError(file, "holds null", field=name, record=at, hint="write a number or NaN")
        unwrapped = _unwrapped(arrow, column)
        if unwrapped is not column:
            column = unwrapped
            continue
        if not isinstance(column, _lists(arrow)):
            break
        lengths = np.asarray(arrow.compute.list_value_length(column))
        if len(set(np.unique(lengths).tolist())) > 1:
            odd = int(np.flatnonzero(lengths != lengths[0])[0])
            raise _ragged(file, name, record + odd * shape[0] // max(1, len(column)))
        flat = column.flatten()
        shape.append(len(flat) // max(1, len(column)))
        column = flat
    message = f"holds values of the type {column.type}, not numbers"
    hint = "numbers are integers and floats of up to 64 bits"
    try:
        numbers: Column = column.to_numpy(zero_copy_only=False)
    except arrow.ArrowException as error:
        raise DataError(file, message, field=name, hint=hint) from error
    if numbers.dtype.kind not in "iufb":
        raise DataError(file, message, field=name, hint=hint)
    return numbers.reshape(shape)


def _unwrapped(arrow: Any, column: Any) -> Any:
    """The numbers that a column stands for: of categories, runs, tensors."""
    if isinstance(column, arrow.ExtensionArray):
        return column.storage
    if isinstance(column, arrow.DictionaryArray):
        return column.dictionary_decode()
    if isinstance(column, arrow.RunEndEncodedArray):
        return arrow.compute.run_end_decode(column)
    return column


def _lists(arrow: Any) -> tuple[Any, ...]:
    return (
        arrow.ListArray, arrow.LargeListArray, arrow.FixedSizeListArray,
        arrow.ListViewArray, arrow.LargeListViewArray,
    )  # fmt: skip


def _ragged(file: Path, name: str, record: int) -> DataError:
    message = "is ragged: its lists are not of one length"
    return DataError(file, message, field=name, record=record, hint="write lists of one length")


def read_parquet(
    file: Path, columns: ColumnFolder, reading: Reading, names: Collection[str]
) -> None:
    """Write columns of a Parquet file; see `_read`."""
    del reading
    _read(file, columns, [*names], parquet=True)


def read_arrow(file: Path, columns: ColumnFolder, reading: Reading, names: Collection[str]) -> None:
    """Write columns of an Arrow file or stream; see `_read`."""
    del reading
    _read(file, columns, [*names], parquet=False)


def read_parquet_frame(file: Path, columns: ColumnFolder) -> None:
    """Write all columns of a Parquet file, each with what it is.

    Raises:
        DataError: pyarrow is missing, or the file is broken.
    """
    arrow = pyarrow_library(file)
    try:
        with arrow.parquet.ParquetFile(file, memory_map=True, pre_buffer=False) as opened:
            names = opened.schema_arrow.names
            checked_parquet(file, opened, names)
            _write_frame(arrow, file, columns, names, lambda name: opened.read([name])[name])
    except (arrow.ArrowException, OSError, ValueError) as error:
        message = f"cannot be read: {str(error)[:160]}"
        raise DataError(file, message, hint="write it anew") from error


def read_arrow_frame(file: Path, columns: ColumnFolder) -> None:
    """Write all columns of an Arrow file or stream, each with what it is.

    Raises:
        DataError: pyarrow is missing, or the file is broken.
    """
    arrow = pyarrow_library(file)
    try:
        with arrow.memory_map(str(file)) as source:
            try:
                table = arrow.ipc.open_file(source).read_all()
            except arrow.ArrowInvalid:
                source.seek(0)
                table = arrow.ipc.open_stream(source).read_all()
            _write_frame(arrow, file, columns, table.schema.names, lambda name: table[name])
    except (arrow.ArrowException, OSError, ValueError) as error:
        message = f"cannot be read: {str(error)[:160]}"
        raise DataError(file, message, hint="write it anew") from error


def _write_frame(
    arrow: Any, file: Path, columns: ColumnFolder, names: Sequence[str], get: Callable[[str], Any]
) -> None:
    for name in names:
        if names.count(name) > 1:
            message = f"{names.count(name)} columns have this name"
            raise DataError(file, message, field=name, hint="rename all but one")
        chunked = get(name)
        column = chunked.combine_chunks()
        if not len(column):
            raise DataError(file, "there are no records", hint="give at least one")
        parts = column.chunks if isinstance(column, arrow.ChunkedArray) else [column]
        whole = parts[0] if len(parts) == 1 else arrow.concat_arrays(parts)
        if isinstance(whole, (*_lists(arrow), arrow.ExtensionArray)):
            numbers, about = _listed(arrow, file, name, whole)
        else:
            numbers, about = typed_column(arrow, whole)
        columns.append(name, numbers)
        columns.describe(name, about)


def _listed(arrow: Any, file: Path, name: str, column: Any) -> Typed:
    """Rows of several numbers, or nothing that can be used."""
    try:
        rows = _numbers(arrow, file, name, column, 0)
    except DataError as error:
        return np.zeros(len(column)), {"kind": "other", "missing": 0, "type": error.message}
    return rows, {"kind": "number", "missing": 0, "distinct": len(rows)}


PARQUET: Final = Format(
    name="parquet",
    suffixes=(".parquet", ".pq"),
    magic=(b"PAR1",),
    read=read_parquet,
    frame=read_parquet_frame,
    sandboxed=True,
)
ARROW: Final = Format(
    name="arrow",
    suffixes=(".arrow", ".feather"),
    magic=(b"ARROW1",),
    read=read_arrow,
    frame=read_arrow_frame,
    sandboxed=True,
)
