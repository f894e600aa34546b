"""Runs that differ in nothing but their seed, taken together: median and range."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from forge_plugins.reports.run_sections import settings

if TYPE_CHECKING:
    from forge_plugins.reports.chart import Point, Spread
    from forge_plugins.reports.run_data import RunData

_SEED: Final = "run.seed"


@dataclass(frozen=True, slots=True)
class Group:
    """One run, or several with the same configuration but for the seed.

    Args:
        name: in legends and tables, one that no other group has.
        runs: at least one.
    """

    name: str
    runs: tuple[RunData, ...]

    @property
    def several(self) -> bool:
        """Whether there is a range to be shown."""
        return len(self.runs) > 1


def groups_of(runs: Sequence[RunData], names: Sequence[str]) -> list[Group]:
    """The runs in groups, in the order of their first ones.

    Args:
        runs: as they are to be shown.
        names: of each run alone, no two the same.
    """
    result: dict[object, list[int]] = {}
    for number, run in enumerate(runs):
        result.setdefault(_kind(run, number), []).append(number)
    parts = [part for numbers in result.values() for part in _apart(runs, numbers)]
    parts.sort()
    own = [runs[part[0]].name for part in parts if len(part) > 1]
    groups = []
    for part in parts:
        name = names[part[0]]
        if len(part) > 1:
            first = runs[part[0]].name
            name = first if own.count(first) == 1 else f"{first} from {name}"
            name = f"{name} ({len(part)} seeds)"
        groups.append(Group(name, tuple(runs[number] for number in part)))
    return groups


def _kind(run: RunData, number: int) -> object:
    """What runs of one group share; an unreadable configuration shares nothing."""
    if not run.config:
        return number
    return frozenset((key, value) for key, value in settings(run.config).items() if key != _SEED)


def _apart(runs: Sequence[RunData], numbers: list[int]) -> list[list[int]]:
    """Runs with one seed twice are no range of seeds: each stands alone."""
    seeds = [settings(runs[number].config).get(_SEED) for number in numbers]
    if len(numbers) > 1 and len(set(seeds)) == len(seeds):
        return [numbers]
    return [[number] for number in numbers]


def median_and_spread(curves: Sequence[Sequence[Point]]) -> tuple[list[Point], list[Spread]]:
    """The middle and the range of several curves.

    At each step that half of the curves have which are long enough: runs that ended earlier, or
    logged at other steps, do not make the line jump.

    Args:
        curves: (step, value) with rising steps; None is "not measured".

    Returns:
        (step, median), None where no curve has a value; (step, lowest, highest).
    """
    known = [dict(curve) for curve in curves if curve]
    spans = [(curve[0][0], curve[-1][0]) for curve in curves if curve]
    median: list[Point] = []
    spread: list[Spread] = []
    for step in sorted({step for curve in known for step in curve}):
        there = [curve[step] for curve in known if step in curve]
        reaching = sum(first <= step <= last for first, last in spans)
        if 2 * len(there) < reaching:
            continue
        values = [value for value in there if value is not None]
        if not values:
            median.append((step, None))
            continue
        median.append((step, statistics.median(values)))
        spread.append((step, min(values), max(values)))
    return median, spread
