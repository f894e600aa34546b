"""The values of a JSON file one by one: elements of an array, or lines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from forge_plugins.formats.readers.json import elements, line_values
from forge_plugins.formats.readers.json_text import JsonText


def objects(text: JsonText) -> Iterator[tuple[int, Any, str | None]]:
    """Number, value and place of each element of an array, or of each line."""
    start = text.next()
    record = 0
    if start == b"[":
        text.expect(b"[", "an array")
        for values, _ in elements(text):
            for value in values:
                yield record, value, None
                record += 1
        text.end()
        return
    for values, places, _ in line_values(text, ()):
        for at, value in enumerate(values):
            yield record, value, places(at)
            record += 1
