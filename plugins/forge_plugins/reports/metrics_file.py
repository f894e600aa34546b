"""`metrics.jsonl` in one pass and bounded memory, however long it is.

Blocks of lines are decoded at once and their numbers taken as arrays. Of a curve with more points
than a page can show, each two neighbouring stretches become one that keeps its least and its
greatest value at their steps, so that no spike is lost.

    block of lines -> rows -> segments of rising steps -> curves (thinned out when they are full)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from forge_kernel.api import LazyModule
from forge_plugins.reports.strict_json import (
    LARGEST_STEP,
    count,
    number,
    strict_object,
    words,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Steps = NDArray[np.int64]
    Values = NDArray[np.float64]
else:
    np = LazyModule("numpy")

POINTS: Final = 8192
"""Points of a curve above which it is thinned out."""
MOST_POINTS: Final = 300_000
"""Points of all curves together, as far as each keeps an eighth of `POINTS`."""
MOST_EVENTS: Final = 5000
MOST_CURVES: Final = 1000
_BLOCK: Final = 2**19
_LONGEST_LINE: Final = 2**20
_KINDS: Final = {"log": "training"}
_NO_METRICS: Final = frozenset({"step", "time", "kind", "epoch"})
_PLAIN: Final = frozenset({int, float, type(None)})


@dataclass(frozen=True, slots=True)
class Curve:
    """One metric over the steps.

    Args:
        metric: its name in the file.
        kind: `training`, `validation`, or whatever else the file calls the kind of line.
        points: (step, value) with rising steps; None is "not measured".
    """

    metric: str
    kind: str
    points: tuple[tuple[int, float | None], ...]

    @property
    def measured(self) -> bool:
        """Whether any value is a number."""
        return any(value is not None for _, value in self.points)


@dataclass(frozen=True, slots=True)
class EmittedEvent:
    """An event: finished steps, one word for programs, a sentence for people, plain facts."""

    step: int
    name: str
    message: str
    facts: Mapping[str, Any]


class _Points:
    """The points of one curve, or the steps of all lines of a kind."""

    def __init__(self, *, keep_all: bool = False) -> None:
        self._all = keep_all
        self.steps: Steps = np.empty(0, np.int64)
        self.values: Values = np.empty(0)
        self._new: list[tuple[Steps, Values]] = []
        self._waiting = 0
        self._stretch = 1  # points that were added, for each that is kept

    def add(self, steps: Steps, values: Values) -> None:
        """Add points at later steps."""
        self._new.append((steps, values))
        self._waiting += len(steps)
        if self._waiting > POINTS:
            self.settle()

    @property
    def last(self) -> int | None:
        """The step of the last point."""
        steps = self._new[-1][0] if self._new else self.steps
        return int(steps[-1]) if len(steps) else None

    def settle(self) -> None:
        """Join what was added; all that is too many is thinned out to the same degree."""
        if not self._new:
            return
        steps = np.concatenate([steps for steps, _ in self._new])
        values = np.concatenate([values for _, values in self._new])
        self._new, self._waiting = [], 0
        if self._stretch > 1:
            steps, values = thinned_out(steps, values, 2 * self._stretch)
        self.steps = np.concatenate([self.steps, steps])
        self.values = np.concatenate([self.values, values])
        if not self._all:
            self.reduce(2 * POINTS)

    def reduce(self, most: int) -> None:
        """Thin out to at most so many points."""
        for _ in range(64):
            if len(self.steps) <= most:
                break
            self.steps, self.values = thinned_out(self.steps, self.values, 4)
            self._stretch *= 2

    def cut(self, step: int) -> int:
        """Drop the points from a step on; how many."""
        self.settle()
        kept = int(np.searchsorted(self.steps, step))
        dropped = len(self.steps) - kept
        self.steps, self.values = self.steps[:kept], self.values[:kept]
        return dropped

    def points(self) -> tuple[tuple[int, float | None], ...]:
        """As plain numbers; None where nothing was measured."""
        self.settle()
        values = [None if math.isnan(value) else value for value in self.values.tolist()]
        return tuple(zip(self.steps.tolist(), values, strict=True))


def thinned_out(steps: Steps, values: Values, size: int) -> tuple[Steps, Values]:
    """Of each stretch of `size` points the least, the greatest, and one that was not measured.

    What is left over at the end stays, and so do the first and the last point.
    """
    rows = len(steps) // size
    if not rows:
        return steps, values
    grid = values[: size * rows].reshape(rows, size)
    keep = np.zeros((rows, size), bool)
    here = np.arange(rows)
    missing = np.isnan(grid)
    keep[here, np.where(missing, np.inf, grid).argmin(1)] = True
    keep[here, np.where(missing, -np.inf, grid).argmax(1)] = True
    gaps = missing.any(1)
    keep[here[gaps], missing[gaps].argmax(1)] = True
    chosen = np.concatenate([keep.reshape(-1), np.ones(len(steps) - size * rows, bool)])
    if chosen.sum() > 0.9 * len(chosen):  # gaps everywhere: nothing else is left to give up
        chosen[1:-1:2] = False
    chosen[[0, -1]] = True
    return steps[chosen], values[chosen]


class MetricsReader:
    """Takes in blocks of lines; `curves` and `events` are what they said."""

    def __init__(self) -> None:
        self._points: dict[tuple[str, str], _Points] = {}
        self._lines: dict[str, _Points] = {}  # of each kind: the steps of its lines
        self._last = -1
        self._whole: set[tuple[str, str]] = set()  # curves whose values are whole numbers
        self.events: list[EmittedEvent] = []
        self.broken = self.replaced = self.left_out = 0
        self.curves_left_out: set[tuple[str, str]] = set()
        self.torn = False

    def take(self, lines: Sequence[bytes]) -> None:
        """Take in some lines, without those that hold nothing."""
        rows = _decoded(lines)
        if rows is None:
            rows = []
            for line in lines:
                row = strict_object(line.decode("utf-8", "replace"))
                self.torn = row is None
                if row is None:
                    self.broken += 1
                else:
                    rows.append(row)
        else:
            self.torn = False
        good = rows if _are_records(rows) else [row for row in rows if _is_record(row)]
        self.broken += len(rows) - len(good)
        if len(good) < len(rows) and not _is_record(rows[-1]):
            self.torn = True
        if good:
            self._take_rows(good)

    def _take_rows(self, rows: list[dict[str, Any]]) -> None:
        steps = np.array([row["step"] for row in rows], np.int64)
        kinds = [row["kind"] for row in rows]
        told = [index for index, kind in enumerate(kinds) if kind == "event"]
        self._take_events(rows, steps, told)
        if told:
            chosen = [index for index, kind in enumerate(kinds) if kind != "event"]
            rows, kinds = [rows[index] for index in chosen], [kinds[index] for index in chosen]
            steps = steps[chosen]
        if not rows:
            return
        breaks = np.flatnonzero(np.diff(steps, prepend=self._last) < 0).tolist()
        for begin, end in zip([0, *breaks], [*breaks, len(rows)], strict=True):
            if begin == end:
                continue
            if steps[begin] < self._last:
                self._go_back(int(steps[begin]))
            self._take_segment(rows[begin:end], kinds[begin:end], steps[begin:end])
            self._last = int(steps[end - 1])

    def _take_events(self, rows: list[dict[str, Any]], steps: Steps, told: list[int]) -> None:
        """Add events; those that a later line is from before are of a run that went back."""
        least = int(steps.min())
        while self.events and self.events[-1].step > least:
            self.events.pop()
            self.replaced += 1
        if not told:
            return
        later = np.minimum.accumulate(steps[::-1])[::-1]
        for index in told:
            if steps[index] > later[index]:
                self.replaced += 1
                continue
            row = rows[index]
            facts = row.get("facts")
            name, message = words(row.get("event")) or "", words(row.get("message")) or ""
            known = facts if isinstance(facts, dict) else {}
            self.events.append(EmittedEvent(int(steps[index]), name, message, known))
        if len(self.events) > 2 * MOST_EVENTS:
            self.left_out += len(self.events) - MOST_EVENTS
            del self.events[:-MOST_EVENTS]

    def _go_back(self, step: int) -> None:
        """Lines from a step on are void: a resumed run goes on from a checkpoint."""
        for lines in self._lines.values():
            self.replaced += lines.cut(step)
        for points in self._points.values():
            _ = points.cut(step)

    def _take_segment(self, rows: list[dict[str, Any]], kinds: list[str], steps: Steps) -> None:
        for kind in dict.fromkeys(kinds):
            if len(set(kinds)) == 1:
                self._take_kind(_KINDS.get(kind, kind), rows, steps)
                return
            chosen = [index for index, other in enumerate(kinds) if other == kind]
            own = [rows[index] for index in chosen]
            self._take_kind(_KINDS.get(kind, kind), own, steps[chosen])

    def _take_kind(self, kind: str, rows: list[dict[str, Any]], steps: Steps) -> None:
        lines = self._lines.setdefault(kind, _Points(keep_all=True))
        if lines.last == steps[0]:  # said again
            self.replaced += lines.cut(int(steps[0]))
            for (_, other), points in self._points.items():
                if other == kind:
                    _ = points.cut(int(steps[0]))
        last = np.append(steps[1:] != steps[:-1], True)
        if not last.all():
            self.replaced += int((~last).sum())
            rows = [row for row, kept in zip(rows, last.tolist(), strict=True) if kept]
            steps = steps[last]
        lines.add(steps, np.zeros(len(steps), np.int8))
        names: dict[str, None] = {}
        for some in dict.fromkeys(map(tuple, rows)):
            names.update(dict.fromkeys(some))
        for name in names:
            if name not in _NO_METRICS:
                self._take_metric((name, kind), rows, steps)

    def _take_metric(self, key: tuple[str, str], rows: list[dict[str, Any]], steps: Steps) -> None:
        name, _ = key
        if key not in self._points and len(self._points) >= MOST_CURVES:
            self.curves_left_out.add(key)
            return
        values = [row.get(name, _ABSENT) for row in rows]
        if not _PLAIN.issuperset(map(type, values)):
            kept = [index for index, value in enumerate(values) if _is_metric(value)]
            values = [number(values[index]) for index in kept]
            steps = steps[kept]
        if not values:
            return
        try:
            numbers = np.array(values, np.float64)
        except OverflowError:
            numbers = np.array([number(value) for value in values], np.float64)
        numbers[np.isinf(numbers)] = np.nan
        if key not in self._points:
            self._whole.add(key)
        if key in self._whole and float in set(map(type, values)):
            self._whole.discard(key)
        self._points.setdefault(key, _Points()).add(steps, numbers)

    def curves(self) -> tuple[Curve, ...]:
        """The curves, in the order in which they came."""
        result = []
        most = max(POINTS // 8, MOST_POINTS // max(1, len(self._points)))
        for key, points in self._points.items():
            points.settle()
            points.reduce(most)
            held: Any = points.points()
            if key in self._whole:
                held = tuple((step, None if v is None else int(v)) for step, v in held)
            result.append(Curve(*key, held))
        return tuple(curve for curve in result if curve.points)


_ABSENT: Final = object()


def _is_metric(value: Any) -> bool:
    return value is None or number(value) is not None


def _are_records(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all are, as they nearly always are."""
    steps = [row.get("step") for row in rows]
    kinds = [row.get("kind") for row in rows]
    if not rows or set(map(type, steps)) != {int} or set(map(type, kinds)) != {str}:
        return False
    known: Any = steps
    return min(known) >= 0 and max(known) < LARGEST_STEP and all(kinds)


