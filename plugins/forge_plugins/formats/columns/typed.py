"""What a column of cells is: numbers, dates, yes or no, or words of a few kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np

from forge_plugins.formats.columns.table import Column
from forge_plugins.formats.errors import DataError

MISSING: Final = (
    "", "?", "NA", "N/A", "n/a", "#N/A", "NaN", "nan", "NULL", "null", "<NA>",
)  # fmt: skip
"""Cells that stand for a value that is not there."""
CATEGORIES: Final = 4096
"""Different words of a column that are kept; of one with more, how many there are."""
EXACT: Final = 2**53
"""Integers up to it are 64-bit floats."""
_MOST: Final = 0.9  # share of numbers from which a word among them is a slip
_BOOLEANS: Final = (("false", "true"), ("no", "yes"), ("f", "t"), ("n", "y"))
_INTEGER, _LEADING = r"^[+-]?\d+$", r"^[+-]?0\d"
_DATES: Final = ("%d.%m.%Y", "%Y/%m/%d")

Typed = tuple[Column, dict[str, Any]]
"""The numbers of a column, shape (rows, ...), and what they are: `kind` (number, integer, boolean,
date, text, empty, other), `missing`, `distinct`, `values` of words by their code."""


def typed_cells(arrow: Any, cells: Any, *, decimal_comma: bool = False) -> Typed:
    """Numbers of a column of texts.

    Missing cells become NaN among numbers and -1 among the codes of words.

    Args:
        arrow: the library.
        cells: an array of strings.
        decimal_comma: whether 1,5 is one and a half.
    """
    pc = arrow.compute
    cells = pc.utf8_trim_whitespace(cells)
    absent = pc.fill_null(pc.is_in(cells, value_set=arrow.array(MISSING, cells.type)), True)
    cells = pc.if_else(absent, arrow.scalar(None, cells.type), cells)
    if cells.null_count == len(cells):
        return np.full(len(cells), np.nan), {"kind": "empty", "missing": len(cells)}
    plain = _pointed(pc, cells) if decimal_comma else cells
    for find in (_integers, _floats, _booleans, _dates):
        result = find(arrow, plain)
        if result is not None:
            numbers, about = result
            return numbers, {**about, "missing": cells.null_count}
    codes, about = _words(arrow, cells)
    return codes, {**about, **_stray(arrow, plain), "missing": cells.null_count}


def _pointed(pc: Any, cells: Any) -> Any:
    """Cells with decimal commas as they are written with points; other cells as they were."""
    thousands = pc.match_substring_regex(cells, r"^[+-]?\d{1,3}(\.\d{3})+(,\d+)?$")
    cells = pc.if_else(thousands, pc.replace_substring(cells, ".", ""), cells)
    return pc.replace_substring_regex(cells, r"^([+-]?\d+),(\d+)$", r"\1.\2")


def _numpy(numbers: Any) -> Column:
    """With NaN where there is none."""
    result: Column = numbers.to_numpy(zero_copy_only=False)
    return result


def _all(pc: Any, flags: Any) -> bool:
    return bool(pc.all(flags, skip_nulls=True).as_py())


def _integers(arrow: Any, cells: Any) -> Typed | None:
    pc = arrow.compute
    if not _all(pc, pc.match_substring_regex(cells, _INTEGER)):
        return None
    if pc.any(pc.match_substring_regex(cells, _LEADING)).as_py():
        return None  # a code: 00123 is not 123
    plain = pc.replace_substring_regex(cells, r"^\+", "")
    about: dict[str, Any] = {"kind": "integer"}
    try:
        numbers = _numpy(pc.cast(plain, arrow.int64()))
    except arrow.ArrowInvalid:
        numbers = _numpy(pc.cast(plain, arrow.float64()))
    return numbers, {**about, **_counts(numbers)}


def _counts(numbers: Column) -> dict[str, Any]:
    """Of integers, or floats: how many differ, and the first that 64-bit floats do not hold."""
    there = numbers[~np.isnan(numbers)] if numbers.dtype.kind == "f" else numbers
    result: dict[str, Any] = {"distinct": len(np.unique(there))}
    large = np.flatnonzero(np.abs(numbers.astype(np.float64)) > EXACT)
    return {**result, "too_large": int(large[0])} if len(large) else result


def _floats(arrow: Any, cells: Any) -> Typed | None:
    pc = arrow.compute
    if pc.any(pc.match_substring_regex(cells, _LEADING + r"\d*$")).as_py():
        return None
    try:
        plain = pc.replace_substring_regex(cells, r"^\+", "")
        numbers = _numpy(pc.cast(plain, arrow.float64()))
    except arrow.ArrowInvalid:
        return None
    return numbers, {"kind": "number", "distinct": len(np.unique(numbers[~np.isnan(numbers)]))}


def _booleans(arrow: Any, cells: Any) -> Typed | None:
    pc = arrow.compute
    there = [str(word) for word in pc.unique(cells).to_pylist() if word is not None]
    written = {word.lower(): word for word in there}
    pair = next((pair for pair in _BOOLEANS if written.keys() <= {*pair}), None)
    if pair is None:
        return None
    numbers = _numpy(pc.cast(pc.equal(pc.utf8_lower(cells), pair[1]), arrow.float64()))
    words = [written.get(word, word) for word in pair]
    return numbers, {"kind": "boolean", "distinct": len(written), "values": words}


def _dates(arrow: Any, cells: Any) -> Typed | None:
    """Seconds since 1970, of dates that are written from the year down, or as 31.12.2020."""
    pc = arrow.compute
    if not _all(pc, pc.match_substring_regex(cells, r"^\d{1,4}[-./]\d{1,2}[-./]\d{1,4}")):
        return None
    moments = None
    for form in (None, *_DATES):
        try:
            kind = arrow.timestamp("s")
            moments = pc.strptime(cells, form, "s") if form else pc.cast(cells, kind)
            break
        except arrow.ArrowInvalid:
            continue
    if moments is None:
        return None
    return typed_moments(arrow, moments)


def typed_moments(arrow: Any, moments: Any) -> Typed:
    """Seconds since 1970 of dates and times."""
    pc = arrow.compute
    seconds = pc.cast(pc.cast(moments, arrow.timestamp("s"), safe=False), arrow.int64())
    numbers = _numpy(pc.cast(seconds, arrow.float64()))
    return numbers, {"kind": "date", "distinct": len(np.unique(numbers[~np.isnan(numbers)]))}


def _words(arrow: Any, cells: Any) -> Typed:
    """Codes of words in their order; none are given where there are too many kinds."""
    coded = cells.dictionary_encode()
    words = [str(word) for word in coded.dictionary.to_pylist()]
    about: dict[str, Any] = {"kind": "text", "distinct": len(words)}
    codes = _numpy(arrow.compute.fill_null(coded.indices, -1)).astype(np.int32)
    order = sorted(range(len(words)), key=words.__getitem__)
    ranks = np.empty(len(words) + 1, np.int32)
    ranks[order], ranks[-1] = np.arange(len(words)), -1
    shown = [words[at] for at in order[:CATEGORIES]]
    return ranks[codes], {**about, "values": shown}


def _stray(arrow: Any, cells: Any) -> dict[str, Any]:
    """The first word among cells that are numbers but for a few: a slip, not a kind."""
    pc = arrow.compute
    written = pc.match_substring_regex(cells, r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$")
    numbers = pc.sum(written).as_py() or 0
    there = len(cells) - cells.null_count
    if numbers == there or numbers < _MOST * there:
        return {}
    first = int(pc.index(pc.fill_null(written, True), False).as_py())
    return {"stray": first, "stray_value": str(cells[first].as_py())[:40]}


def typed_column(arrow: Any, column: Any) -> Typed:
    """Numbers of a column that has a type of its own, as Parquet and Arrow files have.

    Args:
        arrow: the library.
        column: one array.
    """
    types, kind = arrow.types, column.type
    if types.is_dictionary(kind):
        column = column.dictionary_decode()
        kind = column.type
    if types.is_null(kind):
        return np.full(len(column), np.nan), {"kind": "empty", "missing": len(column)}
    if types.is_string(kind) or types.is_large_string(kind):
        return typed_cells(arrow, column)
    about: dict[str, Any]
    if types.is_boolean(kind):
        numbers = _numpy(arrow.compute.cast(column, arrow.float64()))
        about = {"kind": "boolean", "distinct": len(column.drop_null().unique())}
        about["values"] = ["false", "true"]
    elif types.is_timestamp(kind) or types.is_date(kind):
        numbers, about = typed_moments(arrow, column)
    elif types.is_integer(kind) or types.is_floating(kind):
        numbers = _numpy(column)
        word = "integer" if types.is_integer(kind) else "number"
        about = {"kind": word, **_counts(numbers)}
        about.pop("too_large" if word == "number" else "", None)
    else:
        return np.zeros(len(column)), {"kind": "other", "missing": 0, "type": str(kind)}
    return numbers, {**about, "missing": column.null_count}


def slip(file: Path, name: str, about: dict[str, Any]) -> DataError:
    """What to say of a word among numbers."""
    message = f"holds '{about['stray_value']}' among numbers"
    hint = "write a number, or leave the cell empty where there is none"
    return DataError(file, message, record=about["stray"], field=name, hint=hint)
