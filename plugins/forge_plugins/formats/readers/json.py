"""JSON: an array of objects, an object of columns, or JSON Lines; also compressed with gzip.

A text is read block by block: of a file of any size, a few megabytes are in memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson

from forge_plugins.formats.columns.column_writer import ColumnFolder
from forge_plugins.formats.columns.table import Column, absent
from forge_plugins.formats.errors import DataError
from forge_plugins.formats.format import Format, Reading
from forge_plugins.formats.readers.json_text import BLOCK, MAX_RECORD, JsonText, cut, signs
from forge_plugins.formats.readers.json_values import exactly, parsed
from forge_plugins.formats.readers.records_to_columns import (
    RecordColumns,
    check_lengths,
    first_defects,
    is_record,
    not_a_list,
)

_NAME: Final = re.compile(rb'"(?:[^"\\]|\\.)*"')
_SINGLE: Final = re.compile(rb'"(?:[^"\\]|\\.)*+"|[-+.0-9A-Za-z]++', re.DOTALL)
_KEY: Final = re.compile(rb'"[ \t\r\n]*+:')
_MAX_DEPTH: Final = 64  # of objects in each other that nobody reads
_TYPES: Final = {b'"': "str", b"{": "dict", b"n": "NoneType", b"t": "bool", b"f": "bool"}
_FORMS: Final = "give an array of objects, an object, or JSON Lines"
_TOO_LONG: Final = "write long records as HDF5, .npz or binary records"


def _keys(value: Any) -> int:
    """Keys of all objects in a value."""
    result = 0
    todo = [value]
    while todo:
        part = todo.pop()
        if isinstance(part, Mapping):
            result += len(part)
            todo.extend(part.values())
        elif isinstance(part, list) and part and isinstance(part[0], dict | list):
            todo.extend(part)
    return result


class _DoubledKeyError(ValueError):
    pass


def _refuse_doubled_keys(text: bytes) -> None:
    """Read again with every key looked at.

    Raises:
        _DoubledKeyError: with the number of objects closed before the doubled key, and the key.
    """
    closed = 0

    def pairs(entries: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal closed
        names: set[str] = set()
        for name, _ in entries:
            if name in names:
                raise _DoubledKeyError(closed, name)
            names.add(name)
        closed += 1
        return dict(entries)

    json.loads(text, object_pairs_hook=pairs)


def _check_keys(
    text: JsonText, raw: bytes, values: Any, record: int, place: str | None, *, counted: bool
) -> None:
    """A key that is there twice vanishes without a word, but its colon does not.

    Raises:
        DataError: an object names a key twice.
    """
    flat = values if isinstance(values, list) else [values]
    plain = set(map(type, flat)) == {dict}
    colons = signs(raw, ":")  # at least as many as there are keys
    if plain and colons == sum(map(len, flat)):
        return
    keys = _keys(values)
    if keys in (colons, len(_KEY.findall(raw))):  # texts have colons too
        return
    try:
        _refuse_doubled_keys(raw)
    except _DoubledKeyError as error:
        number, name = error.args
        raise DataError(
            text.file,
            "an object names the field twice",
            record=record + (number if counted else 0),
            field=name,
            place=place,
            hint="remove one of them",
        ) from error
    except RecursionError as error:
        raise DataError(
            text.file, "is nested too deeply", record=record, place=place, hint="flatten it"
        ) from error


def elements(text: JsonText) -> Iterator[tuple[list[Any], bytes]]:
    """The elements of the array whose bracket was taken, as many at a time as a block holds.

    Yields:
        Elements, and their text as an array.

    Raises:
        DataError: it is no JSON, or an element is too long.
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
            message = f"a record has more than {MAX_RECORD} bytes of text"
            raise DataError(text.file, message, record=count, hint=_TOO_LONG)
        piece = text.held if place < 0 else text.held[:place]
        wrapped = b"[%b]" % piece if place >= 0 else b"[%b" % piece
        try:
            values = parsed(wrapped)
        except orjson.JSONDecodeError as error:
            raise text.not_json(error, count, before=1) from error
        if not values and not (closed and not count):
            raise text.fault("is not JSON: a comma without a record", count)
        _check_keys(text, wrapped, values, count, None, counted=True)
        text.drop(place + 1)
        if values:
            yield values, wrapped
        count += len(values)
        if len(text.held) < BLOCK:
            text.more()


def _array(text: JsonText, columns: ColumnFolder, reading: Reading) -> None:
    text.expect(b"[", "an array")
    records = RecordColumns(text.file, columns, MAX_RECORD, reading)
    for values, raw in elements(text):
        records.take(values, dots=signs(raw, "."), exactly=partial(exactly, raw))
    text.end()
    records.close()


