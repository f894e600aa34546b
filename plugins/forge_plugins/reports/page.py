"""Runs -> one HTML page that needs nothing beside itself: no script, no network, no other file."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Final

from forge_plugins.reports.chart_cards import chart_cards, measured_figures
from forge_plugins.reports.comparison import comparison_table, differing_settings, run_names
from forge_plugins.reports.markup import element, escaped
from forge_plugins.reports.run_sections import (
    badge,
    documents,
    exports_table,
    failure,
    figures_table,
    header,
    notes,
    tiles,
)
from forge_plugins.reports.style import STYLE
from forge_plugins.reports.timeline import timeline

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from forge_plugins.reports.run_data import RunData

FILE_NAME: Final = "report.html"

_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'"


def report_page(runs: Sequence[RunData]) -> str:
    """The page of one run, or of several compared.

    Args:
        runs: at least one; with several, each chart shows all of them.

    Returns:
        A whole HTML document.
    """
    assert runs, "a report without a run"
    title, body = one_run(runs[0]) if len(runs) == 1 else _several(runs)
    return whole_page(title, body)


def whole_page(title: str, body: str, *, policy: str = _POLICY, script: str = "") -> str:
    """The document around a body, in the style of all reports.

    Args:
        title: of the window, not yet escaped.
        body: markup of the main part.
        policy: what the page may load and run.
        script: markup of a script element at the end, if there is one.
    """
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{escaped(title)}</title><style>{STYLE}</style>"
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n'
        f"<body><main>\n{body}\n</main>{script}</body></html>\n"
    )


def write_report(runs: Sequence[RunData], file: Path) -> None:
    """Replace a file by the page in one step, so that a browser never reads half of it.

    Raises:
        OSError: the file cannot be written.
    """
    beside = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    try:
        beside.write_text(report_page(runs), encoding="utf-8")
        beside.replace(file)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def one_run(run: RunData) -> tuple[str, str]:
    """Title and body of the page of one run."""
    tables = element("div", figures_table(run) + exports_table(run), class_="tables")
    parts = [
        header(run),
        notes(run),
        tiles(run),
        element("h2", "Curves"),
        chart_cards([run], [run.name]),
        _never_measured([run]),
        timeline(run),
        element("h2", "Figures and exports"),
        tables,
        documents(run),
    ]
    return run.name, "\n".join(parts)


def _several(runs: Sequence[RunData]) -> tuple[str, str]:
    names = run_names(runs)
    title = f"{len(runs)} runs compared"
    parts = [
        element("header", element("h1", title)),
        element("h2", "Figures"),
        comparison_table(runs, names),
        element("h2", "Curves"),
        chart_cards(runs, names),
        _never_measured(runs),
        element("h2", "Configuration"),
        differing_settings(runs, names),
        *(_run_apart(run, name) for run, name in zip(runs, names, strict=True)),
    ]
    return f"{title}: {', '.join(names)}", "\n".join(parts)


def _run_apart(run: RunData, name: str) -> str:
    """What is told of each run below the comparison."""
    heading = element("h2", escaped(name))
    folder = element("p", escaped(run.folder), class_="quiet") if run.folder != name else ""
    return (
        element("div", heading + badge(run), class_="head")
        + folder
        + failure(run)
        + notes(run)
        + exports_table(run)
        + documents(run)
    )


def _never_measured(runs: Sequence[RunData]) -> str:
    """Names the figures that were logged without a single value."""
    drawn = measured_figures(runs)
    names = sorted({c.figure for run in runs for c in run.curves}.difference(drawn))
    if not names:
        return ""
    return element("p", escaped(f"Not measured: {', '.join(names)}."), class_="quiet missing")
