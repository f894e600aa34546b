"""`forge report` and the observer that draws the same page, seen from outside: the HTML itself."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import forked
import pytest
import typer
from hypothesis import example, given, strategies
from typer.testing import CliRunner

from forge_kernel.api import Kind, RunResult
from forge_kernel.contract.run import Run
from forge_kernel.contract.run_config import RunConfig
from forge_kernel.errors import ConfigError
from forge_kernel.training.one_process import OneProcess
from forge_plugins.commands.report import report
from forge_plugins.observers.html_report import HtmlReport, HtmlReportConfig
from forge_plugins.reports.axis import log_axis, step_axis, value_axis
from forge_plugins.reports.chart import Series, decimated, line_chart
from forge_plugins.reports.notation import duration_text, number_text, size_text, tick_texts
from forge_plugins.reports.page import report_page
from forge_plugins.reports.run_data import read_run

SVG = "{http://www.w3.org/2000/svg}"
VOID = {"meta", "input"}
CONFIG = """\
forge: 1
run: {name: NAME, seed: 0, max_steps: 400}
optimizer: {use: adamw, with: {lr: LR}}
"""


class Page(HTMLParser):
    """Reads a page: tags that balance, text, tables, machine-readable values."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes = [], [], []
        self.text, self.rows, self.values, self.labels = "", [], [], []
        self.feed(text)
        self.close()
        assert self.open == [], "tags that are never closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, key, value) for key, value in attrs]
        self.labels += [value for key, value in attrs if key == "aria-label"]
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")
        if tag == "data":
            self.values.append((dict(attrs)["value"], ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data
        if "data" in self.open:
            value, text = self.values[-1]
            self.values[-1] = (value, text + data)

    def row(self, heading):
        found = [row for row in self.rows if row[0] == heading]
        assert len(found) == 1, f"{len(found)} rows {heading!r}"
        return found[0][1:]


def charts(text):
    """The drawings of a page by title; those in both scales as a list of two."""
    found = {}
    for source in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        svg = ElementTree.fromstring(source)
        found.setdefault(svg.find(f"{SVG}title").text, []).append(svg)
    return found


def lines(svg):
    """Paths of the curves: class and commands; the legend's samples are left out."""
    paths = [(path.get("class"), path.get("d")) for path in svg.iter(f"{SVG}path")]
    return [(kind, d) for kind, d in paths if kind.startswith("line") and "h18" not in d]


def pixels(path):
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]


def read_back(svg, path, *, log=False):
    """What a reader of the chart reads: pixels turned into values by the labels of the axes."""
    ticks = [text for text in svg.iter(f"{SVG}text") if text.get("class").startswith("tick")]

    def axis(side, coordinate, shift):
        known = [
            (float(text.get(coordinate)) + shift, float(text.text.replace(",", "")))
            for text in ticks
            if side in text.get("class")
        ]
        (start, low), (end, high) = known[0], known[-1]
        if log and side == "end":
            ratio = math.log(high / low) / (end - start)
            return lambda pixel: low * math.exp((pixel - start) * ratio)
        return lambda pixel: low + (pixel - start) * (high - low) / (end - start)

    across, up = axis("middle", "x", 0.0), axis("end", "y", -4.0)
    return [(across(x), up(y)) for x, y in pixels(path)]


def write_metrics(folder, records, tail=""):
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text + tail)


def logged(step, **metrics):
    return {"step": step, "time": 1.0 + step, "kind": "log", "epoch": 0, **metrics}


def validated(step, **metrics):
    return {"step": step, "time": 1.0 + step, "kind": "validation", "epoch": 0, **metrics}


def records_of_run(steps=400):
    for step in range(10, steps + 1, 10):
        yield logged(
            step, loss=4.5 / step, learning_rate=0.001, grad_norm=2.0 / step, tokens=step * 7.5
        )
        if step % 100 == 0:
            yield validated(step, loss=9.0 / step, accuracy=step / (steps + 20))


