"""A Llama with BitNet's norms set into it is a BitNetForCausalLM: in training, on disk, loaded anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from live_exports import manifest
from model_folders import edit_config, library, make_folder, settings
from safetensors.torch import load_file

from forge_kernel import load_pipeline, resume, run
from forge_kernel.errors import ConfigError, PlanError, PluginError
from forge_kernel.planning.plan import plan
from forge_plugins.interchange.model_folder import read_model_folder
from forge_plugins.interchange.transformers_model import load_model

NORMS = ("attn_sub_norm.weight", "ffn_sub_norm.weight")


def with_norms(family: str, place: Path, *more: str, **changes: Any) -> list[str]:
    folder = make_folder(place / "model", family, **changes)
    return settings(family, folder, place, "model.with.sub_norms=true", *more)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_the_norms_left_out_again_it_is_the_model_of_the_folder(
    family: str, tmp_path: Path
) -> None:
    """The same weights, biases, rotary positions and ties. Planted: the default base of rotation."""
    changes = {"sliding_window": None} if family == "mistral" else {}
    rotary = {"rope_type": "linear", "rope_theta": 2000.0, "factor": 2.0}
    folder = make_folder(tmp_path, family, rope_parameters=rotary, **changes)
    about = read_model_folder(str(folder))
    plain = load_model(about, seed=0).model
    loaded = load_model(about, seed=0, sub_norms=True)
    assert type(loaded.model).__name__ == "BitNetForCausalLM"
    own, theirs = (
        {name for name, _ in model.named_parameters()} for model in (loaded.model, plain)
    )
    assert own - theirs == set(loaded.drawn)
    assert {name.partition("sub_norm")[1] for name in loaded.drawn} == (
        {"sub_norm"} if family != "qwen2" else {"sub_norm", ""}  # and the bias that Qwen 2 lacks
    )
    for layer in loaded.model.model.layers:  # type: ignore[union-attr, operator]
        layer.self_attn.attn_sub_norm = layer.mlp.ffn_sub_norm = torch.nn.Identity()
    tokens = torch.randint(260, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded.model(tokens).logits, plain(tokens).logits)


@pytest.mark.parametrize(
    ("family", "layout", "verify"),
    [
        ("qwen2", "online", False),  # loaded in this process, which costs a tenth
        pytest.param("qwen2", "online", True, marks=pytest.mark.deep),
        pytest.param("llama", "online", True, marks=pytest.mark.deep),
        pytest.param("llama", "bitlinear", True, marks=pytest.mark.deep),
        pytest.param("qwen2", "autobitlinear", True, marks=pytest.mark.deep),
    ],
)
def test_it_is_exported_and_loaded_as_bitnets(
    family: str, layout: str, verify: bool, tmp_path: Path
) -> None:
    """Bit for bit. Planted: the plain model's architecture in config.json."""
    told_so = str(verify).lower()
    exporter = f"exporters=[{{use: transformers, with: {{layout: {layout}, verify: {told_so}}}}}]"
    chosen = with_norms(family, tmp_path, "run.max_steps=4", exporter)
    result = run(load_pipeline("smoke", chosen), output_dir=tmp_path / "run", quiet=True)
    assert result.failed_exports == {}
    told = manifest(tmp_path / "run", "transformers")
    assert told["architecture"] == "BitNetForCausalLM"
    written = tmp_path / "run/exports/transformers"
    if verify:
        assert told["verified"]["relative_l2"] <= (0.0 if layout == "online" else 1e-2)
    else:
        tokens = torch.randint(260, (2, 12), generator=torch.Generator().manual_seed(0))
        assert result.model is not None
        with torch.compiler.set_stance("force_eager"), torch.no_grad():
            theirs = library().BitNetForCausalLM.from_pretrained(written)(tokens).logits
            assert torch.equal(result.model.eval()(tokens).logits, theirs)
    config = json.loads((written / "config.json").read_text())
    assert (config["model_type"], config["hidden_act"]) == ("bitnet", "silu")
    held = load_file(written / "model.safetensors")
    norms = [held[name] for name in held if name.endswith(NORMS)]
    assert len(norms) == 4
    assert not any(torch.equal(norm, torch.ones_like(norm)) for norm in norms), "they are trained"
    (tmp_path / "again").mkdir()
    again = settings("bitnet", written, tmp_path / "again", "run.max_steps=1")
    assert run(load_pipeline("smoke", again), output_dir=tmp_path / "b", quiet=True).steps == 1


