"""A metrics file in one pass: exact while it is short, no spike lost however long it is."""

from __future__ import annotations

import json
import math
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from forge_plugins.reports import metrics_file
from forge_plugins.reports.metrics_file import POINTS, read_metrics


def plainly(lines: list[dict[str, Any]]) -> tuple[dict[Any, Any], list[int], int]:
    """Curves, steps of events and void lines, a line at a time."""
    records: list[dict[str, Any]] = []
    events: list[int] = []
    void = 0
    for line in lines:
        while events and events[-1] > line["step"]:
            events.pop()
            void += 1
        if line["kind"] == "event":
            events.append(line["step"])
            continue
        before = len(records)
        if records and records[-1]["step"] > line["step"]:
            records = [record for record in records if record["step"] < line["step"]]
        again = [r for r in records if (r["step"], r["kind"]) == (line["step"], line["kind"])]
        records = [record for record in records if record not in again]
        void += before - len(records)
        records.append(line)
    curves: dict[Any, Any] = {}
    for record in records:
        kind = {"log": "training"}.get(record["kind"], record["kind"])
        for name in record.keys() - {"step", "kind", "time", "epoch"}:
            value = record[name]
            if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
                curves.setdefault((name, kind), []).append((record["step"], value))
    return curves, events, void


def drawn(draw: random.Random) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    step = 0
    for number in range(draw.randint(1, 60)):
        step += draw.choice([0, 0, 1, 1, 2, 5])
        if draw.random() < 0.06:
            step = draw.randint(0, step)
        kind = draw.choice(["log", "log", "log", "validation", "event", "other"])
        line: dict[str, Any] = {"step": step, "kind": kind, "time": 1.0, "epoch": 0, "id": number}
        for name in draw.sample(["loss", "accuracy", "rate"], draw.randint(0, 3)):
            line[name] = draw.choice([draw.random(), draw.randint(-3, 10**20), None, True, "text"])
        lines.append(line)
    return lines


@pytest.mark.parametrize("block", [64, 300, 2**19])
def test_a_short_file_is_read_as_line_by_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """Red when a run that went back, a line said again or a value of another type is taken amiss."""
    monkeypatch.setattr(metrics_file, "_BLOCK", block)
    draw = random.Random(block)
    for _ in range(60):
        lines = drawn(draw)
        file = tmp_path / "metrics.jsonl"
        file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        notes: list[str] = []
        curves, events = read_metrics(file, notes)
        wanted, steps, void = plainly(lines)
        found = {(curve.metric, curve.kind): list(curve.points) for curve in curves}
        assert {key: [(s, float(v) if v is not None else None) for s, v in points]
                for key, points in found.items()} == {
            key: [(s, float(v) if v is not None else None) for s, v in points]
            for key, points in wanted.items()
        }  # fmt: skip
        assert [event.step for event in events] == steps
        said = [note for note in notes if "went back" in note]
        assert bool(said) == bool(void)
        assert not void or said[0].startswith(f"{void} line")


def test_no_spike_is_lost_in_a_long_file(tmp_path: Path) -> None:
    """Red when every n-th line is drawn."""
    file = tmp_path / "metrics.jsonl"
    count = 40 * POINTS
    spikes = {12_345: 7.0, 200_001: -7.0, count: 3.0}
    with file.open("w") as stream:
        for step in range(1, count + 1):
            loss = spikes.get(step, round(math.sin(step / 50), 4))
            value = "null" if step == 99_999 else loss
            stream.write(f'{{"step": {step}, "kind": "log", "loss": {value}}}\n')
    (curve,), _ = read_metrics(file, [])
    assert len(curve.points) <= 2 * POINTS
    points = dict(curve.points)
    assert {step: points[step] for step in spikes} == spikes
    assert points[99_999] is None
    assert curve.points[0][0] == 1
    steps = [step for step, _ in curve.points]
    assert steps == sorted(set(steps))
    assert max(later - earlier for earlier, later in pairwise(steps)) < 1000


def test_a_line_without_an_end_and_lines_that_are_none_are_told(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    good = b'{"step": 1, "kind": "log", "loss": 1}\n'
    file.write_bytes(
        good + b'{"step": 2, "kind": "log", "loss": NaN}\n' + b"[" * 10**5 + b"\n" + b"\xff\n"
        + b'{"a": 1},{"b": 2}\n' + b'{"step": 3, "loss": "' + b"x" * 2**22 + b'"}\n'
        + good.replace(b"1,", b"4,") + b'{"step": 5, "ki'
    )  # fmt: skip
    notes: list[str] = []
    (curve,), _ = read_metrics(file, notes)
    assert curve.points == ((1, 1), (4, 1))
    assert notes == ["6 lines of metrics.jsonl could not be read; the last one is cut short."]


def test_metrics_and_events_without_number_are_bounded_and_told(tmp_path: Path) -> None:
    """Red when a page of gigabytes is drawn."""
    file = tmp_path / "metrics.jsonl"
    with file.open("w") as stream:
        for step in range(1, 20_001):
            stream.write(f'{{"step": {step}, "kind": "log", "m{step}": 1}}\n')
            stream.write(f'{{"step": {step}, "kind": "event", "event": "told", "message": "."}}\n')
    notes: list[str] = []
    curves, events = read_metrics(file, notes)
    assert len(curves) == metrics_file.MOST_CURVES
    assert [event.step for event in events[-2:]] == [19_999, 20_000]
    assert len(events) == metrics_file.MOST_EVENTS
    assert notes == [
        "15,000 events before the last 5,000 are left out.",
        "19,000 curves beyond 1,000 are left out: metrics.jsonl has too many metrics.",
    ]
