"""The halved schedule."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

import forge_kernel


def rates(folder: Path, schedule: str) -> list[float]:
    """The learning rate at each step, as the CSV log of a run tells it."""
    settings = ["run.device=cpu", "run.max_steps=4", "run.validate_every=null", "run.log_every=1"]
    pipeline = forge_kernel.load_pipeline("acme_modular", [*settings, f"schedule={schedule}"])
    forge_kernel.run(pipeline, output_dir=folder)
    with (folder / "metrics.csv").open(newline="") as stream:
        return [float(row["learning_rate"]) for row in csv.DictReader(stream)]


def test_it_halves_a_constant_rate_when_it_is_told_nothing(tmp_path: Path) -> None:
    assert rates(tmp_path / "run", "{use: acme_half}") == pytest.approx([0.005] * 4)


def test_it_halves_itself(tmp_path: Path) -> None:
    warmup = "{use: linear_warmup, with: {warmup_steps: 4}}"
    twice = (
        f"{{use: acme_half, with: {{schedule: {{use: acme_half, with: {{schedule: {warmup}}}}}}}}}"
    )
    found = rates(tmp_path / "run", twice)
    assert found == pytest.approx([0.01 * step / 4 / 4 for step in (1, 2, 3, 4)])
