"""Going on from a trained model: as a teacher, or as the weights to begin with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from forge_kernel import RunResult, load_pipeline, run
from forge_kernel.api import trained_model
from forge_kernel.errors import ConfigError, PluginError
from forge_kernel.runner import resume
from forge_plugins.mathematics.losses.distillation import distillation

BASE = ["run.max_steps=60", "run.save_every=20", "run.device=cpu", "callbacks=[]", "exporters=[]"]


def train(folder: Path, *settings: str) -> RunResult:
    return run(load_pipeline("digits_npy", [*BASE, *settings]), output_dir=folder, quiet=True)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return train(tmp_path_factory.mktemp("teacher") / "run", "quantizer=null", "run.max_steps=200")


def distilled(folder: Path, teacher: RunResult, *settings: str) -> RunResult:
    return train(
        folder, f"loss={{use: distillation, with: {{teacher: '{teacher.folder}'}}}}",
        "run.log_every=1", *settings,
    )  # fmt: skip


def logged(result: RunResult, name: str) -> list[float]:
    assert result.folder is not None
    lines = (result.folder / "metrics.jsonl").read_text().splitlines()
    records: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return [one[name] for one in records if one.get("kind") == "log" and name in one]


@pytest.mark.spec("E10", "F13")
def test_the_divergence_is_torchs_times_the_temperature_squared() -> None:
    torch.manual_seed(0)
    student, other = torch.randn(6, 5), torch.randn(6, 5)
    expected = 9.0 * functional.kl_div(
        (student / 3).log_softmax(1), (other / 3).softmax(1), reduction="batchmean"
    )
    torch.testing.assert_close(distillation(student, other, 3.0), expected)


@pytest.mark.spec("E10", "F13")
def test_a_student_that_learns_from_the_teacher_alone_comes_to_answer_like_it(
    teacher: RunResult, tmp_path: Path
) -> None:
    # Planted: `weight` left out: the divergence stays where it was.
    result = distilled(
        tmp_path / "run", teacher, "loss.with.target_weight=0", "run.max_steps=200",
        "loss.with.weight=1.0",
    )  # fmt: skip
    told = logged(result, "distillation")
    assert told[-1] < 0.1 * told[0]
    assert float(result.final["validation_accuracy"] or 0) > 0.8
    assert teacher.model is not None
    assert result.model is not None
    torch.manual_seed(0)
    inputs = torch.rand(64, 64) * 16
    agree = (result.model(inputs).argmax(1) == teacher.model(inputs).argmax(1)).float().mean()
    assert float(agree) > 0.5  # ten classes, inputs that neither has seen


def test_hidden_layers_come_close_and_validation_tells_the_plain_loss(
    teacher: RunResult, tmp_path: Path
) -> None:
    result = distilled(
        tmp_path / "run", teacher, "quantizer=null", "loss.with.hidden=['layers.0']",
        "loss.with.hidden_weight=5.0",
    )  # fmt: skip
    apart = logged(result, "hidden_distance")
    assert apart[-1] < 0.7 * apart[0]
    pipeline = load_pipeline("digits_npy", BASE)
    plain = run(pipeline, model=result.model, output_dir=tmp_path / "plain", quiet=True,
                plugins=[]).final  # fmt: skip
    assert plain.keys() >= {"validation_loss"}
    assert "validation_distillation" not in result.final


def test_a_resumed_student_goes_on_to_the_same_weights(teacher: RunResult, tmp_path: Path) -> None:
    straight = distilled(tmp_path / "straight", teacher, "schedule={use: constant}")
    first = distilled(tmp_path / "parts", teacher, "run.max_steps=30", "schedule={use: constant}")
    assert first.folder is not None
    again = resume(first.folder, ["run.max_steps=60"], quiet=True)
    assert straight.model is not None
    assert again.model is not None
    for one, other in zip(straight.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_another_teacher_on_resume_is_refused(teacher: RunResult, tmp_path: Path) -> None:
    # Planted: the digest not compared.
    moved = tmp_path / "teacher"
    assert teacher.folder is not None
    shutil.copytree(teacher.folder, moved)
    result = train(
        tmp_path / "run", f"loss={{use: distillation, with: {{teacher: '{moved}'}}}}",
        "run.max_steps=20",
    )  # fmt: skip
    shutil.rmtree(moved)
    train(moved, "quantizer=null", "run.max_steps=20")
    assert result.folder is not None
    with pytest.raises(PluginError, match="other weights than when this run began"):
        resume(result.folder, ["run.max_steps=40"], quiet=True)


def test_without_a_teacher_the_model_before_it_was_quantized_is_the_teacher(tmp_path: Path) -> None:
    result = train(
        tmp_path / "run", "loss={use: distillation, with: {weight: 1.0, target_weight: 0.0}}",
        "run.log_every=1", "quantizer={use: bitnet}",
    )  # fmt: skip
    told = logged(result, "distillation")
    assert told[0] > 0  # the levels answer otherwise than the weights that they come from
    assert told[-1] < told[0]


@pytest.mark.spec("E10")
def test_a_run_begins_with_the_weights_of_another(teacher: RunResult, tmp_path: Path) -> None:
    # Planted: nothing loaded: the accuracy after one step is that of a drawn network.
    wrapper = f"wrappers=[{{use: start_from, with: {{run: '{teacher.folder}'}}}}]"
    result = train(
        tmp_path / "run", wrapper, "quantizer=null", "optimizer.with.lr=1e-9", "run.max_steps=1"
    )
    assert result.final["validation_accuracy"] == teacher.final["validation_accuracy"]
    drawn = train(tmp_path / "drawn", "quantizer=null", "run.max_steps=1")
    assert float(drawn.final["validation_accuracy"] or 0) < 0.5


def test_a_model_of_another_shape_is_refused_or_taken_in_part(
    teacher: RunResult, tmp_path: Path
) -> None:
    wrapper = f"wrappers=[{{use: start_from, with: {{run: '{teacher.folder}'}}}}]"
    other = ["quantizer=null", "model.with.hidden=[32]", "run.max_steps=1"]
    with pytest.raises(PluginError, match=r"no weight of the same shape for layers\.\d"):
        train(tmp_path / "refused", wrapper, *other)
    part = wrapper.replace("}}]", ", partial: true}}]")
    result = train(tmp_path / "part", part, *other)
    assert result.folder is not None
    assert "started_from" in (result.folder / "metrics.jsonl").read_text()


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no run folder"):
        trained_model(tmp_path)


def test_the_trained_model_answers_as_the_run_did_and_draws_nothing(teacher: RunResult) -> None:
    assert teacher.folder is not None
    before = torch.get_rng_state()
    model = trained_model(teacher.folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    assert teacher.model is not None
    inputs = torch.rand(8, 64)
    assert torch.equal(model(inputs), teacher.model.eval()(inputs))
