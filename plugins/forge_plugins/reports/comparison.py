"""Several runs side by side: their metrics, and the settings in which they differ."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

from forge_plugins.reports.chart import COLOURS
from forge_plugins.reports.markup import element, escaped
from forge_plugins.reports.metric_names import main_first, metric_title
from forge_plugins.reports.notation import ABSENT, duration_text, number_text
from forge_plugins.reports.run_data import Metrics, RunData, joined_infos
from forge_plugins.reports.run_sections import badge, card, folded_table, settings
from forge_plugins.reports.seeds import Group
from forge_plugins.reports.tables import duration_cell, metric_cell, number_cell, table

Row = tuple[str, Sequence[str]]
_MOST_CELLS = 1200  # of metrics that stand open, at some 100 bytes each
_FEWEST_ROWS = 12
Cell = Callable[[float | None], str]

_STEP = "step of the best"
_METRIC_ROWS: tuple[tuple[str, Callable[[Metrics], float | None]], ...] = (
    ("training", lambda metrics: metrics.training),
    ("validation", lambda metrics: metrics.validation),
    ("best validation", lambda metrics: metrics.best),
    (_STEP, lambda metrics: metrics.best_step),
)


def run_names(runs: Sequence[RunData]) -> list[str]:
    """A name for each run that no other has: its own, its folder's, or one with a number."""
    own = [run.name for run in runs]
    names = [run.name if own.count(run.name) == 1 else run.folder for run in runs]
    if len(set(names)) < len(names):
        names = [f"{name} ({number})" for number, name in enumerate(names, start=1)]
    return names


def comparison_table(groups: Sequence[Group]) -> str:
    """Outcome, length and metrics, one column for each group in its colour.

    Of several seeds the median is shown, with the range below it. Metrics of parts are folded away.
    """
    heads = ["", *_heads(groups)]
    metrics = _metric_rows(groups)
    rows: list[Row] = [
        ("Outcome", [_outcomes(group) for group in groups]),
        ("Ended", [_endings(group) for group in groups]),
        ("Steps", [_spread(group, lambda run: run.steps) for group in groups]),
        ("Epochs", [_spread(group, lambda run: run.epochs) for group in groups]),
        ("Duration", [_spread(group, lambda run: run.seconds, duration_cell, duration_text)
                      for group in groups]),
    ]  # fmt: skip
    shown = [row for name, row in metrics if "/" not in name]
    room = max(_FEWEST_ROWS, _MOST_CELLS // len(heads))
    folded = shown[room:] + [row for name, row in metrics if "/" in name]
    body = table(heads, rows + shown[:room], "number")
    body += folded_table("Further metrics", heads, folded, "number")
    return element("div", body, class_="card")


def differing_settings(groups: Sequence[Group]) -> str:
    """The settings that are not the same in all runs; those of several seeds in one column."""
    result = [[settings(run.config) for run in group.runs] for group in groups]
    keys = dict.fromkeys(key for part in result for item in part for key in item)
    rows: list[Row] = []
    for key in keys:
        values = [list(dict.fromkeys(item.get(key, ABSENT) for item in part)) for part in result]
        if len({value for part in values for value in part}) > 1 and key != "run.name":
            rows.append((escaped(key), [escaped(", ".join(part)) for part in values]))
    if not rows:
        message = element("p", "None: the configurations are the same.", class_="quiet")
        return card("Settings that differ", message)
    return card("Settings that differ", table(["Setting", *_heads(groups)], rows, "plain"))


def seeds_table(group: Group, names: Sequence[str]) -> str:
    """The runs of a group, one below the other."""
    rows: list[Row] = []
    for run, name in zip(group.runs, names, strict=True):
        metrics = run.metrics()
        loss, accuracy = metrics.get("loss", Metrics()), metrics.get("accuracy", Metrics())
        rows.append(
            (
                escaped(name),
                [
                    escaped(settings(run.config).get("run.seed", ABSENT)),
                    badge(run),
                    number_cell(run.steps),
                    duration_cell(run.seconds),
                    number_cell(loss.best),
                    number_cell(accuracy.best),
                ],
            )
        )
    heads = ["Run", "Seed", "Outcome", "Steps", "Duration", "Loss, best", "Accuracy, best"]
    return element("div", table(heads, rows, "number"), class_="card")


def _heads(groups: Sequence[Group]) -> list[str]:
    """Names of the groups, each behind a sample of its colour."""
    return [
        element("span", "", class_=f"swatch s{number % COLOURS}")
        + element("span", escaped(group.name), class_="run-name")
        for number, group in enumerate(groups)
    ]


def _outcomes(group: Group) -> str:
    """The outcome, or how many runs had each."""
    if not group.several:
        return badge(group.runs[0])
    counts = Counter(run.state for run in group.runs)
    shown = {run.state: badge(run) for run in group.runs}
    return " ".join(f"{shown[state]} × {count}" for state, count in counts.items())


def _endings(group: Group) -> str:
    return escaped(", ".join(dict.fromkeys(run.stop_reason or ABSENT for run in group.runs)))


def _spread(
    group: Group,
    pick: Callable[[RunData], float | None],
    cell: Cell = number_cell,
    text: Callable[[float | None], str] = number_text,
) -> str:
    """A group's value; of several seeds the median, and the range where there is one."""
    if not group.several:
        return cell(pick(group.runs[0]))
    values = [value for run in group.runs if (value := pick(run)) is not None]
    if not values:
        return cell(None)
    low, high = min(values), max(values)
    shown = cell(statistics.median(values))
    missing = len(group.runs) - len(values)
    message = f"{text(low)} to {text(high)}" if low < high else ""
    message += f"{', ' if message else ''}{missing} without" if missing else ""
    return shown + (element("span", escaped(message), class_="range") if message else "")


def _metric_rows(groups: Sequence[Group]) -> list[tuple[str, Row]]:
    """The metrics that any of the runs has, by name."""
    result = {id(run): run.metrics() for group in groups for run in group.runs}
    names = {name: None for metrics in result.values() for name in metrics}
    infos = joined_infos([run for group in groups for run in group.runs])
    rows: list[tuple[str, Row]] = []
    for name, _ in main_first(names):
        for message, pick in _METRIC_ROWS:

            def of_run(
                run: RunData, name: str = name, pick: Callable[[Metrics], float | None] = pick
            ) -> float | None:
                return pick(result[id(run)].get(name, Metrics()))

            if any(of_run(run) is not None for group in groups for run in group.runs):
                heading = escaped(f"{metric_title(name, infos)}, {message}")
                info, counts = infos.of(name), message == _STEP
                cell: Cell = number_cell if counts else partial(metric_cell, info)
                text = number_text if counts else info.number
                cells = [_spread(group, of_run, cell, text) for group in groups]
                rows.append((name, (heading, cells)))
    return rows
