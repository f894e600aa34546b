"""`forge export`: an exporter on a finished run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from forge_kernel import load_pipeline, run
from forge_kernel.cli import build_app
from forge_kernel.errors import CheckpointError, ConfigError, PlanError
from forge_kernel.runner import export

SETTINGS = ["run.max_steps=6", "run.save_every=3", "exporters=[]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("runs") / "run"
    run(load_pipeline("smoke", SETTINGS), output_dir=place, quiet=True)
    return place


def state(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and "exports" not in file.parts
    }


def test_it_writes_the_last_weights_and_touches_nothing_else(folder: Path) -> None:
    before, random = state(folder), torch.get_rng_state()
    written = export(folder, "state_dict")
    assert state(folder) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert written == {"state_dict": folder / "exports" / "state_dict"}
    found = load_file(written["state_dict"] / "model.safetensors")
    kept = load_file(folder / "checkpoints/step-6/model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in kept.items())


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    place = tmp_path / "run"
    run(load_pipeline("smoke", SETTINGS), output_dir=place, quiet=True)
    (place / "checkpoints/step-6/model.safetensors").write_bytes(b"")
    written = export(place, "state_dict")["state_dict"]
    assert json.loads((written / "manifest.json").read_text())["step"] == 3
    (place / "checkpoints/step-3/model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError):
        export(place, "state_dict")


def test_settings_are_the_exporters_or_by_whole_path_the_pipelines(folder: Path) -> None:
    written = export(folder, "state_dict", ["dtype=bfloat16", "run.device=cpu"])["state_dict"]
    found = load_file(written / "model.safetensors")
    assert {value.dtype for value in found.values()} == {torch.bfloat16}


def test_applied_weights_are_ternary(folder: Path) -> None:
    written = export(folder, "state_dict", ["weights=applied"])["state_dict"]
    found = load_file(written / "model.safetensors")
    assert len(found["layers.0.weight"].unique()) == 3


@pytest.mark.parametrize(
    ("use", "settings", "words"),
    [("stat_dict", [], "state_dict"), ("state_dict", ["dtyp=float32"], "dtype")],
)
def test_misspelt_names_are_told_with_the_nearest(
    folder: Path, use: str, settings: list[str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        export(folder, use, settings)


def test_what_the_run_lacks_is_told_before_anything_is_built(folder: Path) -> None:
    with pytest.raises(PlanError, match="a network that llama.cpp computes"):
        export(folder, "gguf")


def test_the_command_prints_folder_and_manifest(folder: Path) -> None:
    options = ["export", str(folder), "--use", "packed_ternary", "--set", "layout=base_three"]
    done = CliRunner().invoke(build_app(), options)
    assert done.exit_code == 0, done.output
    assert str(folder / "exports" / "packed_ternary") in done.output
    assert "forge.ternary.base_three.1" in done.output
    empty = CliRunner().invoke(build_app(), ["export", str(folder.parent), "--use", "onnx"])
    assert isinstance(empty.exception, ConfigError)
