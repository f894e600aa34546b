"""A file as named columns, each with what it is: numbers, dates, yes or no, words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from forge_plugins.formats import registry
from forge_plugins.formats.columns import cache
from forge_plugins.formats.columns.column_writer import ColumnFolder
from forge_plugins.formats.columns.gather import Column, Rows
from forge_plugins.formats.columns.metadata_cache import Memos
from forge_plugins.formats.columns.source_file import Source
from forge_plugins.formats.columns.table import absent
from forge_plugins.formats.errors import DataError
from forge_plugins.formats.format import Format, Reading
from forge_plugins.formats.open_table import format_of, open_table
from forge_plugins.formats.readers.sandbox import MEMORY, run_sandboxed

MEMORY_FACTOR: Final = 24
"""Bytes that a reader of all columns may have for each byte of the file."""


@dataclass(frozen=True)
class Frame:
    """Named columns of one length.

    Args:
        file: where they were read.
        format: name of its format.
        content: hash of the file's content.
        columns: by name, in the file's order, shape (records, ...); codes of words are integers,
            -1 where there is none; among numbers that is NaN.
        about: by name what a column is; see `columns.typed.Typed`.
        dialect: how a delimited text is written, in words; empty for other files.
    """

    file: Path
    format: str
    content: str
    columns: Mapping[str, Column | Rows]
    about: Mapping[str, Mapping[str, Any]]
    dialect: str = ""

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def need(self, name: str) -> Mapping[str, Any]:
        """What a column is.

        Raises:
            DataError: there is none of this name, or it holds nothing that can be used.
        """
        if name not in self.columns:
            raise absent(self.file, name, [*self.columns])
        about = self.about[name]
        if about["kind"] == "other":
            message = f"cannot be used: {about['type']}"
            raise DataError(self.file, message, field=name, hint="leave the column out")
        return about


def has_frame(
    file: Path, format: str, allowed: Callable[[str], bool] = registry.every
) -> tuple[bool, bool]:
    """Whether a file's format can be read as a frame, and whether it is, unless told otherwise.

    Raises:
        DataError: there is no such file, or its format is not known.
    """
    Source(file).close()
    result = format_of(file, format, allowed)
    return result.frame is not None, result.named_columns


def open_frame(
    file: Path,
    format: str = "auto",
    *,
    cache_dir: Path | None = None,
    verify: bool = False,
    allowed: Callable[[str], bool] = registry.every,
) -> Frame:
    """All columns of a file whose format has them named; read once, then mapped from the cache.

    Args:
        file: the file.
        format: one of `registry.names()`, or `auto`.
        cache_dir: as for `open_table`.
        verify: as for `open_table`.
        allowed: whether a package's formats may be imported.

    Raises:
        DataError: the file cannot be read, or its format has no such reader.
    """
    try:
        source = Source(file)
        result = format_of(file, format, allowed)
        if result.frame is None:
            message = f"the format {result.name} has no columns of words"
            raise DataError(file, message, hint="name one input_column")
        folder = cache_dir or cache.default_folder(file)
        content = source.content(Memos(folder), again=verify)
        key = cache.content_key(content, result.name, str(result.version), "frame")
        kept = cache.cached(folder, key, verify=verify) or _kept(
            source, result, folder, key, verify=verify
        )
    except (OSError, MemoryError) as error:
        message = f"cannot be read: {error}"
        raise DataError(file, message, hint="look at its rights and size") from error
    about = dict(kept.about)
    dialect = about.pop("", {}).get("dialect", "")
    return Frame(file, result.name, content, kept.columns, about, dialect)


def _kept(source: Source, format: Format, folder: Path, key: str, *, verify: bool) -> cache.Kept:
    file, frame = source.file, format.frame
    assert frame is not None

    def fill(building: Path) -> dict[str, Any]:
        def write(alive: Any = lambda: None) -> dict[str, Any]:
            columns = ColumnFolder(file, building, alive)
            try:
                frame(file, columns)
                return columns.close()
            finally:
                columns.abandon()

        memory = MEMORY + max(MEMORY_FACTOR, format.memory_factor) * file.stat().st_size
        written: dict[str, Any] = (
            run_sandboxed(file, write, memory=memory) if format.sandboxed else write()
        )
        source.check_whole()
        return written

    return cache.keep(file, folder, key, fill, lambda _: None, verify=verify)


def frame_of_columns(file: Path, format: str, names: list[str], **how: Any) -> Frame:
    """A frame of columns of numbers, of a format that has no reader of frames.

    Args:
        file: the file.
        format: as for `open_table`.
        names: of the columns.
        how: as for `open_table`.

    Raises:
        DataError: one of them is not there or holds no numbers.
    """
    columns: dict[str, Column | Rows] = {}
    content, found = "", format
    for name in names:
        reading = Reading(input=name, target=None)
        table = open_table(file, format, reading, **how)
        columns[name] = table.columns["input"]
        content, found = table.content, table.format
    about = {name: _about(column) for name, column in columns.items()}
    return Frame(file, found, content, columns, about)


def _about(column: Column | Rows) -> dict[str, Any]:
    if column.ndim > 1:
        return {"kind": "number", "missing": 0, "distinct": len(column)}
    numbers = np.asarray(column[:])
    integers = numbers.dtype.kind in "iub"
    missing = 0 if integers else int(np.isnan(numbers).sum())
    distinct = len(np.unique(numbers[~np.isnan(numbers)] if missing else numbers))
    return {
        "kind": "integer" if integers else "number", "missing": missing, "distinct": distinct,
    }  # fmt: skip
