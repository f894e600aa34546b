"""Parquet and Arrow files, through pyarrow, which the extra `parquet` installs."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from forge_plugins.formats.column_file import ColumnFolder
from forge_plugins.formats.fault import DataFault
from forge_plugins.formats.format import Format, Reading
from forge_plugins.formats.table import Column

PART: Final = 2**20
"""Bytes that are brought to numbers at a time, as the file tells them."""
_ROWS: Final = 2**13


def _pyarrow(file: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.ipc
        import pyarrow.parquet

        # the default one reserves a gigabyte of addresses, more than a bounded process may have
        pyarrow.set_memory_pool(pyarrow.system_memory_pool())
        pyarrow.set_cpu_count(1)
        pyarrow.set_io_thread_count(1)
    except ImportError as error:
        told = "Parquet and Arrow files are read by pyarrow, which is not installed"
        raise DataFault(file, told, hint="pip install 'forge-kernel[parquet]'") from error
    return pyarrow


def _read(file: Path, columns: ColumnFolder, *, parquet: bool) -> None:
    """Write the columns; each is of numbers, or of lists of numbers of one length.

    Args:
        file: the file.
        columns: where they are written.
        parquet: Parquet; else Arrow, as a file or as a stream.

    Raises:
        DataFault: pyarrow is missing, the file is broken, or a column holds nulls, texts or lists
            of several lengths.
    """
    arrow = _pyarrow(file)
    count = 0
    try:
        for batch in _parquet(arrow, file) if parquet else _batches(arrow, file):
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                columns.append(name, _numbers(arrow, file, name, column, count))
            count += len(batch)
    except (arrow.ArrowException, OSError, ValueError) as error:
        told = f"cannot be read: {str(error)[:160]}"
        raise DataFault(file, told, record=count, hint="write it anew") from error
    if not count:
        raise DataFault(file, "there are no records", hint="give at least one")


def _parquet(arrow: Any, file: Path) -> Iterator[Any]:
    """Some rows at a time; of a row group, one page of each column is unpacked."""
    with arrow.parquet.ParquetFile(file, memory_map=True, pre_buffer=False) as opened:
        groups = map(opened.metadata.row_group, range(opened.num_row_groups))
        rows = _rows(sum(group.total_byte_size for group in groups), opened.metadata.num_rows)
        yield from opened.iter_batches(batch_size=rows, use_threads=False)


def _batches(arrow: Any, file: Path) -> Iterator[Any]:
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
        for batch in parts:
            rows = _rows(batch.nbytes, len(batch))
            for begin in range(0, len(batch), rows):
                yield batch.slice(begin, rows)


def _rows(size: int, count: int) -> int:
    """Rows of `PART` bytes, where `count` have `size`."""
    return max(1, min(_ROWS, PART * count // max(1, size)))


def _numbers(arrow: Any, file: Path, name: str, column: Any, record: int) -> Column:
    shape: list[int] = [len(column)]
    for _ in range(8):
        if column.null_count:
            raise DataFault(
                file, "holds null", field=name, record=record, hint="write a number or NaN"
            )
        if not isinstance(
            column, arrow.ListArray | arrow.LargeListArray | arrow.FixedSizeListArray
        ):
            break
        flat = column.flatten()
        count = max(1, len(column))
        lengths = np.asarray(arrow.compute.list_value_length(column)) if len(column) else [0]
        if len(set(np.unique(lengths).tolist())) > 1:
            told = "is ragged: its lists are not of one length"
            raise DataFault(file, told, field=name, record=record, hint="write lists of one length")
        shape.append(len(flat) // count)
        column = flat
    try:
        numbers: Column = column.to_numpy(zero_copy_only=False)
    except arrow.ArrowException as error:
        hint = "numbers are integers and floats of up to 64 bits"
        raise DataFault(file, f"holds {column.type}", field=name, hint=hint) from error
    return numbers.reshape(shape)


def read_parquet(
    file: Path, columns: ColumnFolder, reading: Reading, names: Collection[str] | None = None
) -> None:
    """Write the columns of a Parquet file; see `_read`."""
    del reading, names
    _read(file, columns, parquet=True)


def read_arrow(
    file: Path, columns: ColumnFolder, reading: Reading, names: Collection[str] | None = None
) -> None:
    """Write the columns of an Arrow file or stream; see `_read`."""
    del reading, names
    _read(file, columns, parquet=False)


PARQUET: Final = Format(
    name="parquet", suffixes=(".parquet", ".pq"), magic=(b"PAR1",), read=read_parquet, apart=True
)
ARROW: Final = Format(
    name="arrow", suffixes=(".arrow", ".feather"), magic=(b"ARROW1",), read=read_arrow, apart=True
)
