"""Which charts a report has, and in what order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

from forge_plugins.reports.chart import Background, Line, Series, line_chart
from forge_plugins.reports.markup import element, escaped
from forge_plugins.reports.run_data import PHASE, VALIDATION, Curve, RunData

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Value = TypeVar("Value")

MAIN: Final = ("loss", "accuracy", "learning_rate", "grad_norm")
"""Figures with large charts, which come first."""

_TITLES: Final = {"learning_rate": "Learning rate", "grad_norm": "Gradient norm"}
_BOTH_SCALES: Final = frozenset({"loss", "learning_rate", "grad_norm"})
_MOST_POINTS: Final = 600
_POINTS_OF_PAGE: Final = 18_000  # at some 12 bytes each
_FEWEST_POINTS: Final = 60
_MOST_MARKS: Final = 40
_WIDE_RANGE: Final = 50.0  # from this ratio on, a logarithmic axis shows more


@dataclass(frozen=True, slots=True)
class _Frame:
    """What all charts of a page share: the steps that they span, and points for each line."""

    steps: tuple[int, int]
    most_points: int
    background: Background | None = None


@dataclass(frozen=True, slots=True)
class _Scales:
    """The scales that a chart is drawn in; `log` is the one shown at first."""

    both: bool
    log: bool


def chart_cards(runs: Sequence[RunData], names: Sequence[str]) -> str:
    """The charts of all figures that were measured: main ones, then further ones by name.

    Args:
        runs: what to draw; one run has a colour for each kind of line, several have one each.
        names: the name of each run in the legends.
    """
    figures = measured_figures(runs)
    if not figures:
        return element("p", "There are no curves: no figure was logged.", class_="quiet")
    lines = {figure: _series(figure, runs, names) for figure in figures}
    scales = {figure: _scales(figure, series) for figure, series in lines.items()}
    drawn = sum(len(series) * (1 + scales[figure].both) for figure, series in lines.items())
    points = max(_FEWEST_POINTS, min(_MOST_POINTS, _POINTS_OF_PAGE // drawn))
    steps = [step for all_ in lines.values() for one in all_ for step, _ in one.points]
    behind = _background(runs[0]) if len(runs) == 1 else None
    frame = _Frame((min(steps), max(steps)), points, behind)
    cards = {
        figure: _card(number, figure, series, scales[figure], frame)
        for number, (figure, series) in enumerate(lines.items())
    }
    large = "".join(card for figure, card in cards.items() if figure in MAIN)
    small = "".join(card for figure, card in cards.items() if figure not in MAIN)
    parts = [element("div", large, class_="charts")] if large else []
    if small:
        heading = element("h2", "Further figures")
        parts.append(heading + element("div", small, class_="charts small"))
    return "".join(parts)


def _background(run: RunData) -> Background:
    """Phases as bands and the newest events as marks; several runs would cover each other."""
    told = [(event.step, event.message) for event in run.events if event.name != PHASE]
    bands = [(phase.name, phase.start, phase.end) for phase in run.phases]
    return Background(bands, told[-_MOST_MARKS:])


def measured_figures(runs: Sequence[RunData]) -> list[str]:
    """Names of the figures with a value anywhere: main ones, then the others by name."""
    found = {curve.figure for run in runs for curve in run.curves if curve.measured}
    return [name for name in MAIN if name in found] + sorted(found.difference(MAIN))


def main_first(figures: Mapping[str, Value]) -> list[tuple[str, Value]]:
    """Figures with what belongs to them, main ones first, the others in their order."""
    names = [name for name in MAIN if name in figures]
    names += [name for name in figures if name not in MAIN]
    return [(name, figures[name]) for name in names]


def figure_title(figure: str) -> str:
    """A figure's name as a heading."""
    text = figure.replace("_", " ")
    return _TITLES.get(figure, text[:1].upper() + text[1:])


def _series(figure: str, runs: Sequence[RunData], names: Sequence[str]) -> list[Series]:
    """The lines of a figure: training first, so that validation lies above it."""
    kinds = _kinds(runs)
    curves = [
        (number, curve)
        for number, run in enumerate(runs)
        for curve in run.curves
        if curve.figure == figure
    ]
    curves.sort(key=lambda found: kinds.index(found[1].kind))
    if len(runs) == 1:
        return [
            Series(label=curve.kind, points=curve.points, colour=kinds.index(curve.kind))
            for _, curve in curves
        ]
    mixed = len({curve.kind for _, curve in curves}) > 1
    return [_line_of_run(curve, number, names[number], mixed=mixed) for number, curve in curves]


def _kinds(runs: Sequence[RunData]) -> list[str]:
    """All kinds of lines: training and validation, then whatever else was logged."""
    others = {curve.kind for run in runs for curve in run.curves}
    return ["training", VALIDATION, *sorted(others - {"training", VALIDATION})]


def _line_of_run(curve: Curve, number: int, name: str, *, mixed: bool) -> Series:
    """A run's line in its colour; beside validation's, training's is thin."""
    line: Line = "thin" if mixed and curve.kind != VALIDATION else "solid"
    variant = curve.kind if mixed else ""
    return Series(label=name, points=curve.points, colour=number, line=line, variant=variant)


def _scales(figure: str, series: Sequence[Series]) -> _Scales:
    """Both scales for figures that may range over powers of ten.

    A schedule keeps its usual shape at first, which is linear.
    """
    above = [value for one in series for _, value in one.known if value > 0]
    if figure not in _BOTH_SCALES or not above:
        return _Scales(both=False, log=False)
    wide = max(above) / _WIDE_RANGE >= min(above)
    return _Scales(both=True, log=wide and figure != "learning_rate")


def _card(
    number: int, figure: str, series: Sequence[Series], scales: _Scales, frame: _Frame
) -> str:
    large = figure in MAIN
    drawn = {
        name: line_chart(
            series,
            title=figure_title(figure),
            y_label=figure.replace("_", " "),
            log_y=name == "log",
            steps=frame.steps,
            size=(620, 290) if large else (410, 220),
            most_points=frame.most_points,
            background=frame.background,
        )
        for name in (("linear", "log") if scales.both else ("linear",))
    }
    if not scales.both:
        return element("figure", drawn["linear"], class_="card")
    switch = "".join(_choice(number, name, checked=(name == "log") == scales.log) for name in drawn)
    charts = "".join(
        element("div", chart + _left_out(series) * (name == "log"), class_=f"on-{name}")
        for name, chart in drawn.items()
    )
    body = element("div", switch + charts, class_="scales")
    return element("figure", body, class_="card")


def _choice(number: int, scale: str, *, checked: bool) -> str:
    """One half of the switch between the scales; it works without a script."""
    name = f"scale-{number}"
    mark = " checked" if checked else ""
    return (
        f'<input type="radio" class="pick {scale}" name="{name}" id="{name}-{scale}"{mark}>'
        + element("label", scale, for_=f"{name}-{scale}")
    )


def _left_out(series: Sequence[Series]) -> str:
    """Says how many values a logarithmic axis cannot show."""
    count = sum(value <= 0 for one in series for _, value in one.known)
    if not count:
        return ""
    told = f"{count:,} value{'' if count == 1 else 's'} not above 0: gaps on the log scale."
    return element("p", escaped(told), class_="left-out")