def line_blocks(text: JsonText) -> Iterator[bytes]:
    """Whole lines, about a block of them at a time; each is held until the next is asked for."""
    while text.held or not text.ended:
        end = text.held.rfind(b"\n", 0, BLOCK) + 1 or text.held.find(b"\n", BLOCK) + 1
        if not end and text.more():
            if len(text.held) > MAX_RECORD + BLOCK:
                message = f"a line has more than {MAX_RECORD} bytes"
                raise DataError(text.file, message, place=f"line {text.line + 1}", hint=_TOO_LONG)
            continue
        piece = text.held[: end or len(text.held)]
        yield piece
        text.drop(len(piece))
        if len(text.held) < BLOCK:
            text.more()


def _lines(text: JsonText, columns: ColumnFolder, reading: Reading) -> None:
    records = RecordColumns(text.file, columns, MAX_RECORD, reading)
    for values, places, piece in line_values(text, reading.names):

        def again(piece: bytes = piece) -> list[Any]:
            return _parsed_lines(text, piece.split(b"\n"), records.count, exactly)

        records.take(values, places, signs(piece, "."), again)
    records.close()


def line_values(
    text: JsonText, names: Collection[str]
) -> Iterator[tuple[list[Any], _LinePlaces, bytes]]:
    """The values of lines, about a block of them at a time.

    Args:
        text: the lines.
        names: of fields that hold numbers or lists of numbers, or are refused.

    Yields:
        The values of lines that are not blank, where each stands, and their text.

    Raises:
        DataError: a line is no JSON, is too long, or an object names a key twice.
    """
    count = 0
    for piece in line_blocks(text):
        values = _values_of(piece, names)
        if values is None:
            lines = piece.split(b"\n")
            values = _parsed_lines(text, lines, count)
            filled = [number for number, line in enumerate(lines) if line.strip()]
            places = _LinePlaces(text.line, filled)
        else:
            places = _LinePlaces(text.line, range(len(values)))
        if signs(piece, ":") != sum(len(value) for value in values if isinstance(value, dict)):
            stripped = [line for line in piece.split(b"\n") if line.strip()]
            for at, (line, value) in enumerate(zip(stripped, values, strict=True)):
                _check_keys(text, line, value, count + at, places(at), counted=False)
        yield values, places, piece
        count += len(values)


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


def _values_of(piece: bytes, names: Collection[str]) -> list[Any] | None:
    """The objects of lines of which each holds one; None when one may not.

    They are parsed at once, as an array. Each line begins with a brace, and there are as many
    objects as lines: what would go on in a next line could only be a list of objects or a text,
    which are refused as no number; so there may be no field of another name, whatever it holds.
    """
    asked = set(names)
    body = piece.removesuffix(b"\n")
    codes = np.frombuffer(body, np.uint8)
    begins = np.flatnonzero(codes[:-1] == ord("\n")) + 1
    if body[:1] != b"{" or not (codes[begins] == ord("{")).all():
        return None
    count = len(begins) + 1
    try:
        values: list[Any] = parsed(b"[%b]" % body.replace(b"\n", b","))
    except orjson.JSONDecodeError:
        return None
    plain = all(type(value) is dict and value.keys() <= asked for value in values)
    return values if plain and len(values) == count else None


def _parsed_lines(
    text: JsonText, lines: Sequence[bytes], record: int, parse: Callable[[bytes], Any] = parsed
) -> list[Any]:
    """Each line that is not blank.

    Args:
        text: the lines, of which these are held.
        lines: some that follow each other.
        record: number of the first record in them.
        parse: gives the value of a line.

    Raises:
        DataError: a line is no JSON.
    """
    values: list[Any] = []
    for number, line in enumerate(lines):
        if not (stripped := line.strip()):
            continue
        try:
            values.append(parse(stripped))
        except json.JSONDecodeError as error:
            result = text.not_json(error, 0)
            place = f"line {text.line + number + 1} column {error.colno}"
            at = record + len(values)
            raise DataError(
                text.file, result.message, record=at, place=place, hint=result.hint
            ) from error
    return values


def _columnar(text: JsonText, columns: ColumnFolder, reading: Reading) -> None:
    """One column after the other; of each record, one byte is kept in a lenient reading."""
    defects: dict[str, Column] = {}
    for name in _names(text):
        if name in reading.names:
            defects[name] = _column(text, columns, name, reading)
        else:
            columns.pass_over([name])
            _skip(text)
    text.end()
    asked = {name: defects[name] for name in reading.names if name in defects}
    if reading.input not in asked:
        raise absent(text.file, reading.input, [*columns.others(), *asked])
    check_lengths(text.file, {name: len(column) for name, column in asked.items()})
    if not len(asked[reading.input]):
        raise DataError(text.file, "there are no records", hint="give at least one")
    if reading.lenient:
        columns.note(first_defects([*asked.values()]))


