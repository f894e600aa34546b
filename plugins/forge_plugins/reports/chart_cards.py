"""Which charts a report has, and in what order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from forge_plugins.reports.chart import Background, Line, Series, line_chart
from forge_plugins.reports.markup import element, escaped
from forge_plugins.reports.metric_names import MAIN, in_order, metric_title, section_of
from forge_plugins.reports.metrics_file import Curve
from forge_plugins.reports.run_data import PHASE, VALIDATION, RunData, joined_infos
from forge_plugins.reports.seeds import Group, median_and_spread
from forge_plugins.reports.weight_histogram import LEVEL, levels_card

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forge_kernel.api import MetricInfos

_BOTH_SCALES: Final = frozenset({"loss", "learning_rate", "grad_norm"})
_MOST_POINTS: Final = 600
_POINTS_OF_PAGE: Final = 16_000  # at some 12 bytes each
_FEWEST_POINTS: Final = 30
_MOST_CHARTS: Final = 90  # at some 2 kB each without their points
_MOST_LINES: Final = 24  # in one chart: three times round the colours
_MOST_MARKS: Final = 40
_MARKS_OF_PAGE: Final = 600  # at some 150 bytes each
_WIDE_RANGE: Final = 50.0  # from this ratio on, a logarithmic axis shows more


@dataclass(frozen=True, slots=True)
class _Frame:
    """What all charts of a page share: the steps that they span, and points for each line."""

    steps: tuple[int, int]
    most_points: int
    infos: MetricInfos
    background: Background | None = None


@dataclass(frozen=True, slots=True)
class _Plot:
    """A chart to be drawn: its metric (a name that ends with a slash: all its parts) and lines."""

    metric: str
    series: Sequence[Series]
    both_scales: bool
    log: bool  # the scale shown at first
    more: int = 0  # lines that are left out

    @property
    def paths(self) -> int:
        """How many lines are drawn, ranges counted as one each."""
        lines = sum(2 if item.spread else 1 for item in self.series)
        return lines * (1 + self.both_scales)


def chart_cards(groups: Sequence[Group], detail: float = 1.0) -> str:
    """The charts of all metrics that were measured: main ones, then further ones by section.

    Args:
        groups: what to draw; one run has a colour for each kind of line, several groups have one
            each, and one of several runs is drawn as their median and range.
        detail: share of the charts, points and marks that there is usually room for.
    """
    alone = groups[0].runs[0] if len(groups) == 1 and not groups[0].several else None
    plots = _plots_of_run(alone) if alone is not None else _plots_of_groups(groups)
    left_out = len(plots) - round(detail * _MOST_CHARTS)
    plots = plots[: round(detail * _MOST_CHARTS)]
    runs = [run for group in groups for run in group.runs]
    infos = joined_infos(runs)
    steps = [step for run in runs for curve in run.curves for step in _ends(curve)]
    if not steps:
        return element("p", "There are no curves: no metric was logged.", class_="quiet")
    paths = max(1, sum(plot.paths for plot in plots))
    points = max(_FEWEST_POINTS, min(_MOST_POINTS, round(detail * _POINTS_OF_PAGE) // paths))
    marks = round(detail * _MARKS_OF_PAGE) // max(1, len(plots))
    behind = _background(alone, marks) if alone is not None else None
    frame = _Frame((min(steps), max(steps)), points, infos, behind)
    cards = [(plot, _card(plot, frame)) for plot in plots]
    large = "".join(card for plot, card in cards if plot.metric in MAIN)
    parts = [element("div", large, class_="charts")] if large else []
    sections: dict[str, str] = {}
    for plot, card in cards:
        if plot.metric not in MAIN:
            heading = section_of(plot.metric, infos)
            sections[heading] = sections.get(heading, "") + card
    levels = levels_card(alone, frame.steps) if alone is not None else ""
    if levels:
        sections = {section_of("level_0", infos): "", **sections}
    for heading, body in sections.items():
        first = levels if heading == section_of("level_0", infos) else ""
        small = element("div", body, class_="charts small") if body else ""
        parts.append(element("h2", escaped(heading)) + first + small)
    if left_out > 0:
        message = f"{left_out:,} further metrics are not drawn: metrics.jsonl has them."
        parts.append(element("p", message, class_="quiet missing"))
    return "".join(parts)


def _ends(curve: Curve) -> tuple[int, ...]:
    """First and last step of a curve that has a value."""
    return (curve.points[0][0], curve.points[-1][0]) if curve.measured else ()


def _background(run: RunData, marks: int) -> Background:
    """Phases as bands and the newest events as marks; several runs would cover each other."""
    most = max(3, min(_MOST_MARKS, marks))
    events = [(event.step, event.message) for event in run.events if event.name != PHASE]
    bands = [(phase.name, phase.start, phase.end) for phase in run.phases]
    return Background(bands, events[-most:])


def measured_metrics(runs: Sequence[RunData]) -> list[str]:
    """Names of the metrics with a value anywhere: main ones, then the others."""
    measured = {curve.metric for run in runs for curve in run.curves if curve.measured}
    return in_order(measured, joined_infos(runs))


# -- one run ------------------------------------------------------------------------------------


def _plots_of_run(run: RunData) -> list[_Plot]:
    """A chart for each metric; the parts of one (`retention/add`) stand together in one."""
    kinds = _kinds([run])
    result: dict[str, list[Series]] = {}
    curves = [one for one in run.curves if one.measured and not LEVEL.match(one.metric)]
    for curve in sorted(curves, key=lambda one: kinds.index(one.kind)):
        whole, slash, part = curve.metric.partition("/")
        series = result.setdefault(whole + slash, [])
        if not slash:
            colour = kinds.index(curve.kind)
            series.append(Series(label=curve.kind, points=curve.points, colour=colour))
            continue
        labels = [one.label for one in series]
        colour = labels.index(part) if part in labels else len(set(labels))
        line: Line = "thin" if curve.kind != "training" else "solid"
        series.append(
            Series(label=part, points=curve.points, colour=colour, line=line, variant=curve.kind)
        )
    return [_plot(metric, result[metric]) for metric in in_order(result, run.infos)]


def _kinds(runs: Sequence[RunData]) -> list[str]:
    """All kinds of lines: training and validation, then whatever else was logged."""
    others = {curve.kind for run in runs for curve in run.curves}
    return ["training", VALIDATION, *sorted(others - {"training", VALIDATION})]


# -- several ------------------------------------------------------------------------------------


def _plots_of_groups(groups: Sequence[Group]) -> list[_Plot]:
    """A chart for each metric, with a line for each group and kind."""
    runs = [run for group in groups for run in group.runs]
    kinds = _kinds(runs)
    plots = []
    for metric in measured_metrics(runs):
        if "/" in metric and _owners(metric, groups) < 2:
            continue  # a layer of one network, say: its own report draws it
        there = [kind for kind in kinds if any(_measured(run, metric, kind) for run in runs)]
        series = [
            line
            for kind in there  # training first, so that validation lies above it
            for number, group in enumerate(groups)
            for line in _line_of_group(group, number, metric, kind, mixed=len(there) > 1)
        ]
        plots.append(_plot(metric, series))
    return plots


def _owners(metric: str, groups: Sequence[Group]) -> int:
    """How many groups have measured a metric."""
    return sum(metric in measured_metrics(group.runs) for group in groups)


def _measured(run: RunData, metric: str, kind: str) -> bool:
    curve = run.curve(metric, kind)
    return curve is not None and curve.measured


def _line_of_group(
    group: Group, number: int, metric: str, kind: str, *, mixed: bool
) -> list[Series]:
    """A group's line in its colour, or none; beside validation's, training's is thin."""
    curves = [curve for run in group.runs if (curve := run.curve(metric, kind)) is not None]
    if not any(curve.measured for curve in curves):
        return []
    line: Line = "thin" if mixed and kind != VALIDATION else "solid"
    variant = kind if mixed else ""
    if not group.several:
        points = curves[0].points
        return [Series(label=group.name, points=points, colour=number, line=line, variant=variant)]
    median, spread = median_and_spread([curve.points for curve in curves])
    return [
        Series(
            label=group.name, points=median, colour=number, line=line, variant=variant,
            spread=spread,
        )
    ]  # fmt: skip


