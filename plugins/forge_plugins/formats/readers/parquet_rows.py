"""Rows of a Parquet file as objects, whatever their columns hold: texts, lists, structures."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, Final

import orjson

from forge_plugins.formats.errors import DataError
from forge_plugins.formats.readers.arrow import checked_parquet, pyarrow_library
from forge_plugins.formats.readers.json_objects import objects
from forge_plugins.formats.readers.json_text import JsonText
from forge_plugins.formats.readers.sandbox import run_sandboxed

PARQUET: Final = (".parquet", ".pq")
_ROWS: Final = 256
"""Rows that are made objects at a time."""


def parquet_rows(
    file: Path, names: Sequence[str], room: Path, hint: str
) -> Generator[tuple[int, dict[str, Any]]]:
    """Number and value of each row.

    Args:
        file: Parquet.
        names: of the columns that are read, as far as they are there.
        room: a folder where the rows are written down, as the file's library runs in a process
            of its own.
        hint: what to do when there is none of these columns.

    Raises:
        DataError: the file is broken, holds no row, or none of the columns.
    """
    lines = room / "rows.jsonl"
    run_sandboxed(file, lambda alive: _write_rows(file, names, lines, hint, alive))
    try:
        with lines.open("rb") as stream:
            for record, value, _ in objects(JsonText(file, stream)):
                yield record, value
    finally:
        lines.unlink()


def _write_rows(
    file: Path, names: Sequence[str], target: Path, hint: str, alive: Callable[[], None]
) -> None:
    """The rows as JSON Lines."""
    arrow = pyarrow_library(file)
    count = 0
    try:
        with (
            arrow.parquet.ParquetFile(file, memory_map=True, pre_buffer=False) as opened,
            target.open("wb") as stream,
        ):
            known = opened.schema_arrow.names
            asked = [name for name in names if name in known]
            if not asked:
                message = f"there is no column of this name; there are {sorted(known)[:8]}"
                raise DataError(file, message, field=names[0], hint=hint)
            checked_parquet(file, opened, asked)
            for batch in opened.iter_batches(batch_size=_ROWS, columns=asked, use_threads=False):
                alive()
                for row in batch.to_pylist():
                    stream.write(orjson.dumps(row) + b"\n")
                count += len(batch)
    except (arrow.ArrowException, ValueError, TypeError) as error:
        message = f"cannot be read: {str(error)[:160]}"
        raise DataError(file, message, record=count, hint="write it anew") from error
    if not count:
        raise DataError(file, "there are no records", hint="give at least one")
