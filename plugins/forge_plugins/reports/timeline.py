"""What happened in a run: its events as a table, its capabilities as bars over the steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from forge_plugins.reports.axis import step_axis
from forge_plugins.reports.chart import shortened
from forge_plugins.reports.markup import element, escaped
from forge_plugins.reports.notation import number_text
from forge_plugins.reports.run_sections import card
from forge_plugins.reports.tables import number_cell, table

if TYPE_CHECKING:
    from forge_plugins.reports.metrics_file import EmittedEvent
    from forge_plugins.reports.run_data import RunData

_MOST_ROWS: Final = 200
_WIDTH: Final = 1180
_ROW: Final = 26
_LEFT: Final = 90
_CHARACTER: Final = 6.9  # width at the size of the labels
_HEADS: Final = ("Step", "Event", "What was told")

Span = tuple[int, int | None]


def timeline(run: RunData) -> str:
    """Capabilities and events under one heading; nothing for a run that told of none."""
    if not run.events:
        return ""
    return element("h2", "Events") + _capability_card(run) + _events_card(run.events)


def capability_spans(events: tuple[EmittedEvent, ...]) -> dict[str, list[Span]]:
    """From which step to which each capability was held; None: up to the end."""
    result: dict[str, list[Span]] = {}
    for event in events:
        name = event.facts.get("capability")
        if not isinstance(name, str):
            continue
        spans = result.setdefault(name, [])
        if event.name == "capability_acquired":
            spans.append((event.step, None))
        elif event.name == "capability_lost" and spans and spans[-1][1] is None:
            spans[-1] = (spans[-1][0], event.step)
    return {name: spans for name, spans in result.items() if spans}


def _capability_card(run: RunData) -> str:
    result = capability_spans(run.events)
    if not result:
        return ""
    ends = [curve.points[-1][0] for curve in run.curves]
    last = max([1, run.steps or 0, *ends, *(event.step for event in run.events)])
    longest = max(len(shortened(name)) for name in result)
    left = max(_LEFT, 24 + _CHARACTER * longest)
    axis = step_axis([0, last], left, _WIDTH - 40, count=8)
    bottom = 8 + _ROW * len(result)
    summary, parts = [], []
    for row, (name, spans) in enumerate(result.items()):
        y = 8 + _ROW * row
        parts.append(_text(left - 10, y + 16, shortened(name), "entry end"))
        for start, end in spans:
            until = f"step {end:,}" if end is not None else "the end"
            words = f"{name}: from step {start:,} to {until}"
            summary.append(words)
            x = axis.place(start)
            width = max(2.0, axis.place(end if end is not None else last) - x)
            parts.append(
                element(
                    "rect",
                    element("title", escaped(words)),
                    x=f"{x:.1f}", y=y + 4, width=f"{width:.1f}", height=_ROW - 8, rx=3,
                    class_=f"held s{row % 8}",
                )
            )  # fmt: skip
    for tick, label in zip(axis.ticks, axis.labels, strict=True):
        parts.append(_text(axis.place(tick), bottom + 18, label, "tick middle"))
    svg = element(
        "svg",
        element("title", "Capabilities") + "".join(parts),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {_WIDTH} {bottom + 26}",
        role="img",
        aria_label=f"Capabilities held; {'; '.join(summary)}",
    )
    heading = element("h3", "Capabilities held")
    return element("figure", heading + svg, class_="card over-steps")


def _events_card(events: tuple[EmittedEvent, ...]) -> str:
    rows = [
        (number_cell(event.step), [escaped(event.name), escaped(event.message)])
        for event in events[-_MOST_ROWS:]
    ]
    hidden = len(events) - len(rows)
    note = f"The first {hidden:,} are left out: metrics.jsonl has them." if hidden else ""
    more = element("p", escaped(note), class_="quiet") if note else ""
    return card(f"{number_text(len(events))} told", more + table(_HEADS, rows, "plain"))


def _text(x: float, y: float, text: str, class_: str) -> str:
    return element("text", escaped(text), x=f"{x:.5g}", y=f"{y:.5g}", class_=class_)
