"""A format of data files: how it is known, and how its columns are found or read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forge_plugins.formats.columns.column_writer import ColumnFolder
    from forge_plugins.formats.columns.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a user asks of a reader.

    Args:
        input: the column that is the input, as the file names it.
        target: the column that is the target, where there is one; None: no target is asked for.
        lenient: note records with a defect instead of refusing the file, where records are read.
        trust_pickle: run pickles as they are. They may do whatever their authors like.
        integers: type of a raw token.
        length: raw tokens in a window.
        streaming: leave packed columns as they are where they can be read in blocks.
    """

    input: str = "input"
    target: str | None = "target"
    lenient: bool = False
    trust_pickle: bool = False
    integers: str = "uint16"
    length: int = 128
    streaming: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The columns that are asked for; all others are a user's own and are left alone."""
        return (self.input,) if self.target in (None, self.input) else (self.input, self.target)


Find = Callable[[Path, Reading], "Mapping[str, Layout | None]"]
Read = Callable[[Path, "ColumnFolder", Reading, "Collection[str]"], None]


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format, offered by an entry point of the group `forge_kernel.formats`.

    Both functions raise `DataError` for what is wrong with a file, and leave files alone that they
    do not name.

    Args:
        name: the word in a pipeline file.
        suffixes: of file names, each with its dot; `.gz` behind them is looked through.
        magic: what files begin with, one of them; stronger than a name.
        begins: whether the first bytes of a file may be this format; weaker than a name. Of formats
            with one magic, it tells which is meant.
        layouts: tells where each column lies, to be mapped; None for those that must be read, and
            for those that nobody asks for, which are not looked at.
        read: writes the columns that are named, as far as the file has them, to be mapped from the
            cache; the names of the others go to `ColumnFolder.pass_over`.
        shaped_by: settings of `Reading` that change the columns.
        version: of the reader: a change of what it makes of a file needs another one.
        sandboxed: in a process of its own, since its library crashes of files made for it; but not
            a file that is trusted.
        memory_factor: bytes that this process may have for each byte of the file, beside
            `sandbox.MEMORY`.
        frame: writes all columns, each with what it is (`ColumnFolder.describe`), so that words,
            dates and gaps are read too.
        named_columns: its records are rows of named columns, and are read so unless told.
    """

    name: str
    suffixes: tuple[str, ...] = ()
    magic: tuple[bytes, ...] = ()
    begins: Callable[[bytes], bool] | None = None
    layouts: Find | None = None
    read: Read | None = None
    shaped_by: tuple[str, ...] = field(default=())
    version: int = 1
    sandboxed: bool = False
    memory_factor: int = 0
    frame: Callable[[Path, ColumnFolder], None] | None = None
    named_columns: bool = False

    def __post_init__(self) -> None:
        assert self.layouts is not None or self.read is not None, "a format is found or read"
