"""A data file of any format as a table: its format found, its columns mapped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from forge_plugins.formats import cache, installed
from forge_plugins.formats.apart import apart
from forge_plugins.formats.chunked_rows import PackedChunks
from forge_plugins.formats.column_file import ColumnFolder
from forge_plugins.formats.fault import DataFault
from forge_plugins.formats.format import Format, Reading
from forge_plugins.formats.gather import Column, Rows
from forge_plugins.formats.layout import Layout, map_layout
from forge_plugins.formats.memo import Memos
from forge_plugins.formats.source import Source
from forge_plugins.formats.table import PROBLEM, Table

_START: Final = 4096
NARROW: Final = 64
"""Bytes of a row up to which packed rows are converted in streaming too."""


def sniff(file: Path) -> Format:
    """The format of a file, by its first bytes and else by its suffix.

    Raises:
        DataFault: neither tells.
    """
    with file.open("rb") as stream:
        start = stream.read(_START)
    formats, wrong = installed.known()
    for one in formats:
        if any(start.startswith(magic) for magic in one.magic):
            return one
    suffixes = [suffix.lower() for suffix in reversed(file.suffixes) if suffix.lower() != ".gz"]
    for one in formats:
        if suffixes and suffixes[0] in one.suffixes:
            return one
    for one in formats:
        if one.begins is not None and one.begins(start):
            return one
    names = ", ".join(installed.names())
    raise DataFault(
        file,
        "neither its first bytes nor its name tell the format",
        hint="; ".join([f"name it with format, one of {names}", *wrong]),
    )


def format_of(file: Path, name: str) -> Format:
    """A format by its name, or that of a file (`auto`).

    Raises:
        DataFault: it cannot be used, or the file does not tell its format.
    """
    if name == "auto":
        return sniff(file)
    try:
        return installed.load(name)
    except installed.FormatError as error:
        raise DataFault(file, str(error), hint="see: forge data --formats") from error


def open_table(
    file: Path,
    format: str = "auto",
    reading: Reading = Reading(),  # noqa: B008  frozen
    *,
    cache_dir: Path | None = None,
    verify: bool = False,
) -> Table:
    """Open a data file; nothing of it is loaded that can be mapped.

    What cannot be mapped (JSON, pickles, archives, Parquet, packed HDF5) is converted once, into a
    cache under the hash of the file's content, and mapped from there.

    Args:
        file: the file.
        format: one of `installed.names()`, or `auto`.
        reading: what is asked of the reader.
        cache_dir: where converted columns are kept; None: below the user's cache folder.
        verify: hash the file and its cache again instead of trusting sizes and times.

    Raises:
        DataFault: the file cannot be read as asked.
    """
    try:
        source = Source(file)
        found = format_of(file, format)
        folder = cache_dir or cache.default_folder(file)
        opening = _Opening(source, found, reading, folder, verify=verify)
        return opening.table()
    except (OSError, MemoryError) as error:
        told = f"cannot be read: {error}"
        raise DataFault(file, told, hint="look at its rights and size") from error


class _Opening:
    """One file on its way to a table."""

    def __init__(
        self, source: Source, format: Format, reading: Reading, folder: Path, *, verify: bool
    ) -> None:
        self._source, self._file = source, source.file
        self._format, self._reading, self._folder = format, reading, folder
        self._verify, self._memos = verify, Memos(folder)
        self._content = source.content(self._memos, again=verify)
        shaped = [f"{name}={getattr(reading, name)}" for name in sorted(format.shaped_by)]
        self._settings = (format.name, str(format.version), *shaped)
        self._layouts_key = ("layouts", *self._settings, self._content)
        self._fresh: dict[str, Any] | None = None

    def table(self) -> Table:
        """All columns, mapped or converted."""
        found = self._layouts()
        placed: dict[str, Column | Rows] = {
            name: map_layout(self._file, name, layout)
            for name, layout in found.items()
            if layout is not None
        }
        packed = {
            name: column
            for name, column in placed.items()
            if isinstance(column, PackedChunks) and not self._as_it_is(column)
        }
        mapped = {name: column for name, column in placed.items() if name not in packed}
        columns = {**dict.fromkeys(found), **mapped}
        if len(mapped) < len(columns) or not found:
            columns |= self._converted(mapped, packed, [*found] or None)
        table = self._as_table(columns, self._source if mapped else None)
        if self._fresh is not None:  # nothing is kept of a file that is refused
            self._memos.keep(*self._layouts_key, value=self._fresh)
        return table

    def _as_it_is(self, column: PackedChunks) -> bool:
        """Whether a packed column is read in place: in streaming, where its rows are wide.

        Of narrow rows a chunk has many, so that a block of samples would unpack far more than it
        needs.
        """
        wide = column.row > NARROW
        return self._reading.streaming and wide

    def _layouts(self) -> Mapping[str, Layout | None]:
        """Where the columns lie; nothing for a format that only reads."""
        find = self._format.layouts
        if find is None:
            return {}
        if not self._format.apart:
            return find(self._file, self._reading)
        known = None if self._verify else self._memos.find(*self._layouts_key)
        if known is None:
            known = self._fresh = apart(
                self._file,
                lambda _: {
                    name: None if layout is None else layout.told()
                    for name, layout in find(self._file, self._reading).items()
                },
            )
            self._source.check_whole()
        return {name: None if told is None else Layout.of(told) for name, told in known.items()}

    def _converted(
        self,
        mapped: Mapping[str, Column | Rows],
        packed: Mapping[str, PackedChunks],
        every: list[str] | None,
    ) -> dict[str, Column]:
        """Columns from the cache, written now if they are not there.

        Args:
            mapped: the columns that are in place.
            packed: the columns that are unpacked.
            every: names of all columns; None: they are not known, and none is in place.
        """
        names = None if every is None else [name for name in every if name not in mapped]
        chosen = () if names is None else (json.dumps(sorted(names)),)
        key = cache.content_key(self._content, *self._settings, *chosen)
        kept = cache.cached(self._folder, key, verify=self._verify)
        if kept is not None:
            return kept

        def fill(building: Path) -> list[str]:
            found = self._written(building, packed, names)
            self._source.check_whole()
            return found

        def check(columns: dict[str, Column]) -> None:
            self._as_table({**mapped, **columns}, None)  # what is refused is not kept

        return cache.keep(self._file, self._folder, key, fill, check, verify=self._verify)

    def _written(
        self, building: Path, packed: Mapping[str, PackedChunks], names: list[str] | None
    ) -> list[str]:
        """Write columns into a folder; their names."""
        read = self._format.read
        rest = None if names is None else [name for name in names if name not in packed]

        def write(alive: Any = lambda: None) -> list[str]:
            columns = ColumnFolder(self._file, building, alive)
            try:
                for name, column in packed.items():
                    for rows in column.pieces():
                        columns.append(name, rows)
                if rest is None or rest:
                    assert read is not None, "a format without a reader has all in place"
                    read(self._file, columns, self._reading, rest)
                return columns.close()
            finally:
                columns.abandon()

        library = self._format.apart and (rest is None or bool(rest))
        found: list[str] = apart(self._file, write) if library else write()
        return found

    def _as_table(self, columns: Mapping[str, Any], source: Source | None) -> Table:
        plain = {name: column for name, column in columns.items() if name != PROBLEM}
        problems = columns.get(PROBLEM)
        return Table(
            self._file, self._format.name, plain, problems, self._content, source, self._settings
        )
