"""Which class was answered for which: counted in a validation, written, and shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from forge_kernel import load_run, run
from forge_kernel.planning.pipeline_file import load_pipeline
from forge_plugins.mathematics.metrics.classification import confusion_counts
from forge_plugins.reports.confusion import classes_cards, confusion_of
from forge_plugins.reports.page import report_page
from forge_plugins.reports.run_data import read_run
from forge_plugins.validators.classification import RECORD

PLAIN = ("run.max_steps=8", "run.validate_every=4", "observers=[{use: metrics_jsonl}]",
         "callbacks=null", "exporters=null")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on three classes, of which some targets count for nothing."""
    place = tmp_path_factory.mktemp("classes")
    draws = np.random.default_rng(0)
    targets = draws.integers(0, 3, 300)
    inputs = (np.eye(3)[targets] + draws.normal(size=(300, 3)) * 0.5).astype(np.float32)
    targets[::9] = -100
    np.savez(place / "data.npz", input=inputs, target=targets)
    settings = [f"data={{use: file, with: {{path: {place / 'data.npz'}, classes: 3}}}}", *PLAIN]
    run(load_pipeline("smoke", settings), output_dir=place / "run", quiet=True)
    return place / "run"


def test_the_last_validation_is_counted_by_target_and_answer(folder: Path) -> None:
    """Planted: answers by rows; ignored targets counted; the first validation's counts."""
    written = json.loads((folder / "confusion.json").read_text())
    jsonschema.validate(written, RECORD)
    assert written["step"] == 8
    assert written["labels"] is None
    from forge_kernel.runner import restored

    counts = torch.zeros(3, 3, dtype=torch.float64)
    model = load_run(folder).model
    with restored(folder, ["observers=null", "exporters=null"]) as session:
        for batch in session.run.data.validation():
            answers = model(batch.inputs).argmax(-1)
            for target, answer in zip(batch.targets.tolist(), answers.tolist(), strict=True):
                if target >= 0:
                    counts[target, answer] += 1
    assert written["counts"] == counts.tolist()
    assert float(counts.sum() - counts.trace()) > 0, "all was right: nothing is tested"


def test_weights_count_and_what_is_no_class_does_not() -> None:
    logits = torch.eye(3)[[0, 1, 1, 2]]
    counts = confusion_counts(
        logits, torch.tensor([0, 0, -100, 7]), torch.tensor([2.0, 0.5, 1.0, 1.0])
    )
    assert counts.tolist() == [[2.0, 0.5, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("most", [0, 2])
def test_of_more_classes_than_wanted_nothing_is_written(tmp_path: Path, most: int) -> None:
    setting = f"validators=[{{use: classification, with: {{confusion_classes: {most}}}}}]"
    run(load_pipeline("smoke", [*PLAIN, setting]), output_dir=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run/confusion.json").exists()


def test_the_report_shows_each_class_and_the_matrix(folder: Path) -> None:
    page = report_page([read_run(folder)])
    assert "Classes, validation at step 8" in page
    assert "Confusion matrix" in page
    data = {"step": 3, "labels": ["<b>", "y", "z"], "counts": [[8, 2, 0], [1, 3, 0], [0, 0, 0]]}
    cards = classes_cards(confusion_of(data))
    assert "<b>" not in cards
    assert "&lt;b&gt;" in cards
    rows = cards.split("Confusion matrix")[0].split("<tr>")
    (first,) = (row for row in rows if ">y<" in row and "%" in row)
    assert "75.0 %" in first
    assert "60.0 %" in first
    (second,) = (row for row in rows if "&lt;b&gt;</th>" in row and "%" in row and "80.0" in row)
    assert "88.9 %" in second
    assert "y (2)" in second
    assert cards.index(">y<") < cards.index("80.0 %"), "what is found least stands first"


WRONG: list[Any] = [
    None, {}, {"counts": []}, {"counts": [[1, 2]]}, {"counts": [[1, -2], [0, 1]]}, {"counts": "x"},
    {"counts": [[1, "a"], [0, 1]]}, {"counts": [[True, 1], [1, 1]]}, {"counts": [[1]] * 2000},
]  # fmt: skip


@pytest.mark.parametrize("data", WRONG)
def test_a_table_that_is_none_shows_nothing(data: Any) -> None:
    assert classes_cards(confusion_of(data)) == ""
