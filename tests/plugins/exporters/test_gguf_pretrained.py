from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from clients import need
from model_folders import library, make_folder, settings

from forge_kernel import load_pipeline, run
from forge_kernel.api import PluginError
from forge_plugins.clients.llama_cpp_rounding import as_llama_cpp
from forge_plugins.clients.reading import GGUF_WEIGHTS, compared_weights
from forge_plugins.clients.verification import LLAMA_CPP, answer_of, verify
from forge_plugins.interchange.gguf import write_gguf
from forge_plugins.interchange.gguf_families import is_computed
from forge_plugins.interchange.gguf_model import check_gguf, gguf_entries, gguf_tensors
from forge_plugins.interchange.model_folder import read_model_folder
from forge_plugins.interchange.transformers_model import load_model, prepare_inputs
from forge_plugins.mathematics.quantization.conversion import convert_linears
from forge_plugins.mathematics.text.tokenizers import ByteTokenizer

WIDE = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.1}
NARROW = {"hidden_size": 96, "intermediate_size": 160, "initializer_range": 0.15}
"""With weights as large that where a token stands, and what it attends to, shows in the logits."""
GEMMA = {"head_dim": 64, "query_pre_attn_scalar": 64}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 128}),
    "gemma3": (
        "gemma3", {
            **GEMMA, "num_hidden_layers": 7, "sliding_window": 6,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 100.0, "factor": 8.0},
            },
        },
    ),
    "phi3": ("phi3", {}),
    "bitnet": ("bitnet", {"hidden_act": "silu"}),
}  # fmt: skip
"""llama.cpp's architecture, and sizes."""
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}


def ternary(folder: Path, family: str, *, skip: str = "lm_head", **changes: Any) -> Any:
    """A model of a family with ternary layers, norms that are not 1 and outputs that differ."""
    library()
    known = read_model_folder(str(make_folder(folder, family, **changes)))
    model = load_model(known, seed=0).model
    prepare_inputs(model, known)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.rand(parameter.shape, generator=generator) * 0.4 - 0.2)
    convert_linears(model, lambda name: name != skip)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_model_of_transformers_runs_in_llama_cpp(family: str, tmp_path: Path) -> None:
    need("xllamacpp", "gguf")
    import gguf

    architecture, changes = FAMILIES[family]
    model = make_folder(tmp_path / "model", family, **{**WIDE, **changes})
    chosen = settings(family, model, tmp_path, "run.max_steps=2", "exporters=[{use: gguf}]")
    done = run(load_pipeline("smoke", chosen), output_dir=tmp_path / "run", quiet=True)
    assert done.failed_exports == {}
    folder = tmp_path / "run/exports/gguf"
    about = json.loads((folder / "manifest.json").read_text())
    assert about["architecture"] == architecture
    assert about["verified"]["relative_l2"] <= 0.05
    assert about["verified"]["top1_agreement"] >= 0.85
    assert about["verified"]["client_rounding"]["relative_l2"] <= 1e-2
    assert about["verified"]["texts_compared"] >= 200
    assert "token_embd.weight" in about["unquantized"]["tensors"]
    assert 0 < about["unquantized"]["share"] < 0.2

    file = folder / "model.gguf"
    meant = answer_of(GGUF_WEIGHTS, file, {"nothing": torch.empty(1)})
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    raw = bytearray(file.read_bytes())
    raw[int(tensors["blk.1.ffn_down.weight"].data_offset) + 7] ^= 1
    file.write_bytes(raw)
    with pytest.raises(PluginError, match="1 of 131072 in blk.1.ffn_down.weight"):
        compared_weights(GGUF_WEIGHTS, file, meant)


