"""Phases and events in the report: bands and marks on the curves, the timeline below them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from forge_kernel.planning.pipeline_file import load_pipeline
from forge_kernel.runner import run
from forge_plugins.reports.page import report_page
from forge_plugins.reports.run_data import Phase, read_run
from forge_plugins.reports.timeline import capability_spans

SVG = "{http://www.w3.org/2000/svg}"


def line(step: int, kind: str, **what: Any) -> dict[str, Any]:
    return {"step": step, "time": float(step), "kind": kind, "epoch": 0, **what}


def told(step: int, name: str, message: str = "", **facts: Any) -> dict[str, Any]:
    return line(step, "event", event=name, message=message, facts=facts)


def phase(step: int, before: str | None, after: str | None) -> dict[str, Any]:
    return told(step, "phase", f"The phase {after} begins.", before=before, after=after)


RECORDS = [
    phase(0, None, "warmup"),
    line(10, "log", loss=1.0),
    told(20, "capability_acquired", "The capability add is acquired.", capability="add"),
    phase(30, "warmup", "consolidation"),
    told(40, "capability_lost", "The capability <add> is lost.", capability="add"),
    line(40, "log", loss=0.5),
    told(60, "capability_acquired", "Again.", capability="add"),
    line(100, "log", loss=0.25),
]


def folder_of(place: Path, records: list[dict[str, Any]]) -> Path:
    place.mkdir()
    (place / "config.yaml").write_text("forge: 1\nrun: {name: told}\n")
    (place / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return place


def drawings(text: str) -> dict[str, Any]:
    found = [ElementTree.fromstring(one) for one in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    return {svg.find(f"{SVG}title").text: svg for svg in found}  # type: ignore[union-attr]


def of_class(svg: Any, tag: str, class_: str) -> list[Any]:
    return [part for part in svg.iter(f"{SVG}{tag}") if part.get("class").split()[0] == class_]


def test_phases_are_bands_from_where_they_begin_to_the_next(tmp_path: Path) -> None:
    data = read_run(folder_of(tmp_path / "run", RECORDS))
    assert data.phases == (Phase("warmup", 0, 30), Phase("consolidation", 30, None))
    loss = drawings(report_page([data]))["Loss"]
    first, second = of_class(loss, "rect", "band")
    assert first.find(f"{SVG}title").text == "warmup"
    end = float(first.get("x")) + float(first.get("width"))
    assert end == pytest.approx(float(second.get("x")), abs=0.11)
    ticks = {
        text.text: float(text.get("x"))
        for text in loss.iter(f"{SVG}text")
        if text.get("class") == "tick middle"
    }
    low, high = (float(next(iter(ticks))), float(list(ticks)[-1]))
    scale = (list(ticks.values())[-1] - next(iter(ticks.values()))) / (high - low)
    assert float(second.get("x")) == pytest.approx(
        next(iter(ticks.values())) + (30 - low) * scale, abs=0.5
    )
    assert "phase warmup from step 0 to 30; phase consolidation from step 30" in loss.get(
        "aria-label"
    )


def test_events_are_marks_on_the_curves_and_rows_below(tmp_path: Path) -> None:
    text = report_page([read_run(folder_of(tmp_path / "run", RECORDS))])
    marks = of_class(drawings(text)["Loss"], "path", "event")
    assert [mark.find(f"{SVG}title").text for mark in marks] == [
        "step 20: The capability add is acquired.",
        "step 40: The capability <add> is lost.",
        "step 60: Again.",
    ]
    assert "The capability &lt;add&gt; is lost." in text
    assert "5 told" in text


def test_a_capability_is_a_bar_for_each_time_it_was_held(tmp_path: Path) -> None:
    data = read_run(folder_of(tmp_path / "run", RECORDS))
    assert capability_spans(data.events) == {"add": [(20, 40), (60, None)]}
    drawing = drawings(report_page([data]))["Capabilities"]
    first, second = of_class(drawing, "rect", "held")
    assert float(first.get("width")) < float(second.get("width"))
    assert "add: from step 20 to step 40" in drawing.get("aria-label")
    assert "add: from step 60 to the end" in drawing.get("aria-label")


def test_events_after_a_step_that_the_run_went_back_to_are_void(tmp_path: Path) -> None:
    records = [line(10, "log", loss=1.0), told(15, "lost", "Void."), told(8, "kept", "Valid.")]
    data = read_run(folder_of(tmp_path / "run", records))
    assert [event.name for event in data.events] == ["kept"]
    assert any("went back" in note for note in data.notes)


def test_an_event_is_no_curve_and_odd_ones_do_no_harm(tmp_path: Path) -> None:
    odd = line(5, "event", event=3, message=None, facts=[1], loss=9.0)
    nameless = told(6, "phase", "", after=None)
    data = read_run(folder_of(tmp_path / "run", [odd, nameless, line(10, "log", loss=1.0)]))
    assert [curve.points for curve in data.curves] == [((10, 1.0),)]
    assert data.phases == ()
    assert "Loss" in drawings(report_page([data]))


def test_without_events_there_is_no_timeline(tmp_path: Path) -> None:
    text = report_page([read_run(folder_of(tmp_path / "run", [line(10, "log", loss=1.0)]))])
    assert "<h2>Events</h2>" not in text


def test_a_real_run_draws_its_phases(tmp_path: Path) -> None:
    clock = "{warmup_steps: 3, acceleration_steps: 3, consolidation_steps: 0, refinement_steps: 0}"
    settings = ["run.max_steps=8", "run.log_every=2", f"phases={{use: grokfast, with: {clock}}}"]
    run(load_pipeline("smoke", settings), output_dir=tmp_path / "run", quiet=True)
    phases = read_run(tmp_path / "run").phases
    assert [(one.name, one.start, one.end) for one in phases] == [
        ("warmup", 0, 3), ("acceleration", 3, 6), ("completed", 6, None),
    ]  # fmt: skip
    assert 'class="band' in (tmp_path / "run/report.html").read_text()
