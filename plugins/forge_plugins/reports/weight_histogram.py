"""The levels of quantized weights: how they are shared out over the run, and in the end."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from forge_plugins.reports.axis import Axis, step_axis, value_axis
from forge_plugins.reports.chart import shortened
from forge_plugins.reports.markup import element, escaped

if TYPE_CHECKING:
    from forge_plugins.reports.run_data import RunData

LEVEL: Final = re.compile(r"level_(-?\d+)(?:/(.+))?$")
"""Metrics that are the share of a level, of all weights or of a layer's."""

_WIDTH: Final = 620
_HEIGHT: Final = 250
_LEFT: Final = 52
_MOST_STEPS: Final = 120
_MOST_LAYERS: Final = 40
_MOST_PIECES: Final = 240  # of all rows, at some 150 bytes each
_MOST_SAMPLES: Final = 9
_MOST_SHARES: Final = 7  # of levels, written below their bars
_ROW: Final = 22
_NAME: Final = 290

Shares = dict[int, dict[int, float]]
"""Share by level by step; a step that lacks a level is not there."""


def level_fractions(run: RunData) -> dict[str, Shares]:
    """The shares of all weights (under the empty name) and of each layer's."""
    curves: dict[str, dict[int, dict[int, float]]] = {}
    for curve in run.curves:
        result = LEVEL.match(curve.metric)
        if result is None or not curve.measured:
            continue
        points = {step: value for step, value in curve.points if value is not None}
        curves.setdefault(result[2] or "", {})[int(result[1])] = points
    return {name: _whole(by_level) for name, by_level in curves.items()}


def _whole(by_level: dict[int, dict[int, float]]) -> Shares:
    """By step, where every level was measured."""
    steps = set.intersection(*(set(points) for points in by_level.values()))
    levels = sorted(by_level)
    return {step: {level: by_level[level][step] for level in levels} for step in sorted(steps)}


def levels_card(run: RunData, steps: tuple[int, int]) -> str:
    """Bars of the latest levels, areas over the steps, and a row for each layer that was measured.

    Args:
        run: nothing is drawn for one without levels.
        steps: first and last step of the charts of the page.
    """
    shares = level_fractions(run)
    total = shares.pop("", {})
    parts = [_histogram(total), _areas(total, steps)] if total else []
    layers = {name: result for name, result in shares.items() if result}
    if not parts and not layers:
        return ""
    if layers:
        parts.append(_rows(layers))
    return element("div", "".join(parts), class_="charts levels")


def _class(level: int, levels: Sequence[int]) -> tuple[str, str]:
    """Colour by sign, stronger the further from zero: (class, opacity)."""
    sign = "zero" if level == 0 else "negative" if level < 0 else "positive"
    furthest = max(abs(item) for item in levels) or 1
    return f"level {sign}", f"{0.35 + 0.6 * abs(level) / furthest:.2f}" if level else "0.55"


def _text(x: float, y: float, text: str, class_: str) -> str:
    return element("text", escaped(text), x=f"{x:.5g}", y=f"{y:.5g}", class_=class_)


def _drawing(title: str, words: str, body: str, height: float, width: int = _WIDTH) -> str:
    svg = element(
        "svg",
        element("title", escaped(title)) + _text(0, 15, title, "chart-title") + body,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width} {height:g}",
        role="img",
        aria_label=f"{title}; {words}",
    )
    return element("figure", svg, class_="card")


def _scale(vertical: Axis, right: float) -> str:
    """Lines and labels of a share's axis."""
    lines = "".join(f"M{_LEFT} {vertical.place(tick):.1f}H{right:.1f}" for tick in vertical.ticks)
    labels = "".join(
        _text(_LEFT - 8, vertical.place(tick) + 4, label, "tick end")
        for tick, label in zip(vertical.ticks, vertical.labels, strict=True)
    )
    return element("path", d=lines, class_="grid") + labels


def _legend(levels: Sequence[int], y: float) -> str:
    """A sample of each level's colour, where they are few."""
    if len(levels) > _MOST_SAMPLES:
        return _text(0, y, f"levels from {levels[0]} (below) to {levels[-1]}", "entry")
    parts, x = [], 1.0
    for level in levels:
        class_, opacity = _class(level, levels)
        parts.append(
            element("rect", x=f"{x:g}", y=f"{y - 9:g}", width=10, height=10, class_=class_,
                    fill_opacity=opacity)
        )  # fmt: skip
        parts.append(_text(x + 15, y, str(level), "entry"))
        x += 44
    return "".join(parts)


