"""Run folders that earlier versions wrote go on, and are exported, as they would have been."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from forge_kernel import resume
from forge_kernel.runner import export

GOLDEN = Path(__file__).parent.parent / "golden"
CONTINUED = {"run-0.1.0-a": 3.1603357791900635}
"""Validation losses after four more steps, by the version that wrote the folder."""


@pytest.mark.parametrize("name", CONTINUED)
def test_a_run_of_an_earlier_version_is_resumed_and_exported(tmp_path: Path, name: str) -> None:
    """Its filters, averages, schedule and early stopping go on; settings are where they are today."""
    folder = tmp_path / name
    shutil.copytree(GOLDEN / name, folder)
    assert export(folder, "state_dict")
    result = resume(folder, ["run.max_steps=8"], quiet=True)
    assert result.steps == 8
    assert result.final["validation_loss"] == pytest.approx(CONTINUED[name], rel=1e-6)
    assert "ignore_index: 3" in (folder / "config.yaml").read_text()
