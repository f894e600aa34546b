"""What a report tells of one run, beside its curves."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from forge_plugins.reports.markup import element, escaped
from forge_plugins.reports.metric_names import main_first, metric_title
from forge_plugins.reports.notation import number_text, time_text
from forge_plugins.reports.run_data import Metrics, RunData
from forge_plugins.reports.tables import (
    duration_cell,
    metric_cell,
    number_cell,
    size_cell,
    table,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_LONGEST_TEXT: Final = 40_000
_MOST_NODES: Final = 5_000
_MOST_CELLS: Final = 700  # of a folded table, at some 100 bytes each


def badge(run: RunData) -> str:
    """The outcome, or the state of a run without an end."""
    text = run.state if run.state is not None else "state unknown"
    class_ = f"badge {run.state}" if run.ended else "badge"
    return element("span", escaped(text), class_=class_)


def header(run: RunData) -> str:
    """Name, outcome, why it ended and when it ran."""
    facts = [run.stop_reason and f"Ended: {run.stop_reason}"]
    if not run.ended:
        alive = time_text(run.heartbeat)
        facts.append(f"Not ended; last sign of life: {alive or 'unknown'}")
    started = time_text(run.started)
    facts.append(started and f"Started: {started}")
    line = " · ".join(fact for fact in facts if fact)
    head = element("div", element("h1", escaped(run.name)) + badge(run), class_="head")
    folder = element("p", escaped(run.folder), class_="quiet") if run.folder != run.name else ""
    return element("header", head + folder + element("p", escaped(line)) + failure(run))


def failure(run: RunData) -> str:
    """The error of a failed run."""
    if run.error is None:
        return ""
    return element("div", element("pre", escaped(run.error)), class_="card error")


def notes(run: RunData) -> str:
    """What is missing or could not be read."""
    items = "".join(element("li", escaped(note)) for note in run.notes)
    return element("ul", items, class_="notes") if items else ""


def tiles(run: RunData) -> str:
    """The most important numbers, large."""
    metrics = run.metrics()
    planned = f"of {run.total_steps:,} planned" if run.total_steps is not None else ""
    loss, accuracy = metrics.get("loss", Metrics()), metrics.get("accuracy", Metrics())
    shown = [
        _tile("Steps", number_cell(run.steps), planned),
        _tile("Epochs", number_cell(run.epochs), ""),
        _tile("Duration", duration_cell(run.seconds), ""),
        _tile("Training loss", number_cell(loss.training), _latest(loss.training, run)),
        _tile("Validation loss", number_cell(loss.validation), _best(loss, run)),
        _tile("Validation accuracy", number_cell(accuracy.validation), _best(accuracy, run)),
    ]
    return element("dl", "".join(shown), class_="tiles")


def last_or_final(run: RunData) -> str:
    """What the last metrics of a run are called."""
    return "final" if run.ended else "latest"


def metrics_table(run: RunData) -> str:
    """All metrics: last ones of training and validation, best ones and where.

    Those of parts (`retention/add`, metrics of each layer) are folded away.
    """
    last = last_or_final(run)
    heads = ["Metric", f"Training, {last}", f"Validation, {last}", "Validation, best", "at step"]
    rows: dict[bool, list[tuple[str, list[str]]]] = {False: [], True: []}
    for name, metrics in main_first(run.metrics()):
        cells = [
            metric_cell(run.infos.of(name), metrics.training),
            metric_cell(run.infos.of(name), metrics.validation),
            metric_cell(run.infos.of(name), metrics.best),
            number_cell(metrics.best_step),
        ]
        rows["/" in name].append((escaped(metric_title(name, run.infos)), cells))
    if not rows[False] and not rows[True]:
        return card("Metrics", element("p", "No metric was measured.", class_="quiet"))
    parts = folded_table("Metrics of parts", heads, rows[True], "number")
    return card("Metrics", table(heads, rows[False], "number") + parts)


def folded_table(
    heading: str, heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], class_: str
) -> str:
    """A table that opens on a click, not longer than a page holds; nothing without rows."""
    if not rows:
        return ""
    summary = element("summary", escaped(f"{heading} ({len(rows):,})"))
    shown = rows[: max(1, _MOST_CELLS // len(heads))]
    more = len(rows) - len(shown)
    more_text = (
        element("p", f"{more:,} more: result.json has them.", class_="quiet") if more else ""
    )
    return element("details", summary + table(heads, shown, class_) + more_text, data_key=heading)


def exports_table(run: RunData) -> str:
    """What exporters wrote, with sizes."""
    rows = [
        (escaped(export.name), [escaped(export.path), _size(export.size)]) for export in run.exports
    ]
    if not rows:
        message = "Nothing was exported." if run.ended else "The run exports when it ends."
        return card("Exports", element("p", message, class_="quiet"))
    return card("Exports", table(["Exporter", "In the run folder", "Size"], rows, "plain"))


def documents(run: RunData) -> str:
    """Configuration and environment, folded, and what MFU was taken from where it was measured."""
    parts = [
        _folded("Configuration", run.config_text),
        _folded("Environment", _json_text(run.environment)),
    ]
    if run.resources is not None:
        parts.append(_folded("Operations and peak that MFU was taken from",
                             _json_text(run.resources)))  # fmt: skip
    return "".join(parts)


def _json_text(data: Mapping[str, Any] | None) -> str | None:
    return None if data is None else json.dumps(data, indent=2, ensure_ascii=False)


def settings(data: Mapping[str, Any]) -> dict[str, str]:
    """A configuration as path -> value, such as `optimizer.with.lr`.

    Stops after some thousands of nodes: aliases can make a small file endless.
    """
    return dict(_leaves(data))


def card(heading: str, body: str) -> str:
    """A framed part of the page."""
    return element("section", element("h3", escaped(heading)) + body, class_="card")


def _leaves(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """All values that are neither mappings nor lists of mappings; iterative."""
    open_: list[tuple[str, Any]] = [("", data)]
    for _ in range(_MOST_NODES):
        if not open_:
            return
        path, value = open_.pop()
        if isinstance(value, dict) and value:
            start = f"{path}." if path else ""
            open_ += [(f"{start}{key}", inner) for key, inner in reversed(value.items())]
        elif isinstance(value, list) and any(isinstance(inner, dict | list) for inner in value):
            open_ += [(f"{path}[{index}]", value[index]) for index in reversed(range(len(value)))]
        else:
            yield path, json.dumps(value, ensure_ascii=False, default=str)


def _tile(name: str, value: str, under: str) -> str:
    below = element("span", escaped(under), class_="under")
    return element("div", element("dt", escaped(name)) + element("dd", value + below),
                   class_="card")  # fmt: skip


def _latest(value: float | None, run: RunData) -> str:
    return last_or_final(run) if value is not None else ""


def _best(metrics: Metrics, run: RunData) -> str:
    """The line below a validation metric."""
    if metrics.best is None:
        return _latest(metrics.validation, run)
    place = f" at step {metrics.best_step:,}" if metrics.best_step is not None else ""
    return f"best {number_text(metrics.best)}{place}"


def _size(size: int | None) -> str:
    return size_cell(size) if size is not None else escaped("not found")


def _folded(heading: str, text: str | None) -> str:
    """A document that opens on a click; very long ones are cut, and say so."""
    if text is None:
        body = element("p", "The run folder does not tell.", class_="quiet")
    else:
        cut = len(text) - _LONGEST_TEXT
        shown = text if cut <= 0 else f"{text[:_LONGEST_TEXT]}\n… {cut:,} characters more"
        body = element("pre", escaped(shown))
    summary = element("summary", escaped(heading))
    return element("details", summary + body, class_="card", data_key=heading)
