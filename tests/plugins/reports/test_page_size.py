"""However long a run is and whatever it logs, its page stays below half a megabyte."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from report_runs import charts, folder_of, logged, validated

from forge_plugins.reports.page import report_page
from forge_plugins.reports.run_data import read_run

HALF_A_MEGABYTE = 500_000


def told(step: int, number: int) -> dict[str, Any]:
    facts = {"capability": f"capability number {number % 7}"}
    name = "capability_acquired" if number % 2 else "capability_lost"
    return {
        "step": step, "time": 1.0, "kind": "event", "epoch": 0, "event": name,
        "message": f"The capability number {number % 7} is acquired or lost: " + 60 * "x",
        "facts": facts,
    }  # fmt: skip


def big(layers: int, lines: int, draw: random.Random) -> list[dict[str, Any]]:
    """What a quantized network of many layers logs with all its metrics."""
    metrics = ["weight_sparsity", "weight_flips", "latent_std", "latent_mean", "latent_kurtosis"]
    metrics += ["quantization_error", *(f"level_{level}" for level in range(-7, 8))]
    names = [
        f"{name}/blocks.{layer}.attention.query" for layer in range(layers) for name in metrics
    ]
    names += [*metrics, *(f"retention/c{n}" for n in range(9)), *(f"other_{n}" for n in range(40))]
    records: list[dict[str, Any]] = []
    for line in range(1, lines + 1):
        values = {name: draw.random() for name in names}
        records.append(logged(10 * line, loss=draw.random() + 0.1, learning_rate=1e-3, **values))
        if line % 5 == 0:
            records.append(validated(10 * line, loss=draw.random(), accuracy=draw.random()))
            records.append(told(10 * line, line))
    return records


@pytest.mark.parametrize(("layers", "lines"), [(0, 2000), (28, 300)])
def test_a_network_of_many_layers_stays_below(tmp_path: Path, layers: int, lines: int) -> None:
    """Red when each layer's metric has a chart of its own, or marks stand in each chart for ever."""
    records = big(layers, lines, random.Random(0))
    last = next(one for one in reversed(records) if one["kind"] == "log")
    final = {name: value for name, value in last.items() if isinstance(value, float)}
    folder = folder_of(tmp_path / "run", records, final=final)
    (folder / "config.yaml").write_text("forge: 1\nrun: {name: big}\nx-notes: " + 200_000 * "y")
    text = report_page([read_run(folder)])
    assert len(text.encode()) < HALF_A_MEGABYTE
    found = charts(text)
    assert {"Loss", "Accuracy", "Levels of the weights", "Retention, parts"} <= set(found)
    if layers:
        assert "4 further lines are not drawn." in text


def test_more_metrics_than_a_page_holds_are_counted(tmp_path: Path) -> None:
    draw = random.Random(1)
    records = [
        logged(step, loss=1.0, **{f"figure_{n:03}": draw.random() for n in range(400)})
        for step in range(1, 60)
    ]
    text = report_page([read_run(folder_of(tmp_path / "run", records))])
    assert len(text.encode()) < HALF_A_MEGABYTE
    drawn = len(charts(text))
    assert f"{401 - drawn:,} further metrics are not drawn: metrics.jsonl has them." in text


def test_twenty_runs_that_have_nothing_in_common_stay_below(tmp_path: Path) -> None:
    draw = random.Random(4)
    runs = []
    for number in range(20):
        names = [f"own_{number}_{n}" for n in range(12)] + [f"f{n}" for n in range(20)]
        records = [
            logged(step, loss=draw.random(), **{name: draw.random() for name in names})
            for step in range(1, 100)
        ]
        final = {name: draw.random() for name in names}
        place = tmp_path / str(number)
        runs.append(read_run(folder_of(place, records, name=f"run-{number}", final=final)))
    assert len(report_page(runs).encode()) < HALF_A_MEGABYTE


def test_many_seeds_of_many_configurations_stay_below(tmp_path: Path) -> None:
    draw = random.Random(2)
    runs = []
    for lr in (0.1, 0.2, 0.3, 0.4):
        for seed in range(5):
            records = [
                logged(
                    step, loss=draw.random() + 0.1, **{f"f{n}": draw.random() for n in range(25)}
                )
                for step in range(1, 500)
            ]
            records += [validated(499, accuracy=0.5)]
            place = tmp_path / f"{lr}-{seed}"
            final = {name: draw.random() for name in ("loss", *(f"f{n}" for n in range(25)))}
            runs.append(read_run(folder_of(place, records, lr=lr, seed=seed, final=final)))
    text = report_page(runs)
    assert len(text.encode()) < HALF_A_MEGABYTE
    assert text.count("(5 seeds)") > 4


def test_a_hundred_thousand_lines_are_drawn_with_their_extremes(tmp_path: Path) -> None:
    draw = random.Random(3)
    folder = folder_of(tmp_path / "run", [])
    with (folder / "metrics.jsonl").open("w") as stream:
        for step in range(1, 100_001):
            loss = 50.0 if step == 77_777 else draw.random() + 0.5
            stream.write(json.dumps(logged(step, loss=loss)) + "\n")
    text = report_page([read_run(folder)])
    assert len(text.encode()) < HALF_A_MEGABYTE
    linear, _ = charts(text)["Loss"]
    assert [label.text for label in linear.iter() if label.get("class") == "tick end"][-1] == "50"
