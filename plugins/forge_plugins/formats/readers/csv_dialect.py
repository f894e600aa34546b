"""How a delimited text is written: its encoding, delimiter, header and decimal sign."""

from __future__ import annotations

import csv
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from forge_plugins.formats.errors import DataError

_MARKS: Final = (
    (b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"),
)  # fmt: skip
_DELIMITERS: Final = (",", ";", "\t", "|")
_WORDS: Final = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_SAMPLE: Final = 2**16  # characters that are looked at
_LINES: Final = 50
_NUMBER: Final = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$")
_COMMA: Final = re.compile(r"[+-]?(\d{1,3}(\.\d{3})+|\d+),\d+$")


@dataclass(frozen=True)
class Dialect:
    """How a delimited text is written.

    Args:
        encoding: a name that Python knows.
        delimiter: one character.
        header: whether the first line names the columns.
        decimal_comma: whether 1,5 is one and a half.
        quoted: whether double quotes were seen.
    """

    encoding: str
    delimiter: str
    header: bool
    decimal_comma: bool
    quoted: bool

    def in_words(self) -> str:
        """In words."""
        parts = [self.encoding.replace("-sig", " with a byte-order mark")]
        parts.append(f"separated by {_WORDS[self.delimiter]}")
        parts.append("the first line names the columns" if self.header else "no line of names")
        parts += ["decimal commas"] if self.decimal_comma else []
        parts += ["quoted"] if self.quoted else []
        return ", ".join(parts)


def decoded(file: Path, raw: bytes) -> tuple[str, str]:
    """A text and the name of its encoding: by its mark, else UTF-8, else the one of old Windows.

    Raises:
        DataError: it is no text.
    """
    encoding = next((name for mark, name in _MARKS if raw.startswith(mark)), None)
    if encoding is None and b"\x00" in raw[:_SAMPLE]:
        encoding = _wide(raw)
        if encoding is None:
            hint = "name its format with format, or write it as UTF-8"
            raise DataError(file, "is no text: it holds bytes of value 0", hint=hint)
    for name in (encoding,) if encoding else ("utf-8", "cp1252", "latin-1"):
        try:
            return raw.decode(name), name
        except UnicodeDecodeError as error:
            place, reason = error.start, error.reason
    message = f"is no {encoding}: {reason}"
    raise DataError(file, message, place=f"byte {place}", hint="write it as UTF-8")


def _wide(raw: bytes) -> str | None:
    """UTF-16 without a mark: every other byte of Latin letters is 0."""
    start = raw[: min(len(raw), _SAMPLE) // 2 * 2]
    for name, zeros in (("utf-16-le", start[1::2]), ("utf-16-be", start[::2])):
        if zeros and zeros.count(0) > 0.8 * len(zeros):
            return name
    return None


def sniffed(file: Path, text: str, encoding: str) -> Dialect:
    """How a text is written, by its first lines.

    Raises:
        DataError: it holds nothing but a header or white space.
    """
    start = text[:_SAMPLE]
    if len(text) > _SAMPLE:  # the last line may be cut off
        start = start[: start.rfind("\n") + 1] or start
    if not start.strip():
        raise DataError(file, "the file is empty", hint="write it anew")
    delimiter = max(_DELIMITERS, key=lambda sign: _fit(start, sign))
    rows = _rows(start, delimiter)
    cells = [cell.strip() for row in rows[1:] for cell in row]
    commas = sum(bool(_COMMA.match(cell)) for cell in cells)
    points = sum(bool(re.match(r"[+-]?\d+\.\d+$", cell)) for cell in cells)
    decimal_comma = delimiter != "," and commas > points
    header = not any(is_number(cell.strip(), decimal_comma=decimal_comma) for cell in rows[0])
    return Dialect(encoding, delimiter, header, decimal_comma, '"' in start)


def is_number(cell: str, *, decimal_comma: bool) -> bool:
    """Whether a cell is written as a number."""
    return bool(_NUMBER.match(cell)) or (decimal_comma and bool(_COMMA.match(cell)))


def _rows(start: str, delimiter: str) -> list[list[str]]:
    lines = start.splitlines(keepends=True)
    rows: list[list[str]] = []
    try:
        for row in csv.reader(lines, delimiter=delimiter):
            if row:
                rows.append(row)
            if len(rows) == _LINES:
                break
    except csv.Error:  # a field beyond the reader's limit: what was read is enough
        pass
    return rows or [[start]]


def _fit(start: str, delimiter: str) -> tuple[float, int]:
    """How well a delimiter fits: the share of lines of the commonest count, and that."""
    counts = Counter(len(row) for row in _rows(start, delimiter))
    columns, often = counts.most_common(1)[0]
    if columns == 1:
        return 0.0, 0
    return round(often / sum(counts.values()), 1), columns
