"""A data file of any format as a table: its format found, its columns mapped."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Final

from forge_plugins.formats import registry
from forge_plugins.formats.columns import cache
from forge_plugins.formats.columns.chunks import PackedChunks
from forge_plugins.formats.columns.column_writer import ColumnFolder
from forge_plugins.formats.columns.gather import Column, Rows
from forge_plugins.formats.columns.layout import Layout
from forge_plugins.formats.columns.mapping import map_layout
from forge_plugins.formats.columns.metadata_cache import Memos
from forge_plugins.formats.columns.source_file import Source
from forge_plugins.formats.columns.table import Table
from forge_plugins.formats.errors import DataError
from forge_plugins.formats.format import Format, Reading
from forge_plugins.formats.readers.sandbox import MEMORY, run_sandboxed

_START: Final = 4096
NARROW: Final = 64
"""Bytes of a row up to which packed rows are converted in streaming too."""
_NOTHING: Final = cache.Kept({}, None, ())


def sniff(file: Path, allowed: Callable[[str], bool] = registry.every) -> Format:
    """The format of a file, by its first bytes and else by its suffix.

    Args:
        file: the file.
        allowed: whether a package's formats may be imported.

    Raises:
        DataError: neither tells.
    """
    with file.open("rb") as stream:
        start = stream.read(_START)
    formats, wrong = registry.known(allowed)
    suffixes = [suffix.lower() for suffix in reversed(file.suffixes) if suffix.lower() != ".gz"]
    begun = [item for item in formats if item.begins is not None and item.begins(start)]
    named = [item for item in formats if suffixes and suffixes[0] in item.suffixes]
    marked = [item for item in formats if any(start.startswith(magic) for magic in item.magic)]
    ranked = [item for item in marked if item in begun] + [item for item in marked if item in named]
    for result in (ranked, marked, named, begun):
        if result:
            return result[0]
    names = ", ".join(registry.names())
    raise DataError(
        file,
        "neither its first bytes nor its name tell the format",
        hint="; ".join([f"name it with format, one of {names}", *wrong]),
    )


def format_of(file: Path, name: str, allowed: Callable[[str], bool] = registry.every) -> Format:
    """A format by its name, or that of a file (`auto`).

    Raises:
        DataError: it cannot be used, or the file does not tell its format.
    """
    if name == "auto":
        return sniff(file, allowed)
    try:
        return registry.load(name, allowed)
    except registry.FormatError as error:
        raise DataError(file, str(error), hint="see: forge data --formats") from error


def open_table(
    file: Path,
    format: str = "auto",
    reading: Reading = Reading(),  # noqa: B008  frozen
    *,
    cache_dir: Path | None = None,
    verify: bool = False,
    allowed: Callable[[str], bool] = registry.every,
) -> Table:
    """Open a data file; nothing of it is loaded that can be mapped.

    What cannot be mapped (JSON, pickles, archives, Parquet, packed HDF5) is converted once, into a
    cache under the hash of the file's content, and mapped from there.

    Args:
        file: the file.
        format: one of `registry.names()`, or `auto`.
        reading: what is asked of the reader.
        cache_dir: where converted columns are kept; None: below the user's cache folder.
        verify: hash the file and its cache again instead of trusting sizes and times.
        allowed: whether a package's formats may be imported.

    Raises:
        DataError: the file cannot be read as asked.
    """
    try:
        source = Source(file)
        result = format_of(file, format, allowed)
        folder = cache_dir or cache.default_folder(file)
        opening = _Opening(source, result, reading, folder, verify=verify)
        return opening.table()
    except (OSError, MemoryError) as error:
        message = f"cannot be read: {error}"
        raise DataError(file, message, hint="look at its rights and size") from error


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
        asked = json.dumps([reading.input, reading.target])
        self._layouts_key = ("layouts", *self._settings, asked, self._content)
        self._of_table = (*self._settings, asked)
        self._fresh: dict[str, Any] | None = None

    def table(self) -> Table:
        """The columns that are asked for, mapped or converted."""
        result, names = self._layouts(), self._reading.names
        placed: dict[str, Column | Rows] = {
            name: map_layout(self._file, name, layout)
            for name in names
            if (layout := result.get(name)) is not None
        }
        packed = {
            name: column
            for name, column in placed.items()
            if isinstance(column, PackedChunks) and not self._as_it_is(column)
        }
        mapped = {name: column for name, column in placed.items() if name not in packed}
        there = (
            names if self._format.layouts is None else [name for name in names if name in result]
        )
        rest = [name for name in there if name not in mapped]
        kept = self._converted(mapped, packed, result, rest) if rest else _NOTHING
        table = self._as_table(mapped, result, kept, self._source if mapped else None)
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
        if not self._format.sandboxed:
            return find(self._file, self._reading)
        known = None if self._verify else self._memos.find(*self._layouts_key)
        if known is None:
            known = self._fresh = run_sandboxed(
                self._file,
                lambda _: {
                    name: None if layout is None else layout.to_data()
                    for name, layout in find(self._file, self._reading).items()
                },
            )
            self._source.check_whole()
        return {
            name: None if description is None else Layout.of(description)
            for name, description in known.items()
        }

    def _converted(
        self,
        mapped: Mapping[str, Column | Rows],
        packed: Mapping[str, PackedChunks],
        columns: Collection[str],
        names: list[str],
    ) -> cache.Kept:
        """Columns from the cache, written now if they are not there.

        Args:
            mapped: the columns that are in place.
            packed: the columns that are unpacked.
            columns: names of the columns whose places were looked for.
            names: of the columns that are converted.
        """
        key = cache.content_key(self._content, *self._settings, json.dumps(sorted(names)))
        kept = cache.cached(self._folder, key, verify=self._verify)
        if kept is not None:
            return kept

        def fill(building: Path) -> dict[str, Any]:
            written = self._written(building, packed, names)
            self._source.check_whole()
            return written

        def check(kept: cache.Kept) -> None:
            self._as_table(mapped, columns, kept, None)  # what is refused is not kept

        return cache.keep(self._file, self._folder, key, fill, check, verify=self._verify)

    def _written(
        self, building: Path, packed: Mapping[str, PackedChunks], names: list[str]
    ) -> dict[str, Any]:
        """Write columns into a folder; what `ColumnFolder.close` tells of them."""
        read = self._format.read
        rest = [name for name in names if name not in packed]

        def write(alive: Any = lambda: None) -> dict[str, Any]:
            columns = ColumnFolder(self._file, building, alive)
            try:
                for name, column in packed.items():
                    for rows in column.pieces():
                        columns.append(name, rows)
                if rest:
                    assert read is not None, "a format without a reader has all in place"
                    read(self._file, columns, self._reading, rest)
                return columns.close()
            finally:
                columns.abandon()

        trusted = self._reading.trust_pickle and "trust_pickle" in self._format.shaped_by
        if not rest or not self._format.sandboxed or trusted:
            return write()
        memory = MEMORY + self._format.memory_factor * self._file.stat().st_size
        result: dict[str, Any] = run_sandboxed(self._file, write, memory=memory)
        return result

    def _as_table(
        self,
        mapped: Mapping[str, Column | Rows],
        found: Collection[str],
        kept: cache.Kept,
        source: Source | None,
    ) -> Table:
        """Of what is mapped and what is kept, the columns in their roles."""
        reading, columns = self._reading, {**kept.columns, **mapped}
        roles = {"input": reading.input}
        if reading.target is not None:
            roles["target"] = reading.target
        others = sorted({*found, *kept.others, *kept.columns} - {*roles.values()})
        return Table(
            self._file, self._format.name,
            {role: columns[name] for role, name in roles.items() if name in columns},
            kept.defects, self._content, source, self._of_table, roles, tuple(others),
        )  # fmt: skip
