"""Runs -> one HTML page that needs nothing beside itself: no script, no network, no other file."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Final

from forge_plugins.reports.chart_cards import chart_cards, measured_metrics
from forge_plugins.reports.comparison import (
    comparison_table,
    differing_settings,
    run_names,
    seeds_table,
)
from forge_plugins.reports.confusion import classes_cards, confusion_of
from forge_plugins.reports.markup import element, escaped
from forge_plugins.reports.run_sections import (
    badge,
    documents,
    exports_table,
    failure,
    header,
    metrics_table,
    notes,
    tiles,
)
from forge_plugins.reports.seeds import Group, groups_of
from forge_plugins.reports.style import STYLE
from forge_plugins.reports.timeline import timeline

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from forge_plugins.reports.run_data import RunData

FILE_NAME: Final = "report.html"
LARGEST: Final = 490_000  # bytes: a page is to be sent by mail and opened at once
_DETAILS: Final = (1.0, 0.6, 0.35, 0.2)  # tried one after the other until the page is small enough

_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'"


def report_page(runs: Sequence[RunData]) -> str:
    """The page of one run, or of several compared.

    Args:
        runs: at least one; with several, each chart shows all of them.

    Returns:
        A whole HTML document.
    """
    assert runs, "a report without a run"
    page = ""
    for detail in _DETAILS:
        title, body = one_run(runs[0], detail) if len(runs) == 1 else _several(runs, detail)
        page = whole_page(title, body)
        if len(page.encode()) < LARGEST:
            break
    return page


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


def one_run(run: RunData, detail: float = 1.0) -> tuple[str, str]:
    """Title and body of the page of one run; `detail` as for `chart_cards`."""
    tables = element("div", metrics_table(run) + exports_table(run), class_="tables")
    parts = [
        header(run),
        notes(run),
        tiles(run),
        element("h2", "Curves"),
        chart_cards([Group(run.name, (run,))], detail),
        _never_measured([run]),
        timeline(run),
        classes_cards(confusion_of(run.confusion)),
        element("h2", "Metrics and exports"),
        tables,
        documents(run),
    ]
    return run.name, "\n".join(parts)


def _several(runs: Sequence[RunData], detail: float) -> tuple[str, str]:
    names = run_names(runs)
    groups = groups_of(runs, names)
    title = f"{len(runs)} runs compared"
    parts = [
        element("header", element("h1", title)),
        element("h2", "Metrics"),
        comparison_table(groups),
        element("h2", "Curves"),
        _about_seeds(groups),
        chart_cards(groups, detail),
        _never_measured(runs),
        element("h2", "Configuration"),
        differing_settings(groups),
        *(_group_apart(group, runs, names) for group in groups),
    ]
    return f"{title}: {', '.join(group.name for group in groups)}", "\n".join(parts)


def _about_seeds(groups: Sequence[Group]) -> str:
    """Says what is drawn for runs that differ in their seed alone."""
    if not any(group.several for group in groups):
        return ""
    message = (
        "Runs that differ in nothing but the seed are drawn as their median, in a shade from the "
        "lowest to the highest, at each step that at least half of those still running have."
    )
    return element("p", message, class_="quiet")


def _group_apart(group: Group, runs: Sequence[RunData], names: Sequence[str]) -> str:
    """What is told of each group below the comparison."""
    if not group.several:
        return _run_apart(group.runs[0], group.name)
    of_run = {id(run): name for run, name in zip(runs, names, strict=True)}
    about = "".join(
        failure(run) + element("p", escaped(f"{of_run[id(run)]}:"), class_="quiet") + notes(run)
        for run in group.runs
        if run.error is not None or run.notes
    )
    return (
        element("h2", escaped(group.name))
        + seeds_table(group, [of_run[id(run)] for run in group.runs])
        + about
        + documents(group.runs[0])
    )


def _run_apart(run: RunData, name: str) -> str:
    """What is told of a run below the comparison."""
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
    """Names the metrics that were logged without a single value."""
    drawn = measured_metrics(runs)
    names = sorted({c.metric for run in runs for c in run.curves}.difference(drawn))
    if not names:
        return ""
    return element("p", escaped(f"Not measured: {', '.join(names)}."), class_="quiet missing")