RESULT = {
    "outcome": "completed",
    "steps": 400,
    "epochs": 12,
    "seconds": 83.456,
    "stop_reason": "max_steps",
    "final": {
        "loss": 0.01125,
        "learning_rate": 0.001,
        "grad_norm": 0.005,
        "tokens": 3000.0,
        "gpu_memory": None,
        "validation_loss": 0.0225123456789,
        "validation_accuracy": 0.9523809523809523,
    },
    "best": {"loss": 0.0225, "accuracy": 300 / 420},
    "exports": {"packed": "exports/packed", "lost": "exports/lost"},
    "error": None,
}
STATUS = {
    "state": "completed",
    "step": 400,
    "total_steps": 400,
    "epoch": 12,
    "metrics": {"loss": 0.5, "validation_accuracy": 0.25},
    "started": 1_760_000_000.0,
    "heartbeat": 1_760_000_090.0,
}


@pytest.fixture
def make_run(tmp_path):
    def make(name="grok", *, folder=None, lr=0.001, result=RESULT, status=STATUS, records=None):
        place = tmp_path / (folder or name)
        place.mkdir()
        config = CONFIG.replace("NAME", json.dumps(name)).replace("LR", str(lr))
        (place / "config.yaml").write_text(config)
        (place / "environment.json").write_text('{"python": "3.11.9", "device": "cpu"}')
        if status is not None:
            (place / "status.json").write_text(json.dumps(status))
        if result is not None:
            (place / "result.json").write_text(json.dumps(result))
        (place / "exports" / "packed").mkdir(parents=True)
        (place / "exports" / "packed" / "weights.bin").write_bytes(b"x" * 1500)
        (place / "exports" / "packed" / "manifest.json").write_bytes(b"{}")
        write_metrics(place, records_of_run() if records is None else records)
        return place

    return make


def drawn(*folders):
    return report_page([read_run(folder) for folder in folders])


# -- one run ------------------------------------------------------------------------------------


def test_the_metrics_shown_are_those_of_result_json(make_run):
    page = Page(drawn(make_run()))
    assert "completed" in page.text
    assert "max_steps" in page.text
    assert page.row("Loss") == ["0.01125", "0.022512", "0.0225", "400"]
    assert page.row("Accuracy") == ["–", "0.95238", "0.71429", "300"]
    assert page.row("Learning rate") == ["0.001", "–", "–", "–"]
    exact = {value for value, _ in page.values}
    assert {"0.0225123456789", "0.9523809523809523", "400", "12", "83.456"} <= exact
    assert ("83.456", "1 min 23 s") in page.values


def test_a_metric_that_was_not_measured_is_a_dash_and_has_no_chart(make_run):
    records = [logged(10, loss=1.0, gpu_memory=None), logged(20, loss=0.5, gpu_memory=None)]
    text = drawn(make_run(records=records))
    page = Page(text)
    assert page.row("Gpu memory") == ["–", "–", "–", "–"]
    assert "Not measured: gpu_memory." in page.text
    assert list(charts(text)) == ["Loss"]
    assert len(charts(text)["Loss"]) == 2


def test_every_metric_has_its_chart_and_every_line_its_name(make_run):
    found = charts(drawn(make_run()))
    assert list(found) == ["Loss", "Accuracy", "Learning rate", "Gradient norm", "Tokens"]
    loss = found["Loss"][0]
    assert loss.get("role") == "img"
    assert "training: from 0.45 at step 10 to 0.01125 at step 400" in loss.get("aria-label")
    assert "validation: from 0.09 at step 100 to 0.0225 at step 400" in loss.get("aria-label")
    texts = [text.text for text in loss.iter(f"{SVG}text")]
    assert {"Loss", "training", "validation", "step", "loss"} <= set(texts)
    assert len(lines(loss)) == 2
    assert len({kind for kind, _ in lines(loss)}) == 2


