"""The folder for Phase 6: what another program, which knows nothing of us, finds in it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from forge_kernel import RunResult, load_pipeline, run
from forge_kernel.planning.catalog import Catalog
from forge_kernel.planning.schemas import all_schemas
from forge_kernel.runner import export
from forge_plugins.exporters.phase6_records import RECORDS

SETTINGS = [
    "run.max_steps=120", "run.validate_every=60", "run.log_every=30", "exporters=[{use: phase6}]",
    "callbacks=[]", "run.device=cpu", # where the other process reads: bit for bit
]  # fmt: skip
PHASE6 = """
import json, sys, torch
found = torch.load(sys.argv[1] + "/trained_model.pt")
assert sorted(found) == ["final_metrics", "model_state_dict", "training_config"]
plain = torch.load(sys.argv[1] + "/model.pth")
assert "forge_kernel" not in sys.modules and "forge_plugins" not in sys.modules
config = found["training_config"]
from forge_plugins.mathematics.networks.mlp import Mlp
from forge_plugins.mathematics.quantization.scheme import Scheme
from forge_plugins.mathematics.quantization.conversion import convert_model_to_bitnet
hidden = tuple(config["model"]["with"]["hidden"])
model = Mlp(features=64, hidden=hidden, outputs=10)
model, _ = convert_model_to_bitnet(model, Scheme(weight_bits=1.58))
model.load_state_dict(found["model_state_dict"])
print(json.dumps({name: float(value) for name, value in found["final_metrics"].items() if value is not None}))
torch.manual_seed(0)
inputs = torch.rand(50, 64)
rebuilt = Mlp(features=64, hidden=hidden, outputs=10)
rebuilt.load_state_dict(plain)
model.eval(), rebuilt.eval()
weights = dict(rebuilt.named_parameters())
for name, layer in model.named_modules():
    if hasattr(layer, "applied_weight"):
        assert torch.equal(layer.applied_weight(), weights[f"{name}.weight"].detach()), name
        assert len(weights[f"{name}.weight"].unique()) <= 3
torch.save(model(inputs), sys.argv[2])
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    folder = tmp_path_factory.mktemp("phase6") / "run"
    pipeline = load_pipeline("digits_npy", [*SETTINGS, "quantizer={use: bitnet}"])
    return run(pipeline, output_dir=folder, quiet=True)


def exported(result: RunResult) -> Path:
    assert result.folder is not None
    return result.folder / result.exports["phase6"]


def test_another_process_loads_it_with_the_default_loader_and_gets_the_same_answers(
    finished: RunResult, tmp_path: Path
) -> None:
    """Spec: J3, J4. Planted: latent weights in model.pth."""
    import torch

    folder = exported(finished)
    done = subprocess.run(
        [sys.executable, "-c", PHASE6, str(folder), str(tmp_path / "answers.pt")],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    inputs = torch.rand(50, 64)
    assert finished.model is not None
    finished.model.eval()
    assert torch.equal(torch.load(tmp_path / "answers.pt"), finished.model(inputs))
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["validation_accuracy"] == finished.final["validation_accuracy"]


def test_its_records_follow_their_schemas_and_hold_what_was_measured(finished: RunResult) -> None:
    """Spec: J4, H12. Planted: the accuracy of the training in place of the validation's."""
    folder = exported(finished)
    records: dict[str, Any] = {
        name: json.loads((folder / f"{name}.json").read_text()) for name in RECORDS
    }
    for name, schema in RECORDS.items():
        jsonschema.validate(records[name], schema)
    about = records["training_metadata"]
    assert about["final_accuracy"] == finished.final["validation_accuracy"]
    assert about["validation_loss"] == finished.final["validation_loss"]
    assert about["dataset_size"] == 1797 - round(1797 * 0.2)
    assert (folder / about["checkpoint_path"]).is_file()
    info = records["metadata"]["quantization_info"]
    assert info["weight_bits"] == 1.58
    assert info["level_-1"] + info["level_0"] + info["level_1"] == pytest.approx(1.0)
    assert info["level_0"] == pytest.approx(info["weight_sparsity"])
    kinds = {one["kind"] for one in records["metadata"]["model_architecture"]["layers"].values()}
    assert "BitLinear" in kinds
    steps = [entry["step"] for entry in records["training_history"]["entries"]]
    assert steps[-1] == 120


def test_what_was_not_measured_is_null(tmp_path: Path) -> None:
    """Spec: J4. Planted: 0.0 for a missing accuracy."""
    pipeline = load_pipeline(
        "digits_npy",
        [
            *SETTINGS,
            "run.max_steps=3",
            "quantizer=null",
            "validators=[]",
            "observers=[]",
            "run.validate_every=null",
        ],
    )
    result = run(pipeline, output_dir=tmp_path / "run", quiet=True)
    folder = exported(result)
    about = json.loads((folder / "training_metadata.json").read_text())
    assert about["final_accuracy"] is None
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["quantization_info"] is None
    assert json.loads((folder / "training_history.json").read_text())["entries"] is None


def test_a_finished_run_is_exported_afterwards(finished: RunResult, tmp_path: Path) -> None:
    """Spec: J4."""
    assert finished.folder is not None
    folder = tmp_path / "run"  # an own one: an export takes the place of the last
    shutil.copytree(finished.folder, folder)
    written = export(folder, "phase6", ["weights=applied"])
    manifest = json.loads((written["phase6"] / "manifest.json").read_text())
    assert manifest["weights"] == "applied"
    assert manifest["verified"]["read_back_bit_equal"] is True


def test_the_schemas_lie_beside_the_others() -> None:
    """Spec: H12."""
    found = all_schemas(Catalog.installed())
    assert {f"exporters/phase6.{name}.json" for name in RECORDS} <= set(found)
