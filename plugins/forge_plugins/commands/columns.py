"""Data with named columns, and pictures, as `forge data` shows them."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forge_plugins.commands.suggestion import Suggestion


def columns_of(file: str, cache_dir: Path | None) -> Suggestion | None:
    """What named columns or pictures hold; None for a file of another form.

    Args:
        file: as a user writes it.
        cache_dir: where columns are kept.

    Raises:
        DataError: the data cannot be read.
    """
    from forge_plugins.commands.suggestion import looked_at, of_frame
    from forge_plugins.data.file import data_file
    from forge_plugins.formats.frame import has_frame, open_frame

    place = data_file(file)
    if place.is_dir():
        return looked_at(file)
    if not place.is_file():
        return None  # said by whoever opens it
    known, usual = has_frame(place, "auto")
    if not known:
        return None
    opened = open_frame(place, cache_dir=cache_dir)
    return of_frame(file, opened) if usual or "input" not in opened.columns else None


def write_lines(suggestion: Suggestion, file: str) -> list[str]:
    """What to write to train on the data."""
    settings = ", ".join(
        f"{name}: {json.dumps(value, ensure_ascii=False)}"
        for name, value in suggestion.settings.items()
    )
    return [
        f"to beat: {suggestion.baseline}",
        "to train on it, write",
        f"  data: {{use: {suggestion.plugin}, with: {{{settings}}}}}",
        f"or let a whole pipeline be written: forge init {file}",
    ]


def columns_page(suggestion: Suggestion, file: str) -> str:
    """The same as a page of HTML, which needs nothing but itself."""
    lines = html.escape("\n".join([*suggestion.seen, *write_lines(suggestion, file)]))
    title = html.escape(file)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>\n'
        f"<h1>{title}</h1>\n<pre>{lines}</pre>\n</html>\n"
    )
