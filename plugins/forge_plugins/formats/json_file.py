"""JSON: an array of objects, an object of columns, or JSON Lines; also compressed with gzip.

A text is read block by block: of a file of any size, a few megabytes are in memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson

from forge_plugins.formats.column_file import ColumnFolder
from forge_plugins.formats.fault import DataFault
from forge_plugins.formats.format import Format, Reading
from forge_plugins.formats.json_text import BLOCK, MAX_RECORD, JsonText, cut, signs
from forge_plugins.formats.records import RecordColumns, check_lengths, not_a_list
from forge_plugins.formats.table import PROBLEM, Column

_NAME: Final = re.compile(rb'"(?:[^"\\]|\\.)*"')
_NAMES: Final = {b'"': "str", b"{": "dict", b"n": "NoneType", b"t": "bool", b"f": "bool"}
_FORMS: Final = "give an array of objects, an object, or JSON Lines"
_TOO_LONG: Final = "write long records as HDF5, .npz or binary records"


def _keys(value: Any) -> int:
    """Keys of all objects in a value."""
    found = 0
    todo = [value]
    while todo:
        part = todo.pop()
        if isinstance(part, Mapping):
            found += len(part)
            todo.extend(part.values())
        elif isinstance(part, list) and part and isinstance(part[0], dict | list):
            todo.extend(part)
    return found


class _DoubledKeyError(ValueError):
    pass


def _refuse_doubled_keys(text: bytes) -> None:
    """Read again with every key looked at.

    Raises:
        _DoubledKeyError: with the number of objects closed before the doubled key, and the key.
    """
    closed = 0

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal closed
        names: set[str] = set()
        for name, _ in found:
            if name in names:
                raise _DoubledKeyError(closed, name)
            names.add(name)
        closed += 1
        return dict(found)

    json.loads(text, object_pairs_hook=pairs)


def _check_keys(
    text: JsonText, raw: bytes, values: Any, record: int, place: str | None, *, counted: bool
) -> None:
    """A key that is there twice vanishes without a word, but its colon does not.

    Raises:
        DataFault: an object names a key twice.
    """
    flat = values if isinstance(values, list) else [values]
    plain = set(map(type, flat)) == {dict}
    colons = signs(raw, ":")  # at least as many as there are keys
    if (plain and colons == sum(map(len, flat))) or colons == _keys(values):
        return
    try:
        _refuse_doubled_keys(raw)
    except _DoubledKeyError as error:
        number, name = error.args
        raise DataFault(
            text.file,
            "an object names the field twice",
            record=record + (number if counted else 0),
            field=name,
            place=place,
            hint="remove one of them",
        ) from error
    except RecursionError as error:
        raise DataFault(
            text.file, "is nested too deeply", record=record, place=place, hint="flatten it"
        ) from error


def elements(text: JsonText) -> Iterator[tuple[list[Any], int]]:
    """The elements of the array whose bracket was taken, as many at a time as a block holds.

    Yields:
        Elements, and the dots in their text.

    Raises:
        DataFault: it is no JSON, or an element is too long.
    """
    count, closed = 0, False
    while not closed:
        place, closed = cut(text.held[:BLOCK])
        if place < 0 and len(text.held) > BLOCK:
            place, closed = cut(text.held)
        if place < 0 and not text.ended and len(text.held) <= MAX_RECORD:
            text.more()
            continue
        if place < 0 and not text.ended:
            told = f"a record has more than {MAX_RECORD} bytes of text"
            raise DataFault(text.file, told, record=count, hint=_TOO_LONG)
        piece = text.held if place < 0 else text.held[:place]
        wrapped = b"[%b]" % piece if place >= 0 else b"[%b" % piece
        try:
            values = orjson.loads(wrapped)
        except orjson.JSONDecodeError as error:
            raise text.not_json(error, count, before=1) from error
        if not values and not (closed and not count):
            raise text.fault("is not JSON: a comma without a record", count)
        _check_keys(text, wrapped, values, count, None, counted=True)
        text.drop(place + 1)
        if values:
            yield values, signs(piece, ".")
        count += len(values)
        if len(text.held) < BLOCK:
            text.more()


def _array(text: JsonText, columns: ColumnFolder, *, lenient: bool) -> None:
    text.expect(b"[", "an array")
    records = RecordColumns(text.file, columns, MAX_RECORD, lenient=lenient)
    for values, found in elements(text):
        records.take(values, dots=found)
    text.end()
    records.close()


def line_blocks(text: JsonText) -> Iterator[bytes]:
    """Whole lines, about a block of them at a time; each is held until the next is asked for."""
    while text.held or not text.ended:
        end = text.held.rfind(b"\n", 0, BLOCK) + 1 or text.held.find(b"\n", BLOCK) + 1
        if not end and text.more():
            if len(text.held) > MAX_RECORD + BLOCK:
                told = f"a line has more than {MAX_RECORD} bytes"
                raise DataFault(text.file, told, place=f"line {text.line + 1}", hint=_TOO_LONG)
            continue
        piece = text.held[: end or len(text.held)]
        yield piece
        text.drop(len(piece))
        if len(text.held) < BLOCK:
            text.more()


def _lines(text: JsonText, columns: ColumnFolder, *, lenient: bool) -> None:
    records = RecordColumns(text.file, columns, MAX_RECORD, lenient=lenient)
    count = 0
    for piece in line_blocks(text):
        values = _values_of(piece)
        if values is None:
            lines = piece.split(b"\n")
            values = parsed_lines(text, lines, count)
            filled = [number for number, line in enumerate(lines) if line.strip()]
            places = _LinePlaces(text.line, filled)
        else:
            places = _LinePlaces(text.line, range(len(values)))
        if signs(piece, ":") != sum(len(value) for value in values if isinstance(value, dict)):
            stripped = [line for line in piece.split(b"\n") if line.strip()]
            for at, (line, value) in enumerate(zip(stripped, values, strict=True)):
                _check_keys(text, line, value, count + at, places(at), counted=False)
        records.take(values, places, signs(piece, "."))
        count += len(values)
    records.close()


class _LinePlaces:
    """Tells the lines of a block's records.

    Args:
        before: lines before the block.
        lines: of the block, those with records.
    """

    def __init__(self, before: int, lines: Sequence[int]) -> None:
        self._before, self._lines = before, lines

    def __call__(self, at: int) -> str:
        return f"line {self._before + self._lines[at] + 1}"


def _values_of(piece: bytes) -> list[Any] | None:
    """The objects of lines of which each holds one; None when one may not.

    They are parsed at once, as an array. Each line begins with a brace, and there are as many
    objects as lines: what would go on in a next line could only be a list of objects, which is
    refused as no number.
    """
    body = piece.removesuffix(b"\n")
    codes = np.frombuffer(body, np.uint8)
    begins = np.flatnonzero(codes[:-1] == ord("\n")) + 1
    if body[:1] != b"{" or not (codes[begins] == ord("{")).all():
        return None
    count = len(begins) + 1
    try:
        values: list[Any] = orjson.loads(b"[%b]" % body.replace(b"\n", b","))
    except orjson.JSONDecodeError:
        return None
    return values if len(values) == count else None


def parsed_lines(text: JsonText, lines: Sequence[bytes], record: int) -> list[Any]:
    """Each line that is not blank.

    Raises:
        DataFault: a line is no JSON.
    """
    values: list[Any] = []
    for number, line in enumerate(lines):
        if not (stripped := line.strip()):
            continue
        try:
            values.append(orjson.loads(stripped))
        except orjson.JSONDecodeError as error:
            found = text.not_json(error, 0)
            place = f"line {text.line + number + 1} column {error.colno}"
            at = record + len(values)
            raise DataFault(
                text.file, found.message, record=at, place=place, hint=found.hint
            ) from error
    return values


def _columnar(text: JsonText, columns: ColumnFolder, *, lenient: bool) -> None:
    """One column after the other; of each record, one byte is kept in a lenient reading."""
    text.expect(b"{", "an object")
    lengths: dict[str, int] = {}
    defects: list[Column] = []
    while text.next() != b"}" or lengths:
        name = _name(text)
        if name in lengths:
            raise DataFault(
                text.file, "an object names the field twice", field=name, hint="remove one of them"
            )
        found = text.next()
        if found != b"[":
            raise not_a_list(text.file, name, _NAMES.get(found, "number"))
        text.drop(1)
        noted: list[Column] = []
        records = RecordColumns(text.file, columns, MAX_RECORD, lenient=lenient, note=noted.append)
        for values, count in elements(text):
            records.take([{name: value} for value in values], dots=count)
        lengths[name] = records.count
        defects.append(np.concatenate(noted) if noted else np.zeros(0, np.uint8))
        if text.expect(b",}", "a comma or the object's end") == b"}":
            break
    text.end()
    check_lengths(text.file, lengths)
    if not all(lengths.values()):
        raise DataFault(text.file, "there are no records", hint="give at least one")
    if lenient:
        whole = defects[0]
        for other in defects[1:]:
            whole = np.where(whole == 0, other, whole)
        columns.append(PROBLEM, whole)


def _name(text: JsonText) -> str:
    """Take a key and its colon."""
    text.next()
    text.fill(BLOCK)
    found = _NAME.match(text.held)
    if found is None:
        raise text.fault("is not JSON: a field's name is expected")
    try:
        name: str = orjson.loads(found[0])
    except orjson.JSONDecodeError as error:
        raise text.not_json(error, 0) from error
    text.drop(found.end())
    text.expect(b":", "a colon")
    return name


def read_json(
    file: Path, columns: ColumnFolder, reading: Reading, names: Collection[str] | None = None
) -> None:
    """Write the columns of a JSON file; integers become int64, other numbers float32.

    Args:
        file: the file.
        columns: where they are written.
        reading: whether it is `lenient`, see `RecordColumns`.
        names: all are written.

    Raises:
        DataFault: it is no JSON, holds NaN or Infinity, an object names a key twice, a record has
            more than `MAX_RECORD` bytes, or see `RecordColumns`.
    """
    del names
    lenient = reading.lenient
    with file.open("rb") as stream:
        text = JsonText(file, stream)
        start = text.next()
        if start not in (b"[", b"{"):
            found = "is empty" if not start else f"begins with {start!r}"
            raise DataFault(file, f"the text {found}", hint=_FORMS)
        if start == b"[":
            _array(text, columns, lenient=lenient)
            return
        text.fill(MAX_RECORD)
        first, _, rest = text.held.partition(b"\n")
        if _is_object(first) and (rest.strip() or not text.ended):
            _lines(text, columns, lenient=lenient)
            return
        text.more()
        if text.ended and len(text.held) <= MAX_RECORD and _single(text, columns, lenient=lenient):
            return
        _columnar(text, columns, lenient=lenient)


def _single(text: JsonText, columns: ColumnFolder, *, lenient: bool) -> bool:
    """Whether a short text, held as a whole, is one record, which is then written."""
    try:
        value = orjson.loads(text.held)
    except orjson.JSONDecodeError as error:
        raise text.not_json(error, 0) from error
    assert isinstance(value, dict), "the text begins with a brace"
    lists = any(isinstance(part, list) for part in value.values())
    if lists and not isinstance(value.get("target", []), int | float):
        return False
    _check_keys(text, text.held, value, 0, None, counted=True)
    records = RecordColumns(text.file, columns, MAX_RECORD, lenient=lenient)
    records.take([value])
    records.close()
    return True


def _is_object(line: bytes) -> bool:
    """Whether a file's first line is one whole object, so that the next line is another."""
    try:
        return isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        return False


def _begins(start: bytes) -> bool:
    return start.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")[:1] in (b"{", b"[")


FORMAT: Final = Format(
    name="json",
    version=2,
    suffixes=(".json", ".jsonl", ".ndjson"),
    begins=_begins,
    read=read_json,
    shaped_by=("lenient",),
)
"""Parsed by orjson."""