def _column(text: JsonText, columns: ColumnFolder, name: str, reading: Reading) -> Column:
    """Write one column; the defect of each record, all 0 in a reading that is not lenient."""
    result = text.next()
    if result != b"[":
        raise not_a_list(text.file, name, _TYPES.get(result, "number"))
    text.drop(1)
    noted: list[Column] = []
    alone = replace(reading, input=name, target=None)
    records = RecordColumns(text.file, columns, MAX_RECORD, alone, note=noted.append)
    for values, raw in elements(text):

        def again(raw: bytes = raw) -> list[Any]:
            return [{name: value} for value in exactly(raw)]

        records.take([{name: value} for value in values], dots=signs(raw, "."), exactly=again)
    return np.concatenate(noted) if noted else np.zeros(records.count, np.uint8)


def _names(text: JsonText) -> Iterator[str]:
    """The names in an object, each taken with its colon; whoever asks takes the values.

    Raises:
        DataError: it is no object, or names a field twice.
    """
    text.expect(b"{", "an object")
    if text.next() == b"}":
        text.drop(1)
        return
    seen: set[str] = set()
    closed = False
    while not closed:
        name = _name(text)
        if name in seen:
            raise DataError(
                text.file, "an object names the field twice", field=name, hint="remove one of them"
            )
        seen.add(name)
        yield name
        closed = text.expect(b",}", "a comma or the object's end") == b"}"


def _skip(text: JsonText) -> None:
    """Take a value that nobody reads.

    Raises:
        DataError: it is no JSON, or is nested too deeply.
    """
    opened: list[Iterator[str]] = [iter([""])]  # the value, and objects in it that are not ended
    while opened:
        if next(opened[-1], None) is None:
            opened.pop()
            continue
        start = text.next()
        if start == b"{":
            opened.append(_names(text))
        elif start == b"[":
            text.drop(1)
            for _ in elements(text):
                pass
        else:
            _skip_single(text)
        if len(opened) > _MAX_DEPTH:
            raise text.fault("is nested too deeply")


def _skip_single(text: JsonText) -> None:
    """Take a text, a number or a word."""
    text.fill(MAX_RECORD)
    result = _SINGLE.match(text.held)
    if result is None:
        raise text.fault("is not JSON: a value is expected")
    try:
        parsed(result[0])
    except orjson.JSONDecodeError as error:
        raise text.not_json(error, 0) from error
    text.drop(result.end())


def _name(text: JsonText) -> str:
    """Take a key and its colon."""
    text.next()
    text.fill(BLOCK)
    result = _NAME.match(text.held)
    if result is None:
        raise text.fault("is not JSON: a field's name is expected")
    try:
        name: str = orjson.loads(result[0])
    except orjson.JSONDecodeError as error:
        raise text.not_json(error, 0) from error
    text.drop(result.end())
    text.expect(b":", "a colon")
    return name


def read_json(file: Path, columns: ColumnFolder, reading: Reading, names: Collection[str]) -> None:
    """Write the columns of a JSON file; integers become int64, other numbers float32.

    Args:
        file: the file.
        columns: where they are written.
        reading: which columns are read, and whether it is `lenient`, see `RecordColumns`.
        names: those that `reading` tells.

    Raises:
        DataError: it is no JSON, an object names a key twice, a record has more than `MAX_RECORD`
            bytes, or see `RecordColumns`.
    """
    del names
    with file.open("rb") as stream:
        text = JsonText(file, stream)
        start = text.next()
        if start not in (b"[", b"{"):
            result = "is empty" if not start else f"begins with {start!r}"
            raise DataError(file, f"the text {result}", hint=_FORMS)
        if start == b"[":
            _array(text, columns, reading)
            return
        text.fill(MAX_RECORD)
        first, _, rest = text.held.partition(b"\n")
        if _is_object(first) and (rest.strip() or not text.ended):
            _lines(text, columns, reading)
            return
        text.more()
        if text.ended and len(text.held) <= MAX_RECORD and _single(text, columns, reading):
            return
        _columnar(text, columns, reading)


def _single(text: JsonText, columns: ColumnFolder, reading: Reading) -> bool:
    """Whether a short text, held as a whole, is one record, which is then written."""
    try:
        value = parsed(text.held)
    except orjson.JSONDecodeError as error:
        raise text.not_json(error, 0) from error
    assert isinstance(value, dict), "the text begins with a brace"
    lists = any(isinstance(value.get(name), list) for name in reading.names)
    if lists and not is_record(value, reading):
        return False
    _check_keys(text, text.held, value, 0, None, counted=True)
    records = RecordColumns(text.file, columns, MAX_RECORD, reading)
    records.take([value], exactly=lambda: [exactly(text.held)])
    records.close()
    return True


def _is_object(line: bytes) -> bool:
    """Whether a file's first line is one whole object, so that the next line is another."""
    try:
        return isinstance(parsed(line), dict)
    except orjson.JSONDecodeError:
        return False


def _begins(start: bytes) -> bool:
    return start.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")[:1] in (b"{", b"[")


FORMAT: Final = Format(
    name="json",
    version=3,
    suffixes=(".json", ".jsonl", ".ndjson"),
    begins=_begins,
    read=read_json,
    shaped_by=("lenient",),
)
"""Parsed by orjson."""
