"""Series of metrics -> a line chart as inline SVG."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

from forge_plugins.reports.axis import Axis, log_axis, step_axis, value_axis
from forge_plugins.reports.markup import element, escaped
from forge_plugins.reports.notation import number_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Line = Literal["solid", "thin"]
Point = tuple[int, float | None]
Spread = tuple[int, float, float]
"""A step with the lowest and the highest value there."""

COLOURS: Final = 8
"""Colours of the style sheet (`--series-0` and so on); further series begin again, dotted."""

_TITLE: Final = 26  # heights and widths in pixels of the drawing
_LEGEND: Final = 19
_BELOW: Final = 44
_RIGHT: Final = 18
_CHARACTER: Final = 6.7  # width of a digit at the size of the labels
_TITLE_CHARACTER: Final = 9.2  # and at that of titles
_SWITCH: Final = 125
_LONGEST: Final = 40
_FEW: Final = 30
_ALIGNED: Final = 6  # labels up to this length leave all charts the same left edge


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart.

    Args:
        label: its name in the legend.
        points: (step, value) with rising steps and finite values; None is a gap.
        colour: its number in the palette.
        line: `solid`, or `thin` for what stands behind.
        variant: what the kind of line means, told once in the legend; empty: nothing.
        spread: the range that the line is the middle of; empty: there is none.
    """

    label: str
    points: Sequence[Point]
    colour: int = 0
    line: Line = "solid"
    variant: str = ""
    spread: Sequence[Spread] = ()

    @property
    def known(self) -> list[tuple[int, float]]:
        """The points that have a value."""
        return [(step, value) for step, value in self.points if value is not None]

    @property
    def name(self) -> str:
        """Label and variant."""
        return ", ".join(filter(None, (self.label, self.variant)))


@dataclass(frozen=True, slots=True)
class Background:
    """What stands behind the lines of all charts of a run.

    Args:
        bands: (name, first step, last step) of stretches; None: up to the end.
        marks: (step, what happened there).
    """

    bands: Sequence[tuple[str, int, int | None]] = ()
    marks: Sequence[tuple[int, str]] = ()


