"""What the runs of a sweep have come to: each by itself, and in a ranked table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge_kernel.embedding import RunFolder
from forge_kernel.run_folder.folder import CONFIG, RESULT
from forge_plugins.sweeps.variant import Variant


@dataclass(frozen=True, slots=True)
class Goal:
    """By which validation metric runs are ranked, and which way is better."""

    metric: str
    largest: bool

    def value(self, folder: Path) -> float | None:
        """The best of a run; None when it has none."""
        best = RunFolder(folder).data(RESULT).get("best")
        value = best.get(self.metric) if isinstance(best, dict) else None
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None

    def key(self, value: float) -> float:
        """What sorts the better one first."""
        return -value if self.largest else value


def outcome(folder: Path) -> str | None:
    """How a run has ended; None: it has not."""
    if not (folder / CONFIG).is_file():
        return None
    result = RunFolder(folder).data(RESULT)
    status = RunFolder(folder).status()
    ended = result.get("outcome")
    if ended in ("completed", "failed") and status.get("state") == ended:
        return str(ended)
    return "stopped" if ended == "stopped" else None


@dataclass(frozen=True, slots=True)
class Row:
    """A configuration in the table."""

    variant: Variant
    values: tuple[float, ...]  # of the runs that have one
    runs: int
    notes: str

    @property
    def median(self) -> float | None:
        """The middle of its seeds."""
        return statistics.median(self.values) if self.values else None

    def to_data(self) -> dict[str, Any]:
        """Plain data for programs."""
        return {
            "settings": dict(self.variant.values),
            "median": self.median,
            "lowest": min(self.values, default=None),
            "highest": max(self.values, default=None),
            "runs": self.runs,
            "notes": self.notes,
        }


def ranked(rows: Iterable[Row], goal: Goal) -> list[Row]:
    """The best median first; those without a value last, in their own order."""
    rows = list(rows)
    known = [row for row in rows if row.median is not None]
    known.sort(key=lambda row: goal.key(row.median or 0.0))
    return [*known, *(row for row in rows if row.median is None)]


def table(rows: Sequence[Row], goal: Goal) -> list[str]:
    """The ranked rows as lines for people: rank, median, range over seeds, settings."""
    which = "highest" if goal.largest else "lowest"
    lines = [
        f"{goal.metric} of the validation, {which} first (median of the seeds, range):",
        f"  {'rank':>4}  {'median':>9}  {'lowest':>9}  {'highest':>9}  {'runs':>4}  settings",
    ]
    for rank, row in enumerate(rows, start=1):
        cells = [
            f"{value:9.4g}" if value is not None else f"{'-':>9}"
            for value in (row.median, min(row.values, default=None), max(row.values, default=None))
        ]
        about = f"{row.variant.label}  {row.notes}".rstrip()
        place = f"{rank:>4}" if row.values else f"{'-':>4}"
        lines.append(f"  {place}  {'  '.join(cells)}  {row.runs:>4}  {about}")
    return lines
