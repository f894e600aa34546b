"""Which class was answered for which: precision and recall of each, and the matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from forge_plugins.reports.markup import element, escaped
from forge_plugins.reports.notation import ABSENT, number_text
from forge_plugins.reports.run_sections import card
from forge_plugins.reports.strict_json import count, number, words
from forge_plugins.reports.tables import table

MOST_CLASSES: Final = 1000
MOST_COLUMNS: Final = 30
"""Classes up to which the matrix is shown; of more, the table by class says which are mixed up."""
_LONGEST: Final = 24


@dataclass(frozen=True, slots=True)
class Confusion:
    """What was answered in a run's last validation.

    Args:
        step: of the validation, where it is known.
        names: of the classes.
        counts: [target][answer], as many rows as columns as names.
    """

    step: int | None
    names: tuple[str, ...]
    counts: tuple[tuple[float, ...], ...]


def confusion_of(data: Mapping[str, Any] | None) -> Confusion | None:
    """What `confusion.json` holds; None where it is absent or no such table."""
    rows = (data or {}).get("counts")
    if not isinstance(rows, list) or not 0 < len(rows) <= MOST_CLASSES:
        return None
    counts = []
    for row in rows:
        if not isinstance(row, list) or len(row) != len(rows):
            return None
        values = [number(value) for value in row]
        if any(value is None or value < 0 for value in values):
            return None
        counts.append(tuple(value or 0.0 for value in values))
    labels = (data or {}).get("labels")
    named = isinstance(labels, list) and len(labels) == len(rows)
    names = tuple(
        (words(labels[place]) if named and isinstance(labels, list) else None) or str(place)
        for place in range(len(rows))
    )
    return Confusion(count((data or {}).get("step")), names, tuple(counts))


def classes_cards(confusion: Confusion | None) -> str:
    """The section of the page; nothing without counts."""
    if confusion is None or not any(map(any, confusion.counts)):
        return ""
    at = "" if confusion.step is None else f", validation at step {confusion.step:,}"
    parts = [card("By class", _by_class(confusion))]
    if len(confusion.names) <= MOST_COLUMNS:
        note = element("p", "Rows: the class that was right. Columns: what was answered.",
                       class_="quiet")  # fmt: skip
        parts.append(card("Confusion matrix", note + _matrix(confusion)))
    head = element("h2", escaped(f"Classes{at}"))
    return head + element("div", "".join(parts), class_="stack")


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ABSENT


def _by_class(confusion: Confusion) -> str:
    """A row for each class, those that are found least first."""
    counts = confusion.counts
    answered = [sum(column) for column in zip(*counts, strict=True)]
    rows = []
    for place, row in enumerate(counts):
        wanted, right = sum(row), row[place]
        others = [(value, other) for other, value in enumerate(row) if other != place and value]
        taken = max(others, key=lambda each: (each[0], -each[1]), default=None)
        mixed = ABSENT
        if taken is not None:
            mixed = f"{_short(confusion.names[taken[1]])} ({number_text(taken[0])})"
        cells = [
            number_text(wanted), _share(right, wanted), _share(right, answered[place]),
            escaped(mixed),
        ]  # fmt: skip
        found = right / wanted if wanted else 2.0
        rows.append((found, place, (escaped(_short(confusion.names[place])), cells)))
    rows.sort(key=lambda each: each[:2])
    heads = ["Class", "Samples", "Recall", "Precision", "Most often taken for"]
    return table(heads, [row for _, _, row in rows], "number")


def _matrix(confusion: Confusion) -> str:
    """Counts with a ground that is the fuller, the larger the share of the row."""
    heads = ["", *(escaped(_short(name)) for name in confusion.names)]
    columns = "".join(element("th", head, scope="col", class_="number") for head in heads)
    rows = []
    for place, row in enumerate(confusion.counts):
        whole = sum(row)
        cells = "".join(
            _cell(value, value / whole if whole else 0.0, wrong=other != place)
            for other, value in enumerate(row)
        )
        name = element("th", escaped(_short(confusion.names[place])), scope="row")
        rows.append(element("tr", name + cells))
    head, body = element("thead", element("tr", columns)), element("tbody", "".join(rows))
    return element("div", element("table", head + body), class_="wide number matrix")


def _cell(value: float, share: float, *, wrong: bool) -> str:
    colour = "--series-1" if wrong else "--series-0"
    ground = f"color-mix(in srgb,var({colour}) {60 * share:.0f}%,transparent)"
    style = f"background:{ground}" if value else None
    return element("td", number_text(value) if value else "", class_="number", style=style)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"