def line_chart(  # noqa: PLR0913  keyword-only, each a wish of its own
    series: Sequence[Series],
    *,
    title: str,
    y_label: str,
    x_label: str = "step",
    log_y: bool = False,
    steps: tuple[int, int] | None = None,
    size: tuple[int, int] = (620, 290),
    most_points: int = 600,
    background: Background | None = None,
    switch: bool = False,
) -> str:
    """Draw series over their steps.

    Args:
        series: the lines, the first drawn lowest.
        title: stands above, and is the drawing's name for readers of the screen.
        y_label: what the vertical axis shows.
        x_label: what the horizontal axis shows.
        log_y: logarithmic vertical axis; values that are not above 0 become gaps.
        steps: first and last step that the horizontal axis is to hold, so that charts that stand
            together agree; None: those of the series.
        size: width and height in pixels, the height without the rows of the legend; the drawing
            may be scaled when shown.
        most_points: about how many points of each series are drawn; lowest and highest stay.
        background: bands and marks behind the lines.
        switch: leave room for one in the upper right corner.

    Returns:
        One `svg` element, coloured by the classes of the page's style sheet.
    """
    assert most_points >= 2, f"{most_points} points make no line"
    if log_y:
        series = [_above_zero(item) for item in series]
    width, height = size
    legend, rows = _legend(series, width)
    height += rows * _LEGEND
    values = [value for item in series for _, value in item.known]
    ends = [end for item in series for _, *both in item.spread for end in both]
    values += [end for end in ends if end > 0 or not log_y]
    top, bottom = _TITLE + rows * _LEGEND + 14, height - _BELOW
    vertical = _vertical(values, bottom, top, log=log_y)
    left = 34 + _CHARACTER * max(_ALIGNED, *map(len, vertical.labels))
    held = steps or [step for item in series for step, _ in item.points]
    horizontal = step_axis(held, left, width - _RIGHT, count=max(2, int(width - left) // 90))
    parts = [
        element("title", escaped(title)),
        _text(0, 15, shortened(title, _title_room(width, switch=switch)), "chart-title"),
        legend,
        _bands(background, horizontal, vertical) if background else "",
        _grid(horizontal, vertical),
        _axis_names(horizontal, vertical, x_label, f"{y_label} (log)" if log_y else y_label),
        _event_marks(background, horizontal, vertical) if background else "",
        *(_spread(item, horizontal, vertical, most_points) for item in series),
        *(_drawn(item, horizontal, vertical, most_points) for item in series),
    ]
    if not values:
        parts.append(_text((left + width) / 2, (top + bottom) / 2, "not measured", "empty"))
    return element(
        "svg",
        "".join(parts),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width} {height}",
        role="img",
        aria_label=_summary(title, series, background),
    )


def decimated(points: Sequence[Point], most: int) -> list[Point]:
    """Fewer points with the same outline: of each stretch the lowest, the highest and a gap.

    Args:
        points: (step, value).
        most: about how many to keep; fewer points than that are left as they are.
    """
    count = len(points)
    if count <= most:
        return list(points)
    stretches = max(1, (most - 2) // 3)
    kept = {0, count - 1}
    for stretch in range(stretches):
        part = range(stretch * count // stretches, (stretch + 1) * count // stretches)
        known = [(value, index) for index in part if (value := points[index][1]) is not None]
        if known:
            kept.update((min(known)[1], max(known)[1]))
        gap = next((index for index in part if points[index][1] is None), None)
        if gap is not None:
            kept.add(gap)
    return [points[index] for index in sorted(kept)]


def thinned(spread: Sequence[Spread], most: int) -> list[Spread]:
    """A range at fewer steps with the same outline: of each stretch the lowest and the highest.

    Args:
        spread: (step, lowest, highest).
        most: about how many to keep; fewer than that are left as they are.
    """
    count = len(spread)
    if count <= most:
        return list(spread)
    stretches = max(1, (most - 2) // 2)
    kept = {0, count - 1}
    for stretch in range(stretches):
        part = range(stretch * count // stretches, (stretch + 1) * count // stretches)
        kept.add(min(part, key=lambda index: spread[index][1]))
        kept.add(max(part, key=lambda index: spread[index][2]))
    return [spread[index] for index in sorted(kept)]


def _above_zero(series: Series) -> Series:
    """The series with gaps where a logarithm does not exist."""
    return replace(
        series,
        points=[
            (step, value if value is not None and value > 0 else None)
            for step, value in series.points
        ],
    )


def _summary(title: str, series: Sequence[Series], background: Background | None) -> str:
    """The chart in words: first and last value of each line."""
    summary = [title]
    for item in series:
        known = item.known
        if known:
            (first, start), (last, end) = known[0], known[-1]
            words = (
                f"{item.name}: from {number_text(start)} at step {first:,} to {number_text(end)} "
                f"at step {last:,}"
            )
            if item.spread:
                _, low, high = item.spread[-1]
                words += f" (there from {number_text(low)} to {number_text(high)})"
            summary.append(words)
        else:
            summary.append(f"{item.name}: not measured")
    for name, begun, over in background.bands if background else ():
        summary.append(f"phase {name} from step {begun:,}" + (f" to {over:,}" if over else ""))
    return "; ".join(summary)


def _text(x: float, y: float, text: str, class_: str, **attributes: object) -> str:
    return element("text", escaped(text), x=f"{x:.5g}", y=f"{y:.5g}", class_=class_, **attributes)


def _stroke(path: str, class_: str) -> str:
    return element("path", d=path, class_=class_)


# -- axes ---------------------------------------------------------------------------------------


def _vertical(values: Sequence[float], bottom: int, top: int, *, log: bool) -> Axis:
    """The axis of the values; a logarithmic one needs more ticks to be read."""
    height = bottom - top
    if log:
        return log_axis(values, bottom, top, count=max(3, height // 25))
    return value_axis(values, bottom, top, count=max(3, height // 40))


def _grid(horizontal: Axis, vertical: Axis) -> str:
    """Lines and labels of all ticks, and the line at the bottom."""
    left, right = horizontal.start, horizontal.end
    bottom, top = vertical.start, vertical.end
    lines, labels = [], []
    for tick, label in zip(vertical.ticks, vertical.labels, strict=True):
        y = vertical.place(tick)
        lines.append(f"M{left:.1f} {y:.1f}H{right:.1f}")
        labels.append(_text(left - 8, y + 4, label, "tick end"))
    for tick, label in zip(horizontal.ticks, horizontal.labels, strict=True):
        x = horizontal.place(tick)
        lines.append(f"M{x:.1f} {bottom:.1f}V{top:.1f}")
        labels.append(_text(x, bottom + 18, label, "tick middle"))
    base = _stroke(f"M{left:.1f} {bottom:.1f}H{right:.1f}", "axis")
    return _stroke("".join(lines), "grid") + base + "".join(labels)


def _axis_names(horizontal: Axis, vertical: Axis, x_label: str, y_label: str) -> str:
    x, y = (horizontal.start + horizontal.end) / 2, (vertical.start + vertical.end) / 2
    y_label = shortened(y_label, int(abs(vertical.end - vertical.start) / _CHARACTER))
    return _text(x, vertical.start + 37, x_label, "name middle") + _text(
        12, y, y_label, "name middle", transform=f"rotate(-90 12 {y:.5g})"
    )


def _bands(background: Background, horizontal: Axis, vertical: Axis) -> str:
    """Stretches of the run as shades, each with its name where there is room."""
    top, bottom = vertical.end, vertical.start
    parts = []
    for number, (name, start, end) in enumerate(background.bands):
        left = _within(horizontal, start)
        right = horizontal.end if end is None else _within(horizontal, end)
        if right <= left:
            continue
        parts.append(
            element(
                "rect",
                element("title", escaped(name)),
                x=f"{left:.1f}",
                y=f"{top:.1f}",
                width=f"{right - left:.1f}",
                height=f"{bottom - top:.1f}",
                class_=f"band s{number % COLOURS}",
            )
        )
        if _CHARACTER * len(name) <= right - left:
            parts.append(_text((left + right) / 2, top - 3, name, "phase middle"))
    return "".join(parts)


def _event_marks(background: Background, horizontal: Axis, vertical: Axis) -> str:
    """A dashed line at each step where something was told; the pointer reads what."""
    parts = []
    for step, message in background.marks:
        x = horizontal.place(step)
        if horizontal.start <= x <= horizontal.end:
            path = f"M{x:.1f} {vertical.start:.1f}V{vertical.end:.1f}"
            title = element("title", escaped(f"step {step:,}: {message}"))
            parts.append(element("path", title, d=path, class_="event"))
    return "".join(parts)


def _within(axis: Axis, step: int) -> float:
    """The place of a step, or the nearer end of the axis."""
    return min(max(axis.place(step), axis.start), axis.end)


# -- legend -------------------------------------------------------------------------------------


def _legend(series: Sequence[Series], width: int) -> tuple[str, int]:
    """The legend below the title, and how many rows it takes."""
    entries = {item.label: _line_class(item.colour, "solid" if item.variant else item.line)
               for item in series}  # fmt: skip
    variants = {item.variant: f"line {item.line} neutral" for item in series if item.variant}
    if len(variants) > 1:
        entries.update(variants)
    parts, x, row = [], 0.0, 0
    for label, class_ in entries.items():
        shown = shortened(label)
        space = 26 + _CHARACTER * len(shown)
        if x and x + space > width - _RIGHT:
            x, row = 0.0, row + 1
        y = _TITLE + 12 + row * _LEGEND
        parts.append(_stroke(f"M{x + 1:.1f} {y - 4}h18", class_))
        parts.append(_text(x + 25, y, shown, "entry"))
        x += space + 16
    return "".join(parts), row + 1 if entries else 0


def shortened(label: str, most: int = _LONGEST) -> str:
    """A label of at most so many characters: its start and its end."""
    if len(label) <= most:
        return label
    end = max(1, 3 * most // 8)
    return f"{label[: most - end - 1]}…{label[-end:]}"


def _title_room(width: int, *, switch: bool) -> int:
    """Characters that a title has room for, beside the switch between the scales."""
    return int((width - (_SWITCH if switch else 0)) / _TITLE_CHARACTER)


def _line_class(colour: int, line: Line) -> str:
    again = " again" if colour >= COLOURS else ""
    return f"line {line} s{colour % COLOURS}{again}"


# -- lines --------------------------------------------------------------------------------------


def _spread(series: Series, horizontal: Axis, vertical: Axis, most: int) -> str:
    """The range of a series as a shade; below a logarithmic axis it ends at its edge."""
    result = thinned(series.spread, most // 2)
    if not result:
        return ""
    upper = [f"{horizontal.place(step):.1f} {vertical.place(high):.1f}" for step, _, high in result]
    lower = [f"{horizontal.place(step):.1f} {vertical.place(low):.1f}" for step, low, _ in result]
    path = f"M{'L'.join([*upper, *reversed(lower)])}Z"
    return _stroke(path, f"spread {series.line} s{series.colour % COLOURS}")


def _drawn(series: Series, horizontal: Axis, vertical: Axis, most: int) -> str:
    """The line of a series, with a dot that tells its last value."""
    known = series.known
    if not known:
        return ""
    path = "".join(_pieces(decimated(series.points, most), horizontal, vertical))
    class_ = _line_class(series.colour, series.line)
    step, value = known[-1]
    tooltip = element("title", escaped(f"{series.name}: {number_text(value)} at step {step:,}"))
    dot = element(
        "circle",
        tooltip,
        cx=f"{horizontal.place(step):.1f}",
        cy=f"{vertical.place(value):.1f}",
        r="3" if series.line == "solid" else "2.2",
        class_=f"dot s{series.colour % COLOURS}",
    )
    return _stroke(path, class_) + _marks(series, known, horizontal, vertical) + dot


def _marks(
    series: Series, known: Sequence[tuple[int, float]], horizontal: Axis, vertical: Axis
) -> str:
    """Dots where few values carry a line, so that what was measured is seen."""
    if len(known) > _FEW:
        return ""
    dots = (f"M{horizontal.place(step):.1f} {vertical.place(y):.1f}h0" for step, y in known)
    return _stroke("".join(dots), f"marks s{series.colour % COLOURS}")


def _pieces(points: Iterable[Point], horizontal: Axis, vertical: Axis) -> Iterable[str]:
    """Path commands: a new piece after each gap, a point for a value that stands alone."""
    alone = False
    open_ = False
    for step, value in points:
        if value is None:
            if alone:
                yield "h0"
            open_ = alone = False
            continue
        yield f"{'L' if open_ else 'M'}{horizontal.place(step):.1f} {vertical.place(value):.1f}"
        alone = not open_
        open_ = True
    if alone:
        yield "h0"
