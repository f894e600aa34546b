"""Runs that differ in their seed alone: one line with a band, one column with a range."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_runs import charts, folder_of, logged, of_class, points, validated

from forge_plugins.reports.chart import Series, line_chart, thinned
from forge_plugins.reports.comparison import run_names
from forge_plugins.reports.page import report_page
from forge_plugins.reports.run_data import read_run
from forge_plugins.reports.seeds import groups_of, median_and_spread


def seeds(tmp_path: Path, name: str, values: list[float], **options: Any) -> list[Any]:
    """Runs of one configuration whose loss is the value at each step."""
    found = []
    for seed, value in enumerate(values):
        records = [logged(step, loss=value / step) for step in (10, 20, 30)]
        records.append(validated(30, accuracy=value / 10))
        final = {"loss": value / 30, "memory_bytes": 1e6 * value}
        place = tmp_path / f"{name}-{seed}"
        options_ = {"final": final, "best": {"accuracy": value / 10}, "seconds": value, **options}
        found.append(read_run(folder_of(place, records, name=name, seed=seed, **options_)))
    return found


def test_the_line_is_the_median_and_the_band_the_range(tmp_path: Path) -> None:
    """Red when the mean is drawn, or each seed as a line of its own."""
    runs = seeds(tmp_path, "mine", [4.0, 1.0, 2.0])
    found = charts(report_page(runs))
    linear, _ = found["Loss"]
    [band] = of_class(linear, "path", "spread")
    lines = [one for one in of_class(linear, "path", "line", "s0") if "h18" not in one.get("d")]
    [(_, start), *_] = points(lines[0].get("d"))
    edge = points(band.get("d"))
    assert len(lines) == 1
    high, low = edge[0][1], edge[-1][1]
    ticks = {
        float(text.text): float(text.get("y")) - 4
        for text in of_class(linear, "text", "tick", "end")
    }
    bottom = ticks[0.0]
    assert (bottom - start) / (bottom - high) == pytest.approx(0.5, abs=0.01)  # 2 of 4
    assert (bottom - low) / (bottom - high) == pytest.approx(0.25, abs=0.01)  # 1 of 4
    assert "mine (3 seeds)" in [text.text for text in of_class(linear, "text", "entry")]
    assert "(there from 0.033333 to 0.13333)" in linear.get("aria-label")


def test_the_table_has_one_column_with_median_and_range(tmp_path: Path) -> None:
    text = report_page(
        [*seeds(tmp_path, "mine", [4.0, 1.0, 2.0]), *seeds(tmp_path, "other", [3.0], lr=1.0)]
    )
    heads = re.findall(r'class="run-name">([^<]*)<', text)
    assert heads[:2] == ["mine (3 seeds)", "other"]

    def cells(heading: str) -> list[str]:
        [row] = re.findall(rf"<tr><th[^>]*>{re.escape(heading)}</th>(.*?)</tr>", text)
        return [re.sub("<[^>]*>", " ", cell).split() for cell in re.findall("<td.*?</td>", row)]  # type: ignore[misc]

    assert cells("Loss, training") == [["0.066667", "0.033333", "to", "0.13333"], ["0.1"]]
    assert cells("Accuracy, best validation") == [["0.2", "0.1", "to", "0.4"], ["0.3"]]
    assert cells("Duration") == [["2", "s", "1", "s", "to", "4", "s"], ["3", "s"]]
    assert cells("Memory, this process, training")[0] == ["2", "MB", "1", "MB", "to", "4", "MB"]
    assert cells("Steps") == [["100"], ["100"]]
    assert cells("run.seed") == [["0,", "1,", "2"], ["0"]]
    assert [row for row in ("mine-0", "mine-1", "mine-2") if f">{row}</th>" in text] == [
        "mine-0", "mine-1", "mine-2",
    ]  # fmt: skip


def test_seeds_that_lack_a_metric_are_counted(tmp_path: Path) -> None:
    runs = seeds(tmp_path, "mine", [4.0, 2.0])
    records = [logged(10, loss=3.0)]
    runs.append(read_run(folder_of(tmp_path / "cut", records, name="mine", seed=7, state="failed")))
    text = report_page(runs)
    assert "0.066667 to 0.13333, 1 without" in re.sub("<[^>]*>", "", text)
    assert re.search(r"completed</span> × 2 <span[^>]*>failed</span> × 1", text)


@pytest.mark.parametrize("change", ["lr", "name", "seed", "unreadable"])
def test_what_differs_in_more_than_the_seed_stands_apart(tmp_path: Path, change: str) -> None:
    """Red when runs are taken together by their name."""
    records = [logged(10, loss=1.0)]
    options: list[dict[str, Any]] = [{"seed": 0}, {"seed": 1}]
    if change == "lr":
        options[1]["lr"] = 0.5
    elif change == "name":
        options[1]["name"] = "other"
    elif change == "seed":
        options[1]["seed"] = 0
    folders = [
        folder_of(tmp_path / str(number), records, **chosen)
        for number, chosen in enumerate(options)
    ]
    if change == "unreadable":
        for folder in folders:
            (folder / "config.yaml").write_text("run: [")
    runs = [read_run(folder) for folder in folders]
    groups = groups_of(runs, run_names(runs))
    assert [group.several for group in groups] == [False, False]
    assert [group.name for group in groups] == run_names(runs)


def test_groups_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [
        *seeds(tmp_path / "a", "mine", [1.0, 2.0]),
        *seeds(tmp_path / "b", "mine", [1.0, 2.0], lr=0.5),
    ]
    names = [group.name for group in groups_of(runs, run_names(runs))]
    assert len(set(names)) == 2
    assert all(name.startswith("mine from ") and name.endswith("(2 seeds)") for name in names)


def test_runs_that_end_early_or_log_elsewhere_do_not_make_the_line_jump() -> None:
    """At 30 and 40 only the longer ones are left; 15 is logged by one of three."""
    curves = [
        [(10, 1.0), (20, 2.0)],
        [(10, 3.0), (15, 99.0), (20, 4.0), (30, 5.0), (40, 6.0)],
        [(10, 5.0), (20, None), (30, 7.0), (40, 8.0)],
    ]
    median, spread = median_and_spread(curves)
    assert median == [(10, 3.0), (20, 3.0), (30, 6.0), (40, 7.0)]
    assert spread == [(10, 1.0, 5.0), (20, 2.0, 4.0), (30, 5.0, 7.0), (40, 6.0, 8.0)]
    assert median_and_spread([[(1, None)], [(1, None)]]) == ([(1, None)], [])
    assert median_and_spread([]) == ([], [])


NUMBERS = st.floats(-1e6, 1e6)


@given(
    st.lists(st.tuples(NUMBERS, NUMBERS).map(sorted), min_size=1, max_size=300),
    st.integers(4, 60),
)
def test_a_thinned_band_keeps_its_outline_and_invents_nothing(
    ranges: list[list[float]], most: int
) -> None:
    spread = [(step, low, high) for step, (low, high) in enumerate(ranges)]
    kept = thinned(spread, most)
    assert set(kept) <= set(spread)
    assert len(kept) <= max(most, 4)
    assert (kept[0], kept[-1]) == (spread[0], spread[-1])
    assert min(low for _, low, _ in kept) == min(low for _, low, _ in spread)
    assert max(high for _, _, high in kept) == max(high for _, _, high in spread)


def test_on_a_log_scale_a_band_that_reaches_zero_ends_at_the_edge() -> None:
    series = Series(label="x", points=[(1, 1.0), (2, 0.5)], spread=[(1, 0.0, 2.0), (2, 0.1, 1.0)])
    svg = charts(line_chart([series], title="t", y_label="y", log_y=True))["t"][0]
    [band] = of_class(svg, "path", "spread")
    axis = max(
        y for text in of_class(svg, "text", "tick", "end") for y in [float(text.get("y")) - 4]
    )
    assert max(y for _, y in points(band.get("d"))) == pytest.approx(axis, abs=0.2)
