from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from clients import need

from forge_kernel import load_pipeline, plan, run
from forge_kernel.errors import PlanError, PluginError
from forge_plugins.clients import verification
from forge_plugins.clients.verification import Client, agreement, verify
from forge_plugins.mathematics.networks.mlp import Mlp

SETTINGS = [
    "run.max_steps=2", "model.with={layers: 1, width: 256, heads: 2, hidden: 256}",
    "data.with={sequence_length: 8, batch_size: 2, validation_split: 0.001}", "observers=[]",
]  # fmt: skip


def manifest(tmp_path: Path, *exporters: str) -> dict[str, Any]:
    options = [*SETTINGS, f"exporters=[{', '.join(exporters)}]"]
    run(load_pipeline("char_llama_gguf", options), output_dir=tmp_path / "run", quiet=True)
    found = sorted((tmp_path / "run/exports").glob("*/manifest.json"))
    return {file.parent.name: json.loads(file.read_text()) for file in found}


def test_a_client_that_is_not_installed_is_no_claim(tmp_path: Path) -> None:
    client = Client("transformers_logits", ("no_such_client_at_all",))
    found = verify(
        client, tmp_path, torch.zeros(1, 2), Mlp(features=2, hidden=(), outputs=2), worst=1
    )
    assert found["relative_l2"] is None
    assert found["client"] is None
    assert found["note"].startswith("not verified: no_such_client_at_all is not installed")


def test_the_whole_path_from_yaml_to_three_clients(tmp_path: Path) -> None:
    need("transformers", "accelerate", "xllamacpp", "onnxruntime")
    found = manifest(tmp_path, "{use: gguf}", "{use: transformers}", "{use: onnx}")
    for name, limit in (("gguf", 5e-2), ("transformers", 1e-2), ("onnx", 1e-2)):
        verified = found[name]["verified"]
        assert verified["relative_l2"] <= limit
        assert verified["top1_agreement"] >= 0.8  # hardly trained: near ties are many
        assert verified["note"] is None
    assert (tmp_path / "run/exports/transformers/tokenizer.json").is_file()


def test_settings_of_the_exporters_are_seen_in_what_they_write(tmp_path: Path) -> None:
    off = "verify: false"
    found = manifest(
        tmp_path,
        f"{{use: gguf, with: {{{off}, type: tq1_0, scale: tensor, other: f16}}}}",
        f"{{use: gguf, with: {{{off}}}}}",
        f"{{use: transformers, with: {{{off}, layout: online, dtype: bfloat16}}}}",
        f"{{use: onnx, with: {{{off}, weights: int2}}}}",
    )
    assert found["gguf"]["format"] == "gguf tq1_0"
    assert found["gguf"]["bytes"] < found["gguf_"]["bytes"]
    raw = (tmp_path / "run/exports/gguf/model.gguf").read_bytes()
    assert b"blk.0.attn_q.scale" in raw
    assert b"attn_q.scale" not in (tmp_path / "run/exports/gguf_/model.gguf").read_bytes()
    config = json.loads((tmp_path / "run/exports/transformers/config.json").read_text())
    assert config["quantization_config"]["quantization_mode"] == "online"
    assert config["dtype"] == "bfloat16"
    assert found["onnx"]["opset"] == 25
    assert all(entry["verified"] == verification.NOT_ASKED for entry in found.values())


def test_a_client_that_computes_something_else_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Mlp(features=2, hidden=(), outputs=3)
    inputs = torch.ones(4, 2)
    client = Client("x", ("torch",))
    monkeypatch.setattr(verification, "_ask", lambda *_: -model(inputs).detach())
    with pytest.raises(PluginError, match="computes something else"):
        verify(client, Path("m"), inputs, model, worst=0.5)
    monkeypatch.setattr(verification, "_ask", lambda *_: torch.full((4, 3), float("nan")))
    with pytest.raises(PluginError, match="does not agree"):
        verify(client, Path("m"), inputs, model, worst=0.5)


def test_a_client_that_fails_is_told_with_its_words(tmp_path: Path) -> None:
    need("onnxruntime")
    file = tmp_path / "m.onnx"
    file.write_bytes(b"no model")
    with pytest.raises(PluginError, match=r"onnxruntime cannot run m\.onnx"):
        verify(
            verification.ONNXRUNTIME,
            file,
            torch.zeros(1, 2),
            Mlp(features=2, hidden=(), outputs=2),
            worst=1,
        )


def test_log_probabilities_agree_with_their_logits() -> None:
    logits = torch.randn(5, 7)
    apart = agreement(logits.log_softmax(-1), logits, up_to_constant=True)
    assert apart["relative_l2"] < 1e-6
    assert agreement(logits.log_softmax(-1), logits, up_to_constant=False)["relative_l2"] > 0.1
    assert apart["top1_agreement"] == 1
    assert apart["rows"] == 5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["quantizer=null"], "needs weights of three levels"),
        (["model.with.activation=relu2"], "needs a network that llama.cpp computes"),
        (["model.with.hidden=300"], "rows are multiples of 256"),
        (
            ["model.with.hidden=258", "exporters=[{use: transformers}]"],
            "columns are multiples of 4",
        ),
        (["model={use: decoder_transformer}"], "needs a network that llama.cpp computes"),
        (["quantizer=null", "exporters=[{use: onnx}]"], "needs weights of few bits"),
        (
            ["quantizer=null", "exporters=[{use: state_dict, with: {weights: applied}}]"],
            "needs weights of few bits",
        ),
    ],
)
def test_what_cannot_be_exported_is_refused_at_plan_time(settings: list[str], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        plan(load_pipeline("char_llama_gguf", settings))


@pytest.mark.parametrize("name", ["gguf", "transformers"])
def test_a_live_model_of_another_kind_is_refused_by_name(name: str, tmp_path: Path) -> None:
    live = torch.nn.Sequential(torch.nn.Embedding(257, 8), torch.nn.Linear(8, 257))
    pipeline = load_pipeline("char_llama_gguf", [*SETTINGS, f"exporters=[{{use: {name}}}]"])
    with pytest.raises(PluginError, match="Sequential is no architecture"):
        run(pipeline, model=live, output_dir=tmp_path / "run", quiet=True)
