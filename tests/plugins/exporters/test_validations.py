"""All validations as one file: strict JSON that follows its schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from kernel_parts import StopAfter

from forge_kernel.errors import PlanError, PluginError
from forge_kernel.planning.pipeline_file import load_pipeline
from forge_kernel.planning.plan import plan
from forge_kernel.runner import export, resume, run
from forge_plugins.exporters.validations import best_of, validations_in

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = [
    "run.max_steps=8", "run.validate_every=2", "run.save_every=3",
    "exporters=[{use: validations}]", "callbacks=[]",
]  # fmt: skip


def read(folder: Path) -> dict[str, Any]:
    text = (folder / "exports/validations/validations.json").read_text()
    data = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    file = ROOT / "schemas/exporters/validations.validations.json"
    jsonschema.validate(data, json.loads(file.read_text()))
    return data  # type: ignore[no-any-return]


@pytest.mark.spec("H12", "K13")
def test_the_file_has_every_validation_and_the_best_of_each_metric(tmp_path: Path) -> None:
    result = run(load_pipeline("smoke", SETTINGS), output_dir=tmp_path / "run", quiet=True)
    data = read(tmp_path / "run")
    assert (data["run"], data["steps"]) == ("smoke", 8)
    assert [one["step"] for one in data["validations"]] == [2, 4, 6, 8]
    assert {name: best["value"] for name, best in data["best"].items()} == result.best
    accuracy = data["best"]["accuracy"]
    assert accuracy["goal"] == "max"
    [at] = [one for one in data["validations"] if one["step"] == accuracy["step"]]
    assert at["metrics"]["accuracy"] == accuracy["value"]


def test_a_resumed_run_has_those_from_before_and_each_once(tmp_path: Path) -> None:
    stop = StopAfter(5)
    declared = load_pipeline("smoke", SETTINGS)
    run(declared, output_dir=tmp_path / "run", plugins=[stop], cancel=stop, quiet=True)
    resume(tmp_path / "run", plugins=[StopAfter(99)], quiet=True)
    assert [one["step"] for one in read(tmp_path / "run")["validations"]] == [2, 4, 6, 8]


def test_a_finished_run_is_exported_later(tmp_path: Path) -> None:
    declared = load_pipeline("smoke", [*SETTINGS, "exporters=[]"])
    run(declared, output_dir=tmp_path / "run", quiet=True)
    export(tmp_path / "run", "validations")
    data = read(tmp_path / "run")
    assert [one["step"] for one in data["validations"]] == [2, 4, 6, 8]
    assert data["best"]["accuracy"]["goal"] == "max"


def test_without_the_metrics_file_the_run_is_refused_when_it_is_planned() -> None:
    with pytest.raises(PlanError, match=r"validations needs the file metrics\.jsonl"):
        plan(load_pipeline("smoke", [*SETTINGS, "observers=[]"]))


def test_a_metrics_file_that_is_damaged_is_told(tmp_path: Path) -> None:
    run(load_pipeline("smoke", SETTINGS), output_dir=tmp_path / "run", quiet=True)
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1')
    with pytest.raises(PluginError, match=r"cannot read .*metrics\.jsonl"):
        export(tmp_path / "run", "validations")


def test_what_no_number_was_is_null_and_never_the_best() -> None:
    lines = [
        '{"step": 1, "time": 1.0, "kind": "validation", "epoch": 0, "f": null}',
        '{"step": 1, "time": 1.0, "kind": "log", "epoch": 0, "f": 9.0}',
        '{"step": 3, "time": 2.0, "kind": "validation", "epoch": 0, "f": 5.0, "g": 1.0}',
        '{"step": 2, "time": 3.0, "kind": "validation", "epoch": 0, "f": 2.0, "g": 3.0}',
        '{"step": 2, "time": 4.0, "kind": "validation", "epoch": 0, "f": 2.5, "g": 4.0}',
        '{"step": 5, "time": 5.0, "kind": "validation", "epoch": 0, "f": 2.5, "g": 4.0}',
    ]
    history = validations_in(lines)
    assert [(one["step"], one["time"]) for one in history] == [(1, 1.0), (2, 4.0), (5, 5.0)]
    assert best_of(history, {"g": "max"}.get) == {
        "f": {"value": 2.5, "step": 2, "goal": "min"},
        "g": {"value": 4.0, "step": 2, "goal": "max"},
    }