def test_what_is_read_off_the_axes_is_what_was_logged(make_run):
    found = charts(drawn(make_run()))
    for title, index, log, expected in (
        ("Loss", 0, False, [(step, 4.5 / step) for step in range(10, 401, 10)]),
        ("Loss", 1, True, [(step, 4.5 / step) for step in range(10, 401, 10)]),
        ("Tokens", 0, False, [(step, step * 7.5) for step in range(10, 401, 10)]),
    ):
        svg = found[title][index]
        most = max(true for _, true in expected)
        points = read_back(svg, lines(svg)[0][1], log=log)
        assert [round(step) for step, _ in points] == [step for step, _ in expected]
        for (_, seen), (_, true) in zip(points, expected, strict=True):
            off = abs(math.log(seen / true)) if log else abs(seen - true) / most
            assert off < (0.01 if log else 0.002)


def test_exports_are_listed_with_their_sizes_on_disk(make_run):
    page = Page(drawn(make_run()))
    assert page.row("packed") == ["exports/packed", "1.5 kB"]
    assert ("1502", "1.5 kB") in page.values
    assert page.row("lost") == ["exports/lost", "not found"]


def test_a_path_that_leaves_the_run_folder_is_not_measured(make_run, tmp_path):
    (tmp_path / "outside").write_bytes(b"x" * 77)
    exports = {"up": "../outside", "far": str(tmp_path / "outside")}
    folder = make_run(result={**RESULT, "exports": exports})
    assert [export.size for export in read_run(folder).exports] == [None, None]


def test_configuration_and_environment_stand_in_the_page(make_run):
    page = Page(drawn(make_run()))
    assert "optimizer: {use: adamw, with: {lr: 0.001}}" in page.text
    assert '"python": "3.11.9"' in page.text
    assert page.tags.count("details") == page.tags.count("summary") == 2


def test_the_page_needs_nothing_beside_itself(make_run):
    for text in (drawn(make_run()), drawn(make_run("a"), make_run("b"))):
        rest = text.replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?://|//[a-z]|\bsrc=|url\(|@import|javascript:", rest)
        page = Page(text)
        assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
        assert not [key for _, key, _ in page.attributes if key in {"href", "src", "xlink:href"}]
        assert not [key for _, key, _ in page.attributes if key.startswith("on")]
        assert "prefers-color-scheme:dark" in text


def test_ids_and_groups_of_the_switches_are_apart(make_run):
    page = Page(drawn(make_run()))
    ids = [value for _, key, value in page.attributes if key == "id"]
    assert len(ids) == len(set(ids)) == 6
    assert sorted(value for _, key, value in page.attributes if key == "for") == sorted(ids)
    assert len([key for _, key, _ in page.attributes if key == "checked"]) == 3


def test_markup_in_names_and_values_is_text(make_run):
    evil = "<script>alert(1)</script>\"'&"
    result = {
        **RESULT,
        "stop_reason": evil,
        "error": evil,
        "final": {evil: 1.0},
        "best": {evil: 2.0},
        "exports": {evil: evil},
    }
    records = [logged(1, **{evil: 1.0}), {**logged(2, loss=1.0), "kind": evil}]
    folder = make_run(evil, folder="evil", result=result, records=records)
    (folder / "environment.json").write_text(json.dumps({evil: evil}))
    for text in (drawn(folder), drawn(folder, make_run("calm"))):
        page = Page(text)
        assert "script" not in page.tags
        assert "<script" not in text
        assert page.text.count(evil) >= 6
        assert charts(text)


def test_characters_that_no_file_can_hold_are_replaced(make_run, tmp_path):
    records = [logged(1, **{"a\x00b\ud800c": 1.0})]
    folder = make_run(records=records, result={**RESULT, "stop_reason": "x\x1by"})
    text = drawn(folder)
    assert "A\ufffdb\ufffdc" in charts(text)
    assert text.encode()


# -- what is missing or damaged -----------------------------------------------------------------


def test_nulls_are_gaps_and_a_lone_value_is_a_dot(make_run):
    values = [5.0, 4.0, None, None, 3.0, None, 2.0, 1.0]
    records = [logged(step, tokens=value) for step, value in enumerate(values, start=1)]
    ((_, path),) = lines(charts(drawn(make_run(records=records)))["Tokens"][0])
    pieces = path.split("M")[1:]
    assert [len(pixels("M" + piece)) for piece in pieces] == [2, 1, 2]
    assert [piece.endswith("h0") for piece in pieces] == [False, True, False]


