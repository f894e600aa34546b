"""Levels of quantized weights in the report: bars, areas, a row for each layer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from report_runs import charts, folder_of, logged, of_class, points

from forge_kernel.planning.pipeline_file import load_pipeline
from forge_kernel.runner import run
from forge_plugins.reports.page import report_page
from forge_plugins.reports.run_data import read_run
from forge_plugins.reports.weight_histogram import level_fractions

TERNARY = [
    logged(10, loss=1.0, **{"level_-1": 0.5, "level_0": 0.3, "level_1": 0.2}),
    logged(20, loss=0.5, **{"level_-1": 0.4, "level_0": None, "level_1": 0.2}),
    logged(30, loss=0.4, **{"level_-1": 0.25, "level_0": 0.5, "level_1": 0.25}),
]


def test_the_bars_are_the_shares_of_the_last_line_and_the_marks_those_of_the_first(
    tmp_path: Path,
) -> None:
    text = report_page([read_run(folder_of(tmp_path / "run", TERNARY))])
    [svg] = charts(text)["Levels of the weights"]
    bars = of_class(svg, "rect", "level")
    heights = [float(bar.get("height")) for bar in bars]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2)
    assert heights[2] == pytest.approx(heights[0], abs=0.2)
    kinds = [bar.get("class").split()[1] for bar in bars]
    assert kinds == ["negative", "zero", "positive"]
    labels = [one.text for one in of_class(svg, "text", "tick", "middle")]
    assert labels == ["-1: 25.0%", "0: 50.0%", "1: 25.0%"]
    told = [bar[0].text for bar in bars]
    assert told[1] == "level 0: 50.00%, at step 10 30.00%"
    bottom = float(bars[0].get("y")) + heights[0]
    marks = [points(path.get("d"))[0][1] for path in of_class(svg, "path", "before")[1:]]
    unit = heights[0] / 0.25
    assert [(bottom - y) / unit for y in marks] == pytest.approx([0.5, 0.3, 0.2], abs=0.01)


def test_the_areas_stand_upon_each_other_where_all_levels_were_measured(tmp_path: Path) -> None:
    """Red when a level that was not measured counts as none."""
    data = read_run(folder_of(tmp_path / "run", TERNARY))
    assert list(level_fractions(data)[""]) == [10, 30]
    [svg] = charts(report_page([data]))["Levels over the steps"]
    areas = [points(area.get("d")) for area in of_class(svg, "path", "level")]
    assert [len(area) for area in areas] == [4, 4, 4]
    (_, low), (_, end) = areas[0][:2], areas[0][2]
    del low, end
    upper = [[y for _, y in area[:2]] for area in areas]
    base = areas[0][-1][1]
    whole = base - upper[-1][0]
    shares = [[(base - y) / whole for y in edge] for edge in upper]
    assert shares[0] == pytest.approx([0.5, 0.25], abs=0.01)
    assert shares[1] == pytest.approx([0.8, 0.75], abs=0.01)
    assert shares[2] == pytest.approx([1.0, 1.0], abs=0.01)


def test_levels_have_no_line_charts_of_their_own_in_the_report_of_one_run(tmp_path: Path) -> None:
    text = report_page([read_run(folder_of(tmp_path / "run", TERNARY))])
    assert not [title for title in charts(text) if re.fullmatch(r"Level -?\d+", title)]
    assert "<h2>Quantized weights</h2>" in text


def test_in_a_comparison_each_level_is_a_line_for_each_run(tmp_path: Path) -> None:
    one = read_run(folder_of(tmp_path / "one", TERNARY, name="one"))
    two = read_run(folder_of(tmp_path / "two", TERNARY, name="two"))
    found = charts(report_page([one, two]))
    assert {"Level -1", "Level 0", "Level 1"} <= set(found)
    assert "Levels of the weights" not in found


def test_a_grid_of_many_levels_is_coloured_by_sign_and_strength(tmp_path: Path) -> None:
    shares = {f"level_{level}": 1 / 15 for level in range(-119, 120, 17)}
    records = [logged(1, loss=1.0, **shares), logged(2, loss=1.0, **shares)]
    found = charts(report_page([read_run(folder_of(tmp_path / "run", records))]))
    [svg] = found["Levels of the weights"]
    bars = of_class(svg, "rect", "level")
    strengths = [float(bar.get("fill-opacity")) for bar in bars]
    assert len(bars) == 15
    assert strengths[0] == strengths[-1] > strengths[6] == strengths[8]
    labels = [text.text for text in of_class(svg, "text", "tick", "middle")]
    assert labels == [str(level) for level in range(-119, 120, 17)]


def test_a_run_without_levels_has_no_such_section(tmp_path: Path) -> None:
    text = report_page([read_run(folder_of(tmp_path / "run", [logged(1, loss=1.0)]))])
    assert "Quantized weights" not in text
    assert "Levels" not in "".join(charts(text))


@pytest.mark.spec("D18", "H17")
def test_a_real_run_with_metrics_of_layers_draws_a_row_for_each(tmp_path: Path) -> None:
    settings = ["run.max_steps=6", "run.log_every=2", "quantizer.with.metrics=layers"]
    run(load_pipeline("smoke", settings), output_dir=tmp_path / "run", quiet=True)
    text = (tmp_path / "run/report.html").read_text()
    found = charts(text)
    [rows] = found["Levels of each layer"]
    names = [one.text for one in of_class(rows, "text", "entry", "end")]
    assert names == ["layers.0", "layers.3"]
    pieces = of_class(rows, "rect", "level")
    assert len(pieces) == 3 + 2 * 3  # samples of the colours, then the rows
    widths = [float(piece.get("width")) for piece in pieces[3:]]
    assert sum(widths[:3]) == pytest.approx(sum(widths[3:]), abs=0.5)
    parts = found["Weights that are zero, share, parts"][0]
    assert {"layers.0", "layers.3"} <= {one.text for one in of_class(parts, "text", "entry")}
    for title in ("Weights that changed level, share", "Levels over the steps", "Learning rate"):
        assert title in found
