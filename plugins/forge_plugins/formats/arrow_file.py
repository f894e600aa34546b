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

ROWS: Final = 2**13
"""Rows of a Parquet file that are read at a time."""
MAX_GROUP: Final = 2**25
"""Bytes of numbers in one row group or record batch, which is read as a whole."""


def _pyarrow(file: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.ipc
        import pyarrow.parquet
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
    with arrow.parquet.ParquetFile(file, memory_map=True, pre_buffer=False) as opened:
        for number in range(opened.num_row_groups):
            size = opened.metadata.row_group(number).total_byte_size
            if size > MAX_GROUP:
                raise _too_large(file, f"the row group {number}", size)
        yield from opened.iter_batches(batch_size=ROWS, use_threads=False)


def _batches(arrow: Any, file: Path) -> Iterator[Any]:
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
            if batch.nbytes > MAX_GROUP:
                raise _too_large(file, "a record batch", batch.nbytes)
            yield batch


def _too_large(file: Path, what: str, size: int) -> DataFault:
    told = f"{what} has {size} bytes; at most {MAX_GROUP} are read at a time"
    return DataFault(file, told, hint="write it with fewer rows in each")


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