def test_a_torn_last_line_is_told_and_the_others_are_drawn(make_run):
    folder = make_run()
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 410, "kind": "log", "lo')
    text = drawn(folder)
    assert "1 line of metrics.jsonl could not be read; the last one is cut short." in text
    assert len(pixels(lines(charts(text)["Loss"][0])[0][1])) == 40


@pytest.mark.parametrize(
    "line",
    ["[1]", '{"step": 5}', '{"step": 5, "kind": "log", "loss": NaN}', "[" * 99_999, "\ufffd",
     '{"step": 5, "kind": "log", "loss": 1e999}', '{"step": -1, "kind": "log"}',
     '{"step": 1.5, "kind": "log"}'],
)  # fmt: skip
def test_a_line_that_is_no_metrics_line_is_counted(make_run, line):
    folder = make_run(records=[])
    first, last = json.dumps(logged(1, loss=2.0)), json.dumps(logged(9, loss=1.0))
    (folder / "metrics.jsonl").write_text(f"{first}\n{line}\n\n{last}\n")
    data = read_run(folder)
    assert data.curve("loss", "training").points == ((1, 2.0), (9, 1.0))
    assert data.notes == ("1 line of metrics.jsonl could not be read.",)


def test_lines_from_before_a_resume_are_replaced_and_told(make_run):
    records = [
        *(logged(step, loss=1.0) for step in (10, 20, 30)),
        validated(30, loss=1.0),
        *(logged(step, loss=2.0) for step in (20, 30)),
        validated(30, loss=2.0),
        validated(30, loss=3.0),
    ]
    data = read_run(make_run(records=records))
    assert data.curve("loss", "training").points == ((10, 1.0), (20, 2.0), (30, 2.0))
    assert data.curve("loss", "validation").points == ((30, 3.0),)
    assert data.notes[0].startswith("4 lines of metrics.jsonl from before the run went back")


def test_an_unfinished_run_shows_its_latest_metrics_and_says_so(make_run):
    status = {**STATUS, "state": "training", "step": 250}
    page = Page(drawn(make_run(result=None, status=status)))
    assert "result.json is absent: the run has not ended, or was cut off." in page.text
    assert "Not ended; last sign of life: 2025-10-09 08:54:50 UTC" in page.text
    assert "completed" not in page.text
    assert "of 400 planned" in page.text
    assert ("250", "250") in page.values
    assert page.row("Loss") == ["0.5", "–", "–", "–"]
    assert page.row("Metric")[0] == "Training, latest"


def test_the_result_of_an_earlier_session_is_left_aside(make_run):
    data = read_run(make_run(status={**STATUS, "state": "training", "step": 410}))
    assert (data.state, data.steps, data.seconds, data.best) == ("training", 410, None, {})
    assert "result.json is left aside" in data.notes[0]


def test_a_folder_with_a_configuration_only_makes_a_page_without_numbers(make_run):
    folder = make_run(result=None, status=None)
    (folder / "metrics.jsonl").unlink()
    (folder / "environment.json").unlink()
    text = drawn(folder)
    page = Page(text)
    assert page.values == []
    assert charts(text) == {}
    assert "state unknown" in page.text
    for name in ("status.json", "result.json", "environment.json", "metrics.jsonl"):
        assert f"{name} is absent" in page.text


def test_damaged_files_are_told_and_nothing_is_made_up(make_run):
    folder = make_run()
    (folder / "result.json").write_text('{"steps": 4')
    (folder / "environment.json").write_text("[]")
    (folder / "config.yaml").write_text("run: {name: [")
    data = read_run(folder)
    assert data.name == "grok"
    assert [note.split(" could not")[0] for note in data.notes] == [
        "config.yaml",
        "result.json",
        "environment.json",
    ]
    assert Page(drawn(folder)).tags.count("details") == 2


