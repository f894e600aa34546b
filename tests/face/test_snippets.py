"""The code blocks of the document run as they stand, in a folder with small data.

Spec: A13, A14
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import agent_forge.phases.phase5_training as phase5
from forge_plugins.mathematics.quantization.conversion import convert_model_to_bitnet

DOCUMENT = Path(phase5.__file__).parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)


def title(number: int) -> str:
    found = re.search(r"import ([\w, ]+)\n", BLOCKS[number])
    return f"{number + 1:02d}-{(found.group(1).split(',')[-1].strip() if found else 'pipeline')}"


def free_names(folder: Path) -> dict[str, Any]:
    """What the document's blocks take from their reader, and nothing that they define."""
    torch.manual_seed(0)
    inputs = torch.randn(20, 128)
    targets = torch.randint(10, (20,))
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=8)
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    exported = {name: getattr(phase5, name) for name in phase5.__all__}
    return {
        **exported,
        "torch": torch,
        "nn": nn,
        "model": model,
        "device": torch.device("cpu"),
        "checkpoint_dir": folder / "checkpoints",
        "train_loader": loader,
        "val_loader": loader,
        "batch": (inputs[:8], targets[:8]),
        "loss_fn": nn.CrossEntropyLoss(),
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "accuracy_metric_fn": lambda metrics: metrics.get("accuracy", 0.0),
        "predictions": model(inputs),
        "targets": targets,
    }


@pytest.fixture
def reader(workplace: Path) -> dict[str, Any]:
    """The reader's folder and names."""
    shutil.copy("data/train.json", "train.json")
    shutil.copy("data/train.json", "data.json")
    Path("phase6_input").mkdir()
    Path("phase4_output").mkdir()
    compressed, _ = convert_model_to_bitnet(
        nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    )
    torch.save(compressed, "phase4_output/compressed_model.pt")
    return free_names(workplace)


def run(number: int, names: dict[str, Any]) -> None:
    exec(compile(BLOCKS[number], f"block {number + 1} of {DOCUMENT.name}", "exec"), names)


def test_the_document_has_nineteen_blocks() -> None:
    """Spec: A13"""
    assert len(BLOCKS) == 19


def trained(names: dict[str, Any]) -> Any:
    pipeline = phase5.create_training_pipeline(
        names["model"], "data/train.json", training_config={"epochs": 2}
    )
    pipeline.train()
    return pipeline


@pytest.mark.parametrize("number", range(19), ids=title)
def test_a_block_of_the_document_runs_as_it_stands(number: int, reader: dict[str, Any]) -> None:
    """Spec: A3, A4, A5, A6, A7, A8, A9, A10, A11, A12, A14, C1, C2, C3, D1, D9, E1, E6, E7, F1, G1, H1, H2, I1"""
    if re.search(r"\bpipeline\.", BLOCKS[number]) and "pipeline =" not in BLOCKS[number]:
        reader["pipeline"] = trained(reader)
    run(number, reader)
    if isinstance(reader.get("pipeline"), phase5.TrainingPipeline):
        assert reader["pipeline"].state in (
            phase5.PipelineState.COMPLETED,
            phase5.PipelineState.INITIALIZING,
        )
        reader["pipeline"].cleanup()
    if "validator" in reader:
        reader["validator"].stop_monitoring_thread()


def test_the_phase_6_block_writes_what_the_default_loader_takes(reader: dict[str, Any]) -> None:
    """Spec: J3, I10. Red when the configuration is saved as an object of its class."""
    reader["pipeline"] = trained(reader)
    run(18, reader)
    held = torch.load("phase6_input/trained_model.pt")
    assert set(held) == {"model_state_dict", "training_config", "final_metrics"}
    assert held["training_config"]["training_config"]["epochs"] == 2
    again = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    again.load_state_dict(held["model_state_dict"])
    inputs = torch.randn(4, 128)
    model = reader["pipeline"].model.eval().cpu()
    assert torch.equal(again.eval()(inputs), model(inputs))