def _histogram(shares: Shares) -> str:
    """A bar for each level at the last step, a mark where it stood at the first."""
    (first, before), (last, now) = next(iter(shares.items())), list(shares.items())[-1]
    levels = list(now)
    top, bottom, right = 56.0, _HEIGHT - 26.0, _WIDTH - 18.0
    vertical = value_axis([0.0, *now.values(), *before.values()], bottom, top, count=5)
    space = (right - _LEFT) / len(levels)
    parts = [_scale(vertical, right)]
    for place, level in enumerate(levels):
        x, y = _LEFT + place * space, vertical.place(now[level])
        class_, opacity = _class(level, levels)
        message = f"level {level}: {now[level]:.2%}, at step {first:,} {before[level]:.2%}"
        parts.append(
            element(
                "rect",
                element("title", escaped(message)),
                x=f"{x + 0.12 * space:.1f}", y=f"{y:.1f}", width=f"{0.76 * space:.1f}",
                height=f"{bottom - y:.1f}", class_=class_, fill_opacity=opacity,
            )
        )  # fmt: skip
        mark = vertical.place(before[level])
        line = f"M{x + 0.06 * space:.1f} {mark:.1f}h{0.88 * space:.1f}"
        parts.append(element("path", d=line, class_="before"))
        few = len(levels) <= _MOST_SHARES
        label = f"{level}: {now[level]:.1%}" if few else str(level)
        parts.append(_text(x + space / 2, bottom + 18, label, "tick middle"))
    line = element("path", d=f"M1 {34}h18", class_="before")
    legend = line + _text(25, 38, f"at step {first:,}; bars: at step {last:,}", "entry")
    words = ", ".join(f"level {level} {share:.4f}" for level, share in now.items())
    return _drawing("Levels of the weights", words, legend + "".join(parts), _HEIGHT)


def _areas(shares: Shares, steps: tuple[int, int]) -> str:
    """The shares over the steps, one upon the other."""
    known = list(shares)
    every = -(-len(known) // _MOST_STEPS)
    chosen = sorted({*known[::every], known[-1]})
    levels = list(shares[known[-1]])
    top, bottom, right = 56.0, _HEIGHT - 26.0, _WIDTH - 18.0
    vertical = value_axis([0.0, 1.0], bottom, top, count=5)
    horizontal = step_axis(steps, _LEFT, right, count=6)
    places = [horizontal.place(step) for step in chosen]
    below = [0.0] * len(chosen)
    parts = []
    for level in levels:
        above = [low + shares[step][level] for low, step in zip(below, chosen, strict=True)]
        edge = [f"{x:.1f} {vertical.place(y):.1f}" for x, y in zip(places, above, strict=True)]
        base = [f"{x:.1f} {vertical.place(y):.1f}" for x, y in zip(places, below, strict=True)]
        class_, opacity = _class(level, levels)
        tooltip = element("title", escaped(f"level {level}"))
        path = f"M{'L'.join([*edge, *reversed(base)])}Z"
        parts.append(element("path", tooltip, d=path, class_=class_, fill_opacity=opacity))
        below = above
    for tick, label in zip(horizontal.ticks, horizontal.labels, strict=True):
        parts.append(_text(horizontal.place(tick), bottom + 18, label, "tick middle"))
    words = f"{len(levels)} levels from {levels[0]} to {levels[-1]}, {len(known):,} steps"
    body = _legend(levels, 38) + _scale(vertical, right) + "".join(parts)
    return _drawing("Levels over the steps", words, body, _HEIGHT)


def _rows(layers: dict[str, Shares]) -> str:
    """Each layer's levels at its last step as one row of pieces."""
    each = len(next(iter(next(iter(layers.values())).values())))
    most = max(1, min(_MOST_LAYERS, _MOST_PIECES // each))
    shown = list(layers.items())[:most]
    width, right = 2 * _WIDTH, 2 * _WIDTH - 18
    every = sorted({level for _, shares in shown for level in next(iter(shares.values()))})
    parts, summary = [_legend(every, 38)], []
    for row, (name, shares) in enumerate(shown):
        now = list(shares.values())[-1]
        levels = list(now)
        y, x = 50.0 + _ROW * row, float(_NAME)
        parts.append(_text(_NAME - 10, y + 14, shortened(name), "entry end"))
        summary.append(f"{name}: " + ", ".join(f"{level} {now[level]:.3f}" for level in levels))
        for level in levels:
            long = (right - _NAME) * now[level]
            class_, opacity = _class(level, levels)
            title = element("title", escaped(f"{name}, level {level}: {now[level]:.2%}"))
            parts.append(
                element(
                    "rect", title, x=f"{x:.1f}", y=f"{y:g}", width=f"{long:.1f}",
                    height=_ROW - 6, class_=class_, fill_opacity=opacity,
                )
            )  # fmt: skip
            x += long
    more = len(layers) - len(shown)
    title = "Levels of each layer" + (f" (the first {len(shown)} of {len(layers)})" if more else "")
    return _drawing(title, "; ".join(summary), "".join(parts), 56.0 + _ROW * len(shown), width)