@pytest.mark.parametrize(
    ("family", "kind", "scale_tensors", "changes"),
    [
        ("llama", "q4_0", False, {**NARROW, "attention_bias": True, "rope_parameters": LINEAR}),
        ("llama", "tq1_0", True, {**WIDE, "rope_parameters": LLAMA3, "mlp_bias": True}),
        ("qwen3", "tq1_0", True, {**WIDE, "head_dim": 64, "tie_word_embeddings": True}),
        ("gemma3", "tq1_0", False, {**WIDE, **GEMMA, "tie_word_embeddings": False}),
        ("phi3", "tq1_0", False, {**WIDE, "rope_parameters": HALF, "tie_word_embeddings": True}),
        ("bitnet", "tq1_0", True, {**WIDE, "hidden_act": "silu"}),
    ],
)
def test_llama_cpp_gives_the_probabilities_of_the_forms_of_a_family(
    family: str, kind: Any, scale_tensors: bool, changes: dict[str, Any], tmp_path: Path
) -> None:
    need("xllamacpp")
    model, file = ternary(tmp_path / "model", family, **changes), tmp_path / "x.gguf"
    tensors = gguf_tensors(model, kind, scale_tensors=scale_tensors, other="f16")
    write_gguf(file, gguf_entries(model, kind, ByteTokenizer(), "x"), tensors)
    inputs = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(5))
    found = verify(
        LLAMA_CPP, file, inputs, model, worst=5e-3,
        rounded=lambda: as_llama_cpp(model, kind, scale_tensors=scale_tensors, other="f16"),
    )  # fmt: skip
    assert found["client_rounding"]["median_relative_l2"] <= 2e-4
    assert found["client_rounding"]["top1_agreement"] >= 0.95
    assert found["top1_agreement"] >= 0.85


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", NARROW, r"layers\.0\.self_attn\.q_proj has rows of 96 .*set type: q4_0"),
        ("llama", {"hidden_size": 40}, r"rows of 40 .*: change the sizes"),
        ("llama", {**WIDE, "hidden_act": "gelu"}, "silu .*computes gelu"),
        ("bitnet", WIDE, "silu .*computes relu2"),
        ("bitnet", {**WIDE, "hidden_act": "silu", "tie_word_embeddings": False}, "no head of its"),
        ("gemma3", {**WIDE, "head_dim": 64}, "scaled by 64, not 256"),
        ("gemma3", {**WIDE, **GEMMA, "layer_types": ["full_attention"] * 2}, "layer_types"),
        ("gemma3", {**WIDE, **GEMMA, "final_logit_softcapping": 30.0}, "no final_logit_softcap"),
        ("qwen3", {**WIDE, "attention_bias": True}, r"no place for .*q_proj\.bias"),
        ("qwen3", {**WIDE, "rope_parameters": LLAMA3}, r"stretched \(llama3\)"),
        ("gpt2", {"n_embd": 256}, "GPT2LMHeadModel is no architecture"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    family: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    model = ternary(tmp_path / "model", family, **changes)
    with pytest.raises(ValueError, match=words):
        check_gguf(model, "tq2_0")


def test_scales_that_llama_cpp_does_not_read_are_refused(tmp_path: Path) -> None:
    model = ternary(tmp_path / "model", "phi3", **WIDE)
    with pytest.raises(ValueError, match="set scale: block"):
        check_gguf(model, "tq2_0", scale_tensors=True)


def test_numbers_beyond_half_precision_are_refused(tmp_path: Path) -> None:
    model = ternary(tmp_path / "model", "llama", **WIDE)
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 4] = 7e4
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight .*other: f32"):
        gguf_tensors(model, "tq2_0", other="f16")
    assert gguf_tensors(model, "tq2_0", other="f32")


def test_the_context_ends_where_a_window_that_llama_cpp_has_not_would_begin(tmp_path: Path) -> None:
    model = ternary(tmp_path / "model", "mistral", **WIDE, sliding_window=8)
    assert check_gguf(model, "tq2_0").context == 8
    assert gguf_entries(model, "tq2_0", None, "x")["llama.context_length"] == 8
    wider = ternary(tmp_path / "wider", "mistral", **WIDE)
    assert check_gguf(wider, "tq2_0").context == 64


def test_a_configuration_tells_whether_llama_cpp_computes_it() -> None:
    assert is_computed({"model_type": "qwen2", "hidden_act": "silu"})
    assert is_computed({"model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh"})
    assert is_computed({"model_type": "gemma3_text"})
    assert not is_computed({"model_type": "bitnet"})
    assert not is_computed({"model_type": "llama", "hidden_act": "gelu"})
    assert not is_computed({"model_type": "gpt2"})
