"""A run in a notebook: drawn in place, by a real kernel; elsewhere nothing of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from clients import need

from forge_plugins.observers.notebook_view import POINTS, Curve, in_notebook

CELLS = (
    """
import torch
from torch import nn
from forge_kernel import fit
inputs = torch.randn(300, 8)
targets = (inputs[:, 0] > inputs[:, 1]).long()
result = fit(nn.Linear(8, 2), (inputs, targets), quantizer="bitnet", steps=60)
result""",
    "result.plot('loss')",
    "fit(nn.Linear(7, 2), (inputs, targets), steps=6)",
    "result = fit(nn.Linear(8, 2), (inputs, targets), steps=2); result.folder.name",
)


def test_a_long_curve_stays_small_and_keeps_its_ends_in_sight() -> None:
    curve = Curve()
    assert curve.svg("loss") == ""
    for step in range(100_000):
        curve.add(step, 1.0 / (1 + step))
    drawn = curve.svg("loss")
    points = re.search(r'points="([^"]*)"', drawn)
    assert points is not None
    assert POINTS <= len(points[1].split()) < 2 * POINTS
    assert "loss from 1 to " in drawn
    assert not in_notebook()


@pytest.mark.deep
def test_a_cell_shows_one_bar_the_report_and_no_lines_for_programs(
    tmp_path: Path, monkeypatch: Any
) -> None:
    """Planted: the bar anew with each drawing; JSON lines beside it; a second run that is mute."""
    need("nbclient", "nbformat", "ipykernel")
    import nbclient
    import nbformat

    monkeypatch.chdir(tmp_path)
    cells = [nbformat.v4.new_code_cell(text) for text in CELLS]
    book = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(book, timeout=300, kernel_name="python3", allow_errors=True).execute()
    first, second, third, fourth = (cell.outputs for cell in book.cells)
    bar, report = (output["data"]["text/html"] for output in first)
    assert "step 60 of 60" in bar
    assert "steps/s" in bar
    assert "validation: loss" in bar
    assert "weights" in bar, "what the quantizer told"
    assert "<svg" in bar
    assert "srcdoc" in report
    assert "<svg" in second[0]["data"]["text/html"] or "&lt;svg" in second[0]["data"]["text/html"]
    assert third[-1]["output_type"] == "error"
    assert not any('{"event"' in output.get("text", "") for output in (*first, *third, *fourth))
    assert "step 2 of 2" in fourth[0]["data"]["text/html"]