# -- drawing ------------------------------------------------------------------------------------


def _plot(metric: str, series: Sequence[Series]) -> _Plot:
    """Both scales for metrics that may range over powers of ten.

    A schedule keeps its usual shape at first, which is linear.
    """
    shown = series[:_MOST_LINES]
    above = [value for item in shown for _, value in item.known if value > 0]
    both = metric in _BOTH_SCALES and bool(above)
    wide = both and max(above) / _WIDE_RANGE >= min(above)
    log = wide and metric != "learning_rate"
    return _Plot(metric, shown, both, log, len(series) - len(shown))


def _card(plot: _Plot, frame: _Frame) -> str:
    name = plot.metric.removesuffix("/")
    large = plot.metric in MAIN
    title = metric_title(name, frame.infos) + (", parts" if plot.metric.endswith("/") else "")
    drawn = {
        scale: line_chart(
            plot.series,
            title=title,
            y_label=name.replace("_", " "),
            log_y=scale == "log",
            steps=frame.steps,
            size=(620, 290) if large else (410, 220),
            most_points=frame.most_points,
            background=frame.background,
            switch=plot.both_scales,
        )
        for scale in (("linear", "log") if plot.both_scales else ("linear",))
    }
    more = ""
    if plot.more:
        more = element("p", f"{plot.more:,} further lines are not drawn.", class_="left-out")
    if not plot.both_scales:
        return element("figure", drawn["linear"] + more, class_="card")
    switch = "".join(
        _choice(plot.metric, scale, checked=(scale == "log") == plot.log) for scale in drawn
    )
    charts = "".join(
        element("div", chart + _left_out(plot.series) * (scale == "log"), class_=f"on-{scale}")
        for scale, chart in drawn.items()
    )
    body = element("div", switch + charts, class_="scales")
    return element("figure", body + more, class_="card")


def _choice(metric: str, scale: str, *, checked: bool) -> str:
    """One half of the switch between the scales; it works without a script."""
    assert metric in _BOTH_SCALES, metric  # a plain word, which ids are made of
    name = f"scale-{metric}"
    mark = " checked" if checked else ""
    return (
        f'<input type="radio" class="pick {scale}" name="{name}" id="{name}-{scale}"{mark}>'
        + element("label", scale, for_=f"{name}-{scale}")
    )


def _left_out(series: Sequence[Series]) -> str:
    """Says how many values a logarithmic axis cannot show."""
    count = sum(value <= 0 for item in series for _, value in item.known)
    if not count:
        return ""
    message = f"{count:,} value{'' if count == 1 else 's'} not above 0: gaps on the log scale."
    return element("p", escaped(message), class_="left-out")
