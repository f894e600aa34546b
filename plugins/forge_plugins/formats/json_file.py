"""JSON: an array of objects, an object of columns, or JSON Lines; also compressed with gzip."""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import orjson

from forge_plugins.formats.fault import DataFault
from forge_plugins.formats.records import columns_of_records, records_of
from forge_plugins.formats.table import Column

MAX_EXPANSION: Final = 1000
"""Bytes that one byte of a gzip file may become; more is taken for a bomb."""
_KEY: Final = re.compile(rb'"[ \t\r\n]*:')
_BOM: Final = b"\xef\xbb\xbf"


def _content(file: Path) -> bytes:
    raw = file.read_bytes()
    if not raw.startswith(b"\x1f\x8b"):
        return raw.removeprefix(_BOM)
    limit = len(raw) * MAX_EXPANSION + 2**20
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(raw)) as stream:
            content = stream.read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataFault(file, f"the gzip data are broken: {error}", hint="compress anew") from error
    if len(content) > limit:
        raise DataFault(
            file,
            f"expands to more than {MAX_EXPANSION} times its size",
            hint="decompress it yourself if you trust it",
        )
    return content.removeprefix(_BOM)


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


def _colons(text: bytes) -> int:
    """Quotes that a colon follows: at least as many as there are keys in the text."""
    if any(blank in text for blank in (b" :", b"\t:", b"\n:", b"\r:")):
        return len(_KEY.findall(text))
    return text.count(b'":')


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


def _parse(file: Path, text: bytes, line: int | None = None) -> Any:
    """One JSON text.

    Raises:
        DataFault: it is no JSON, holds NaN or Infinity, or an object names a key twice.
    """
    place, record = (None, None) if line is None else (f"line {line + 1}", line)
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        where = f"line {line + 1 if line is not None else error.lineno} column {error.colno}"
        near = error.doc[max(0, error.pos - 4) : error.pos + 10] if error.doc else ""
        if re.search(r"NaN|Infinity|nan|inf", near):
            message, hint = (
                "NaN and Infinity are not JSON",
                "write null and set quality_threshold above 0",
            )
        else:
            message, hint = f"is not JSON: {error.msg}", "mend or remove the text there"
        if record is None:
            record = text[: error.pos].count(b"}") if text.lstrip().startswith(b"[") else None
        raise DataFault(file, message, record=record, place=where, hint=hint) from error
    # a key that is there twice vanishes without a word, but its colon does not
    try:
        if _colons(text) != _keys(value):
            _refuse_doubled_keys(text)
    except _DoubledKeyError as error:
        number, name = error.args
        raise DataFault(
            file,
            "an object names the field twice",
            record=number if record is None else record,
            field=name,
            place=place,
            hint="remove one of them",
        ) from error
    except RecursionError as error:
        raise DataFault(
            file, "is nested too deeply", record=record, place=place, hint="flatten it"
        ) from error
    return value


def _lines(file: Path, content: bytes) -> Iterator[tuple[int, str | None, Any]]:
    number = 0
    for line, text in enumerate(io.BytesIO(content)):
        if stripped := text.strip():
            value = _parse(file, stripped, line)
            yield number, f"line {line + 1}", value
            number += 1


def read_json(file: Path, *, lenient: bool = False) -> dict[str, Column]:
    """The columns of a JSON file; integers become int64, other numbers float32.

    The whole text is in memory while it is read.

    Raises:
        DataFault: see `_parse` and `columns_of_records`.
    """
    content = _content(file)
    start = content.lstrip()[:1]
    if start not in (b"[", b"{"):
        found = "is empty" if not start else f"begins with {start!r}"
        raise DataFault(
            file, f"the text {found}", hint="give an array of objects, an object, or JSON Lines"
        )
    first, _, rest = content.strip().partition(b"\n")
    if start == b"{" and rest.strip() and _is_object(first):
        return columns_of_records(file, _lines(file, content), len(content), lenient=lenient)
    value = _parse(file, content)
    if isinstance(value, Mapping) and not any(isinstance(part, list) for part in value.values()):
        value = [value]  # JSON Lines of one line
    elif isinstance(value, Mapping) and isinstance(value.get("target", []), int | float):
        value = [value]
    return columns_of_records(file, records_of(file, value), len(content), lenient=lenient)


def _is_object(line: bytes) -> bool:
    """Whether a file's first line is one whole object, so that the next line is another."""
    try:
        return isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        return False