def test_with_its_folder_as_the_teacher_it_is_healed_and_resumes_to_the_bit(tmp_path: Path) -> None:
    """The recipe of BitDistill: norms, logits and relations of the folder's own model."""
    from kernel_parts import StopAfter

    loss = (
        f"loss={{use: distillation, with: {{loss: {{use: language_model}}, teacher: {tmp_path / 'model'}, "
        "relations: ['model.layers.1.self_attn'], relation_heads: 2}}"
    )
    chosen = with_norms(
        "llama", tmp_path, "run.max_steps=6", loss,
        "quantizer={use: bitnet, with: {warmup_start: 1, warmup_steps: 2}}",
    )  # fmt: skip
    whole: Any = run(load_pipeline("smoke", chosen), output_dir=tmp_path / "a", quiet=True)
    stop = StopAfter(2)
    run(load_pipeline("smoke", chosen), output_dir=tmp_path / "b", quiet=True, plugins=[stop],
        cancel=stop.event)  # fmt: skip
    again: Any = resume(tmp_path / "b", quiet=True, plugins=[StopAfter(100)])
    one, two = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_teacher_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    """Planted: the sizes are compared in the first step only, after minutes."""
    small = make_folder(tmp_path / "small", "llama", vocab_size=250)
    large = make_folder(tmp_path / "large", "llama", vocab_size=300)
    for teacher, message in (
        (small, "vocabulary of 250 tokens"),
        (large, "300 logits and the model 260"),
    ):
        loss = f"loss={{use: distillation, with: {{loss: {{use: language_model}}, teacher: {teacher}}}}}"
        chosen = settings("llama", make_folder(tmp_path / "own", "llama"), tmp_path, loss)
        with pytest.raises(PluginError, match=message):
            run(load_pipeline("smoke", chosen), output_dir=tmp_path / "run", quiet=True)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("bitnet", {}, "has its norms already"), ("gemma3", {}, "quantizer.with.sub_norm"),
        ("llama", {"mlp_bias": True}, "mlp_bias"), ("llama", {"head_dim": 16}, "4 heads of 16"),
        ("mistral", {"sliding_window": 8}, "sliding window of 8 tokens"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantized weights already"),
    ],
)  # fmt: skip
def test_a_model_that_bitnets_is_not_without_its_norms_is_refused_by_the_check(
    family: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    library()
    folder = make_folder(tmp_path / "model", family)
    edit_config(folder, **changes)
    chosen = settings(family, folder, tmp_path, "model.with.sub_norms=true")
    with pytest.raises((ConfigError, PlanError, PluginError), match=message):
        plan(load_pipeline("smoke", chosen))


@pytest.mark.parametrize("tied", [pytest.param(True, marks=pytest.mark.deep), False])
def test_llama_cpp_reads_it_as_its_bitnet_where_the_head_is_the_embedding(
    tied: bool, tmp_path: Path
) -> None:
    """Planted: queries and keys turned as a Llama's are."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "tie_word_embeddings": tied}
    chosen = with_norms(
        "llama", tmp_path, "run.max_steps=2", "exporters=[{use: gguf}]", "run.save_every=null",
        **sizes,
    )  # fmt: skip
    pipeline = load_pipeline("smoke", chosen)
    if not tied:
        with pytest.raises(PluginError, match="no head of its own"):
            run(pipeline, output_dir=tmp_path / "run", quiet=True)
        return
    result = run(pipeline, output_dir=tmp_path / "run", quiet=True)
    assert result.failed_exports == {}
    told = manifest(tmp_path / "run", "gguf")
    assert told["architecture"] == "bitnet"
    assert told["verified"]["top1_agreement"] > 0.95
