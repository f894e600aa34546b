"""The CSV log."""

from __future__ import annotations

import csv
from pathlib import Path

import forge_kernel

TINY = ["run.device=cpu", "run.log_every=2", "run.validate_every=null", "run.save_every=3"]


def run(folder: Path, *settings: str) -> Path:
    pipeline = forge_kernel.load_pipeline("acme_modular", [*TINY, *settings])
    forge_kernel.run(pipeline, output_dir=folder)
    return folder / "metrics.csv"


def test_each_log_interval_is_a_row(tmp_path: Path) -> None:
    with run(tmp_path / "run", "run.max_steps=8").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["step"] for row in rows] == ["2", "4", "6", "8"]
    assert all(float(row["loss"]) > 0 for row in rows)


def test_a_metric_that_the_run_does_not_have_leaves_its_cell_empty(tmp_path: Path) -> None:
    metrics = 'observers[0].with.metrics=["loss", "no_such_metric"]'
    with run(tmp_path / "run", "run.max_steps=2", metrics).open(newline="") as stream:
        assert [row["no_such_metric"] for row in csv.DictReader(stream)] == [""]


def test_a_resumed_run_writes_the_file_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", "run.max_steps=12")
    file = run(tmp_path / "cut", "run.max_steps=7")
    with file.open("a") as stream:
        stream.write("8,0,written after the checkpoint that the run goes on from\n")
    forge_kernel.resume(tmp_path / "cut", ["run.max_steps=12"])
    assert file.read_text() == whole.read_text()
    assert len(whole.read_text().splitlines()) == 7
