"""A run in a notebook's cell: one bar, the metrics, and the loss as it falls, drawn in place."""

from __future__ import annotations

import html
import sys
from typing import Any, Final

POINTS: Final = 200
"""Points of the curve; each second one is left out when there are twice as many."""
_WIDTH, _HEIGHT = 560, 120


def in_notebook() -> bool:
    """Whether a notebook's kernel runs this process, and shows what is displayed."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None else None
    return shell is not None and type(shell).__name__ == "ZMQInteractiveShell"


class Curve:
    """A curve of bounded size: the least it says is where it began and where it is."""

    def __init__(self) -> None:
        self._points: list[tuple[int, float]] = []
        self._stride, self._seen = 1, 0

    def add(self, step: int, value: float) -> None:
        """A point further on."""
        if self._seen % self._stride == 0:
            self._points.append((step, value))
            if len(self._points) >= 2 * POINTS:
                self._points, self._stride = self._points[::2], 2 * self._stride
        self._seen += 1

    def svg(self, name: str) -> str:
        """As a picture; nothing before there are two points."""
        if len(self._points) < 2:
            return ""
        steps, values = zip(*self._points, strict=True)
        low, high = min(values), max(values)
        across, up = (_WIDTH - 2) / (steps[-1] - steps[0]), (_HEIGHT - 4) / ((high - low) or 1.0)
        line = " ".join(
            f"{1 + (step - steps[0]) * across:.1f},{_HEIGHT - 2 - (value - low) * up:.1f}"
            for step, value in self._points
        )
        about = f"{name} from {values[0]:.4g} to {values[-1]:.4g}"
        return (
            f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" style="max-width:100%" '
            f'role="img" aria-label="{html.escape(about)}"><polyline points="{line}" fill="none" '
            'stroke="currentColor" stroke-width="1.5"/></svg>'
        )


class NotebookView:
    """What stands in the cell; drawn anew in the same place.

    Args:
        name: of the run.
        total: optimizer steps, where they are known.
    """

    def __init__(self, name: str, total: int | None) -> None:
        self._name, self._total = name, total
        self._handle: Any = None
        self.loss = Curve()

    def draw(self, step: int, clock: str, metrics: str, *, notes: list[str]) -> None:
        """Show the state of the run.

        Args:
            step: optimizer steps done.
            clock: time gone, and what else is said of speed.
            metrics: of the last log line and validation.
            notes: what plugins told.
        """
        from IPython import display as screen

        of = f" of {self._total}" if self._total else ""
        limit = f' max="{self._total}"' if self._total else ""
        told = "".join(f"<div>{html.escape(note)}</div>" for note in notes)
        content = (
            f'<div style="font-family:monospace"><div>{html.escape(self._name)} '
            f'<progress value="{step}"{limit}></progress> step {step}{of}, {html.escape(clock)}'
            f"</div><div>{html.escape(metrics)}</div>{told}{self.loss.svg('loss')}</div>"
        )
        shown: Any = screen
        if self._handle is None:
            self._handle = shown.display(shown.HTML(content), display_id=True)
        else:
            self._handle.update(shown.HTML(content))