def test_values_of_the_wrong_type_are_no_metrics(make_run):
    result = {
        **RESULT,
        "steps": "many",
        "seconds": True,
        "final": {"loss": "low", "x": [1], "y": True, "z": 10**400},
        "best": [1],
        "exports": [1],
    }
    data = read_run(make_run(result=result))
    assert (data.steps, data.seconds) == (None, None)
    assert (data.final, data.best, data.exports) == ({}, {}, ())


def test_a_configuration_of_aliases_that_never_end_is_compared_in_finite_time(make_run):
    one, two = make_run("one"), make_run("two")
    (one / "config.yaml").write_text("run: {name: one}\nx: &a {y: *a}\n")
    (two / "config.yaml").write_text("run: {name: two}\nx: &a [[*a], *a]\n")
    assert "Settings that differ" in drawn(one, two)


def test_a_failed_run_shows_its_error(make_run):
    result = {**RESULT, "outcome": "failed", "error": "NonFiniteError: loss is NaN"}
    page = Page(drawn(make_run(result=result, status={**STATUS, "state": "failed"})))
    assert "NonFiniteError: loss is NaN" in page.text
    assert ("span", "class", "badge failed") in page.attributes


# -- several runs -------------------------------------------------------------------------------


def test_several_runs_lie_over_each_other_in_one_colour_each(make_run):
    text = drawn(make_run("slow"), make_run("fast", lr=0.01))
    page = Page(text)
    found = charts(text)
    for title, count in (("Loss", 4), ("Accuracy", 2), ("Gradient norm", 2)):
        classes = [kind.split() for kind, _ in lines(found[title][0])]
        assert len(classes) == count
        assert {kind[2] for kind in classes} == {"s0", "s1"}
        names = [text.text for text in found[title][0].iter(f"{SVG}text")]
        assert {"slow", "fast"} <= set(names)
    assert "2 runs compared" in page.text
    assert ["", "slow", "fast"] in page.rows
    assert page.row("Loss, validation") == ["0.022512", "0.022512"]
    assert page.row("Accuracy, step of the best") == ["300", "300"]
    assert page.row("optimizer.with.lr") == ["0.001", "0.01"]
    assert not [row for row in page.rows if row[0] == "run.seed"]


def test_in_a_comparison_what_a_run_did_not_measure_is_a_dash(make_run):
    other = make_run("other", result={**RESULT, "final": {"loss": 0.5}, "best": {}})
    page = Page(drawn(make_run(), other))
    assert page.row("Loss, training") == ["0.01125", "0.5"]
    assert page.row("Accuracy, validation") == ["0.95238", "–"]


def test_runs_of_the_same_name_are_told_apart(make_run):
    one, two = make_run("twin", folder="twin-1"), make_run("twin", folder="twin-2")
    assert ["", "twin-1", "twin-2"] in Page(drawn(one, two)).rows
    assert ["", "twin-1 (1)", "twin-1 (2)"] in Page(drawn(one, one)).rows


def test_more_runs_than_colours_stay_distinct(make_run):
    folders = [make_run(f"run{number}", records=[logged(1, loss=1.0)]) for number in range(10)]
    kinds = [kind for kind, _ in lines(charts(drawn(*folders))["Loss"][0])]
    assert len(kinds) == len(set(kinds)) == 10


# -- large runs ---------------------------------------------------------------------------------


def test_twenty_thousand_lines_stay_below_half_a_megabyte_and_keep_their_extremes(make_run):
    draw = random.Random(0)
    names = ("loss", "learning_rate", "grad_norm", *(f"metric_{n}" for n in range(12)))
    records = [
        logged(step, **{name: draw.random() + 0.5 for name in names}) for step in range(1, 20_001)
    ]
    records[7_777]["metric_3"] = 9.75
    records[13_131]["metric_3"] = -9.25
    text = drawn(make_run(records=records))
    assert len(text.encode()) < 500_000
    svg = charts(text)["Metric 3"][0]
    ((_, path),) = lines(svg)
    seen = [value for _, value in read_back(svg, path)]
    assert max(seen) == pytest.approx(9.75, abs=0.1)
    assert min(seen) == pytest.approx(-9.25, abs=0.1)
    assert 300 < len(seen) <= 600


