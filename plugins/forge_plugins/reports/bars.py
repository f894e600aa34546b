"""Bars of counts: as text for a terminal, as SVG for a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from forge_plugins.reports.markup import element, escaped

_EIGHTHS: Final = " ▏▎▍▌▋▊▉█"
_WIDTH, _ROW, _LEFT = 640, 22, 170
_MOST: Final = 40


def text_bars(names: Sequence[str], counts: Sequence[int], width: int = 40) -> list[str]:
    """One line for each bar: name, bar to an eighth of a character, count.

    Args:
        names: of the bars.
        counts: as long, none negative.
        width: of the longest bar, in characters.
    """
    assert len(names) == len(counts)
    most, longest = max(counts, default=0), max(map(len, names), default=0)
    digits = len(f"{most:,}")
    lines = []
    for name, count in zip(names, counts, strict=True):
        eighths = -(-count * width * 8 // most) if most else 0  # what is there is seen
        bar = "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
        lines.append(f"{name:>{longest}}  {count:>{digits},}  {bar}".rstrip())
    return lines


def svg_bars(title: str, names: Sequence[str], counts: Sequence[int], colour: int = 0) -> str:
    """A card with horizontal bars; of more than `_MOST` the first are drawn, and it says so.

    Args:
        title: of the card.
        names: of the bars.
        counts: as long.
        colour: number of a series.
    """
    assert len(names) == len(counts)
    shown = list(zip(names, counts, strict=True))[:_MOST]
    most = max((count for _, count in shown), default=0)
    parts, summary = [], []
    for row, (name, count) in enumerate(shown):
        y = 4 + _ROW * row
        length = (_WIDTH - _LEFT - 110) * count / most if most else 0.0
        summary.append(f"{name}: {count:,}")
        parts += [
            element("text", escaped(_short(name)), x=_LEFT - 10, y=y + 15, class_="entry end"),
            element(
                "rect", element("title", escaped(f"{name}: {count:,}")), x=_LEFT, y=y + 3,
                width=f"{max(length, 1.0 if count else 0.0):.1f}", height=_ROW - 7, rx=2,
                class_=f"held s{colour}",
            ),
            element("text", f"{count:,}", x=f"{_LEFT + length + 8:.1f}", y=y + 15, class_="tick"),
        ]  # fmt: skip
    svg = element(
        "svg", element("title", escaped(title)) + "".join(parts),
        xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {_WIDTH} {_ROW * len(shown) + 8}",
        role="img", aria_label=f"{title}; {'; '.join(summary)}",
    )  # fmt: skip
    hidden = len(names) - len(shown)
    note = element("p", f"{hidden:,} more are not drawn.", class_="left-out") if hidden else ""
    return element("figure", element("h3", escaped(title)) + svg + note, class_="card")


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"
