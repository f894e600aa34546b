"""Several runs side by side: their figures, and the settings in which they differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from forge_plugins.reports.chart import COLOURS
from forge_plugins.reports.chart_cards import figure_title, main_first
from forge_plugins.reports.markup import element, escaped
from forge_plugins.reports.notation import ABSENT
from forge_plugins.reports.run_data import Figures, RunData
from forge_plugins.reports.run_sections import badge, card, settings
from forge_plugins.reports.tables import duration_cell, number_cell, table

Row = tuple[str, Sequence[str]]

_FIGURE_ROWS: tuple[tuple[str, Callable[[Figures], float | None]], ...] = (
    ("training", lambda figures: figures.training),
    ("validation", lambda figures: figures.validation),
    ("best validation", lambda figures: figures.best),
    ("step of the best", lambda figures: figures.best_step),
)


def run_names(runs: Sequence[RunData]) -> list[str]:
    """A name for each run that no other has: its own, its folder's, or one with a number."""
    own = [run.name for run in runs]
    names = [run.name if own.count(run.name) == 1 else run.folder for run in runs]
    if len(set(names)) < len(names):
        names = [f"{name} ({number})" for number, name in enumerate(names, start=1)]
    return names


def comparison_table(runs: Sequence[RunData], names: Sequence[str]) -> str:
    """Outcome, length and figures, one column for each run in its colour."""
    rows: list[Row] = [
        ("Outcome", [badge(run) for run in runs]),
        ("Ended", [escaped(run.stop_reason or ABSENT) for run in runs]),
        ("Steps", [number_cell(run.steps) for run in runs]),
        ("Epochs", [number_cell(run.epochs) for run in runs]),
        ("Duration", [duration_cell(run.seconds) for run in runs]),
        *_figure_rows(runs),
    ]
    return element("div", table(["", *_heads(names)], rows, "number"), class_="card")


def differing_settings(runs: Sequence[RunData], names: Sequence[str]) -> str:
    """The settings that are not the same in all runs."""
    found = [settings(run.config) for run in runs]
    keys = dict.fromkeys(key for one in found for key in one)
    rows: list[Row] = [
        (escaped(key), [escaped(one.get(key, ABSENT)) for one in found])
        for key in keys
        if len({one.get(key) for one in found}) > 1 and key != "run.name"
    ]
    if not rows:
        told = element("p", "None: the configurations are the same.", class_="quiet")
        return card("Settings that differ", told)
    return card("Settings that differ", table(["Setting", *_heads(names)], rows, "plain"))


def _heads(names: Sequence[str]) -> list[str]:
    """Names of the runs, each behind a sample of its colour."""
    return [
        element("span", "", class_=f"swatch s{number % COLOURS}")
        + element("span", escaped(name), class_="run-name")
        for number, name in enumerate(names)
    ]


def _figure_rows(runs: Sequence[RunData]) -> list[Row]:
    """The figures that any of the runs has."""
    found = [run.figures() for run in runs]
    rows: list[Row] = []
    for name, _ in main_first({name: None for figures in found for name in figures}):
        for told, pick in _FIGURE_ROWS:
            values = [pick(figures.get(name, Figures())) for figures in found]
            if any(value is not None for value in values):
                heading = escaped(f"{figure_title(name)}, {told}")
                rows.append((heading, [number_cell(value) for value in values]))
    return rows