def test_many_runs_with_many_metrics_stay_below_half_a_megabyte(make_run):
    draw = random.Random(0)
    folders = [
        make_run(
            f"run{number}",
            records=[
                logged(step, loss=draw.random(), **{f"f{n}": draw.random() for n in range(29)})
                for step in range(1, 400)
            ],
        )
        for number in range(6)
    ]
    assert len(drawn(*folders).encode()) < 500_000


@pytest.mark.parametrize("seed", range(5))
def test_decimation_keeps_ends_extremes_and_gaps(seed):
    draw = random.Random(seed)
    points = [(step, draw.gauss(0, 1)) for step in range(5_000)]
    points[2_000:2_100] = [(step, None) for step in range(2_000, 2_100)]
    kept = decimated(points, 600)
    assert len(kept) <= 600
    assert kept == sorted(kept, key=lambda point: point[0])
    assert set(kept) <= set(points)
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    values = [value for _, value in points if value is not None]
    kept_values = [value for _, value in kept if value is not None]
    assert max(kept_values) == max(values)
    assert min(kept_values) == min(values)
    assert any(value is None for step, value in kept if 2_000 <= step < 2_100)
    assert decimated(points[:600], 600) == points[:600]


def test_all_charts_of_a_page_span_the_same_steps(make_run):
    records = [
        *(logged(step, loss=1.0) for step in range(10, 61, 10)),
        validated(60, accuracy=0.5),
        *(logged(step, loss=1.0) for step in range(70, 101, 10)),
    ]
    found = charts(drawn(make_run(records=records)))
    labels = [
        [text.text for text in svgs[0].iter(f"{SVG}text") if text.get("class") == "tick middle"]
        for svgs in found.values()
    ]
    assert len(labels) == 2
    assert labels[0] == labels[1] == ["0", "20", "40", "60", "80", "100"]


def test_few_values_are_marked_each(make_run):
    records = [validated(step, few=1.0 / step) for step in range(1, 4)]
    records += [logged(step, many=1.0 / step) for step in range(1, 200)]
    found = charts(drawn(make_run(records=sorted(records, key=lambda record: record["step"]))))
    marks = {
        title: [path.get("d") for path in svg.iter(f"{SVG}path") if "marks" in path.get("class")]
        for title, (svg,) in found.items()
    }
    assert marks["Many"] == []
    assert [path.count("M") for path in marks["Few"]] == [3]


# -- scales and numbers -------------------------------------------------------------------------


def test_metrics_over_powers_of_ten_begin_on_a_log_scale(make_run):
    def shown_at_first(records, name):
        text = drawn(make_run(folder=name, records=records))
        (box,) = re.findall(r"<input[^>]*checked>", text)
        return "linear" if "linear" in box else "log"

    wide = [logged(step, loss=10.0**-step) for step in range(1, 5)]
    narrow = [logged(step, loss=1.0 / step) for step in range(1, 5)]
    assert shown_at_first(wide, "wide") == "log"
    assert shown_at_first(narrow, "narrow") == "linear"


def test_values_without_a_logarithm_are_gaps_there_and_told(make_run):
    records = [logged(step, loss=value) for step, value in enumerate([1.0, 0.0, 0.5, -1.0, 0.2])]
    text = drawn(make_run(records=records))
    assert "2 values not above 0: gaps on the log scale." in text
    linear, log = charts(text)["Loss"]
    assert len(pixels(lines(linear)[0][1])) == 5
    assert lines(log)[0][1].count("M") == len(pixels(lines(log)[0][1])) == 3


EXTREME = (
    [0.0], [1.0], [-1.0], [1e-3], [5e-324], [1.7e308, -1.7e308], [1e300, 1.0], [0.0, 5e-324],
    [1.0, 1.0 + 1e-12], [1.0, 1.0 + 2.3e-16], [1e15, 1e15 + 0.125],
    [0.999, 0.9991], [1e6, 1e6 + 1], [-3.0, -2.9], [1e-9, 3e-9], [0.2, 1e15],
    [123456.0, 654321.0], [1.0, 2.0, 5.0, 1000.0], [1e-12, 1e12],
)  # fmt: skip


