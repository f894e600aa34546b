"""Models of transformers as ONNX files, read by onnxruntime."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chats import make_chat_model, write_chats
from clients import need
from live_exports import manifest
from model_folders import FAMILIES, make_folder, settings

from forge_kernel import evaluate_clients, load_pipeline, run

ALL = [pytest.param(name, marks=() if name == "llama" else pytest.mark.deep) for name in FAMILIES]


@pytest.mark.parametrize("family", ALL)
def test_onnxruntime_gives_the_logits_of_each_family(family: str, tmp_path: Path) -> None:
    """Experts too. Planted: the first tensor that a forward pass gives taken for the logits."""
    need("transformers", "onnxruntime", "onnxscript")
    folder = make_folder(tmp_path / "model", family)
    chosen = settings(family, folder, tmp_path, "exporters=[{use: onnx}]", "run.max_steps=2")
    result = run(load_pipeline("smoke", chosen), output_dir=tmp_path / "run", quiet=True)
    assert not result.failed_exports
    verified = manifest(tmp_path / "run", "onnx")["verified"]
    assert verified["relative_l2"] < 1e-4
    assert verified["rows"] > 4
    assert verified["weights_compared"] > 1000


def test_a_run_on_packed_conversations_is_exported_and_evaluated_there(tmp_path: Path) -> None:
    """Planted: the positions of a packed sequence asked for by the file."""
    need("transformers", "onnxruntime", "onnxscript", "jinja2", "tokenizers")
    folder = make_chat_model(tmp_path / "model")
    own = {
        "path": str(write_chats(tmp_path / "a.jsonl", 60)), "tokenizer": str(folder),
        "sequence_length": 64, "batch_size": 2, "cache_dir": str(tmp_path / "cache"),
        "too_long": "leave_out", "validation_split": 0.3,
    }  # fmt: skip
    chosen = [
        f"data={{use: chat, with: {json.dumps(own)}}}", "run.max_steps=2", "callbacks=null",
        f"model={{use: transformers, with: {{path: {folder}}}}}", "run.validate_every=null",
        "loss={use: language_model}", "validators=[{use: language_model}]", "observers=null",
        "exporters=[{use: onnx}]",
    ]  # fmt: skip
    run(load_pipeline("smoke", chosen), output_dir=tmp_path / "run", quiet=True)
    assert manifest(tmp_path / "run", "onnx")["any_length"]
    found = evaluate_clients(tmp_path / "run", clients=["torch", "onnxruntime"])
    assert found["onnxruntime"]["loss"] == pytest.approx(found["torch"]["loss"], rel=1e-4)
    assert found["onnxruntime"]["targets"] == found["torch"]["targets"] > 2
