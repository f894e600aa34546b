"""Small pieces that a report's sections are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forge_plugins.reports.markup import element, escaped
from forge_plugins.reports.notation import ABSENT, duration_text, number_text, size_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forge_kernel.api import MetricInfo


def number_cell(value: float | None) -> str:
    """A number rounded for reading; the exact one is its machine-readable value and tooltip."""
    return _exact(value, number_text(value))


def duration_cell(seconds: float | None) -> str:
    """A span of time; exact seconds as for `number_cell`."""
    return _exact(seconds, duration_text(seconds), " seconds")


def size_cell(count: int | None) -> str:
    """A number of bytes; exact bytes as for `number_cell`."""
    return _exact(count, size_text(count), " bytes")


def metric_cell(info: MetricInfo, value: float | None) -> str:
    """A metric's value, with its digits and its unit."""
    return _exact(value, info.number(value), " bytes" if info.unit == "bytes" else "")


def table(head: Sequence[str], body: Sequence[tuple[str, Sequence[str]]], class_: str) -> str:
    """A table with a heading for each row and column.

    Args:
        head: headings of the columns, markup; the first stands above the rows' headings.
        body: for each row its heading and its cells, markup.
        class_: of all cells beside the first column.
    """
    first, *others = head
    columns = element("th", first, scope="col") + "".join(
        element("th", heading, scope="col", class_=class_) for heading in others
    )
    rows = [
        element("th", heading, scope="row")
        + "".join(element("td", cell, class_=class_) for cell in cells)
        for heading, cells in body
    ]
    thead = element("thead", element("tr", columns))
    tbody = element("tbody", "".join(element("tr", row) for row in rows))
    return element("div", element("table", thead + tbody), class_=f"wide {class_}")


def _exact(value: float | None, text: str, unit: str = "") -> str:
    if value is None:
        return element("span", ABSENT, class_="quiet")
    return element("data", escaped(text), value=repr(value), title=f"{value!r}{unit}")