@pytest.mark.parametrize("values", EXTREME, ids=repr)
def test_axes_hold_all_values_between_distinct_labels(values):
    axis = value_axis(values, 300.0, 0.0)
    assert len(axis.ticks) >= 2
    assert len(set(axis.labels)) == len(axis.labels)
    assert all(0.0 <= axis.place(value) <= 300.0 for value in values)
    if max(map(abs, values)) < 1e300:
        slack = 1e-9 * (axis.high - axis.low)
        assert axis.low - slack <= min(values) <= max(values) <= axis.high + slack
    if min(values) > 0:
        log = log_axis(values, 300.0, 0.0)
        assert len(log.ticks) >= 2
        assert len(set(log.labels)) == len(log.labels)
        assert all(0.0 <= log.place(value) <= 300.0 for value in values)


@pytest.mark.parametrize("ratio", [1.02, 1.5, 1.99, 2.0, 3.0, 10.0, 50.0, 1e3, 1e6, 1e12])
def test_a_log_axis_can_be_read_whether_narrow_or_wide(ratio):
    axis = log_axis([0.37, 0.37 * ratio], 190.0, 0.0)
    assert 3 <= len(axis.ticks) <= 9
    assert axis.low <= 0.37
    assert axis.high >= 0.37 * ratio * (1 - 1e-9)
    places = [axis.place(tick) for tick in axis.ticks]
    assert all(below - above >= 10.0 for below, above in pairwise(places))


@pytest.mark.parametrize("steps", [[], [0], [7], [0, 1], [0, 4000], [3990, 4000], [0, 2**53 - 1]])
def test_the_axis_of_steps_has_whole_ticks(steps):
    axis = step_axis(steps, 0.0, 600.0)
    assert 2 <= len(axis.ticks) <= 12
    assert all(tick == int(tick) for tick in axis.ticks)
    assert len(set(axis.labels)) == len(axis.labels)
    assert all(0.0 <= axis.place(step) <= 600.0 for step in steps)


FINITE = strategies.floats(allow_nan=False, allow_infinity=False)


@given(values=strategies.lists(strategies.none() | FINITE, max_size=12), log=strategies.booleans())
@example(values=[1.7e308, -1.7e308], log=True)
@example(values=[5e-324], log=True)
def test_any_finite_values_make_a_drawing(values, log):
    series = Series(label="x", points=list(enumerate(values)))
    svg = ElementTree.fromstring(line_chart([series], title="t", y_label="y", log_y=log))
    for _, path in lines(svg):
        assert all(0 <= x <= 640 and 0 <= y <= 400 for x, y in pixels(path))
        assert len(pixels(path)) == path.count("M") + path.count("L")


def test_numbers_are_written_for_reading():
    numbers = (None, 0.0, 4000, 0.00058507, 1e-5, 16284.3, 1.5e20, -2.25)
    assert [number_text(number) for number in numbers] == [
        "–", "0", "4,000", "0.00058507", "1e-5", "16,284", "1.5e20", "-2.25",
    ]  # fmt: skip
    assert tick_texts([0.0, 0.2, 0.4, 0.6000000000000001]) == ["0", "0.2", "0.4", "0.6"]
    assert tick_texts([0.0, 1_000_000.0, 2_000_000.0]) == ["0", "1M", "2M"]
    assert tick_texts([0.0, 1e-4, 2e-4]) == ["0", "1e-4", "2e-4"]
    assert [duration_text(s) for s in (None, 0.25, 59.5, 60, 3725.4)] == [
        "–", "0.25 s", "59.5 s", "1 min 0 s", "1 h 2 min 5 s",
    ]  # fmt: skip
    assert [size_text(n) for n in (None, 0, 999, 1000, 1_713_000, 5 * 10**15)] == [
        "–", "0 B", "999 B", "1 kB", "1.71 MB", "5e+03 TB",
    ]  # fmt: skip