def _is_record(row: Mapping[str, Any]) -> bool:
    step, kind = row.get("step"), row.get("kind")
    if type(step) is int and type(kind) is str:
        return 0 <= step < LARGEST_STEP and bool(kind)
    return count(step) is not None and words(kind) is not None


def _decoded(lines: Sequence[bytes]) -> list[dict[str, Any]] | None:
    """Lines as objects, decoded at once; None where one of them is no strict JSON object."""
    try:
        rows: list[Any] = msgspec.json.decode(b"[" + b",".join(lines) + b"]")
    except (ValueError, RecursionError):
        return None
    fits = len(rows) == len(lines) and set(map(type, rows)) <= {dict}
    return rows if fits else None


def _blocks(file: Path) -> Iterator[tuple[list[bytes], int]]:
    """Lines that hold something, many at a time, and how many are longer than any line is."""
    rest, skipping = b"", False
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            *lines, rest = (rest + block).split(b"\n")
            too_long = 0
            if skipping and lines:
                skipping = False
                del lines[0]
            if len(rest) > _LONGEST_LINE:
                too_long, rest, skipping = int(not skipping), b"", True
            yield [line for line in lines if line.strip()], too_long
    if rest.strip() and not skipping:
        yield [rest], 0


def read_metrics(
    file: Path, notes: list[str]
) -> tuple[tuple[Curve, ...], tuple[EmittedEvent, ...]]:
    """Curves and events of a metrics file; what is wrong with it is noted."""
    if not file.is_file():
        notes.append(f"{file.name} is absent: there is nothing to draw.")
        return (), ()
    reader = MetricsReader()
    for lines, too_long in _blocks(file):
        reader.broken += too_long
        if lines:
            reader.take(lines)
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - 1))
        ended = stream.read(1) in (b"\n", b"")
    if reader.broken:
        tail = "; the last one is cut short." if reader.torn and not ended else "."
        notes.append(f"{_counted(reader.broken)} of {file.name} could not be read{tail}")
    if reader.replaced:
        notes.append(
            f"{_counted(reader.replaced)} of {file.name} from before the run went back to an "
            "earlier step: not drawn."
        )
    left_out = reader.left_out + max(0, len(reader.events) - MOST_EVENTS)
    if left_out:
        notes.append(f"{left_out:,} events before the last {MOST_EVENTS:,} are left out.")
    if reader.curves_left_out:
        many = f"{len(reader.curves_left_out):,} curves beyond {MOST_CURVES:,}"
        notes.append(f"{many} are left out: {file.name} has too many metrics.")
    return reader.curves(), tuple(reader.events[-MOST_EVENTS:])


def _counted(lines: int) -> str:
    return f"{lines:,} line{'' if lines == 1 else 's'}"