# -- command and observer -----------------------------------------------------------------------


@pytest.fixture
def app():
    made = typer.Typer()
    made.command()(report)
    return made


def test_the_command_writes_into_the_run_folder_and_prints_the_path(app, make_run):
    folder = make_run()
    done = CliRunner().invoke(app, [str(folder)])
    assert done.exit_code == 0
    assert done.output == f"{folder / 'report.html'}\n"
    assert (folder / "report.html").read_text(encoding="utf-8") == drawn(folder)


def test_the_command_compares_several_runs_in_the_current_folder(
    app, make_run, monkeypatch, tmp_path
):
    one, two = make_run("one"), make_run("two")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["one", "two"])
    assert done.output == "report.html\n"
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == drawn(one, two)
    assert not (one / "report.html").exists()


def test_the_command_writes_where_it_is_told(app, make_run, tmp_path):
    folder, file = make_run(), tmp_path / "page.html"
    assert CliRunner().invoke(app, [str(folder), "--output", str(file)]).exit_code == 0
    assert file.is_file()
    assert not (folder / "report.html").exists()


def test_folders_that_are_no_run_folders_are_all_refused_and_nothing_is_written(
    app, make_run, tmp_path
):
    folder = make_run()
    (tmp_path / "empty").mkdir()
    wrong = [str(tmp_path / "empty"), str(tmp_path / "absent")]
    done = CliRunner().invoke(app, [str(folder), *wrong, "--output", str(tmp_path / "page.html")])
    assert isinstance(done.exception, ConfigError)
    assert done.exception.exit_status == 2
    assert [fault.message for fault in done.exception.faults] == [
        f"{name} is no run folder" for name in wrong
    ]
    assert not list(tmp_path.rglob("*.html"))


def test_a_page_that_cannot_be_written_is_the_users_error(app, make_run, tmp_path):
    file = tmp_path / "page.html"
    file.mkdir()
    done = CliRunner().invoke(app, [str(make_run()), "--output", str(file)])
    assert isinstance(done.exception, ConfigError)
    assert "cannot write the report" in str(done.exception)
    assert not list(tmp_path.rglob(".page*"))


@pytest.mark.skipif(sys.platform == "win32", reason="BROWSER names a POSIX program")
def test_open_shows_the_page_in_the_browser(make_run, tmp_path):
    folder, seen, browser = make_run(), tmp_path / "seen", tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {seen}\n')
    browser.chmod(0o755)
    code = (
        "import typer; from forge_plugins.commands.report import report; app = typer.Typer(); "
        "app.command()(report); app()"
    )
    environment = {"PYTHONPATH": ":".join(sys.path), "BROWSER": f"{browser} %s"}
    forked.run(
        [sys.executable, "-c", code, str(folder), "--open"], env=environment, check=True,
        capture_output=True,
    )  # fmt: skip
    assert seen.read_text().strip() == (folder / "report.html").resolve().as_uri()


def test_the_observer_draws_the_page_at_the_end_of_the_run(make_run):
    folder = make_run()
    run = Run(RunConfig(max_steps=1), folder, OneProcess())
    result = RunResult(outcome="completed", steps=1, epochs=0, seconds=1.0, stop_reason="max_steps")
    plugin = HtmlReport(HtmlReportConfig())
    plugin.on_run_end(run, result)
    assert (folder / "report.html").read_text(encoding="utf-8") == drawn(folder)
    assert not list(folder.glob(".report*"))
    assert (plugin.info.name, plugin.info.kind) == ("html_report", Kind.OBSERVERS)


def test_the_observer_of_a_run_without_a_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run(RunConfig(max_steps=1), None, OneProcess())
    result = RunResult(outcome="completed", steps=1, epochs=0, seconds=1.0, stop_reason="max_steps")
    HtmlReport(HtmlReportConfig()).on_run_end(run, result)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", ["commands.report", "observers.html_report", "reports.page"])
def test_no_part_of_the_report_needs_torch(module):
    code = f"import sys, forge_plugins.{module}; print({{'torch', 'numpy'}} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == "set()"
