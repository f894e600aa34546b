"""Models of transformers go back into their own architecture, and are the same there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from live_exports import manifest
from model_folders import FAMILIES, PACKED, library, make_folder, settings
from safetensors.torch import load_file

from forge_kernel import load_pipeline, run
from forge_kernel.errors import PluginError
from forge_plugins.interchange.model_folder import read_model_folder
from forge_plugins.interchange.transformers_model import load_model

BACK = [
    pytest.param(name, marks=[] if name == "qwen2" else pytest.mark.deep)
    for name in (*FAMILIES, "bitnet_online")
    if name != "gpt2"
]


def exported(family: str, place: Path, layout: str, *more: str, verify: bool = True) -> Any:
    """Twenty ternary steps and the export."""
    folder = make_folder(place / "model", family)
    (folder / "tokenizer_config.json").write_text('{"chat_template":  "{{ messages }}"}')
    (folder / "chat_template.jinja").write_bytes(b"{{ messages }}\r\n")
    exporter = f"{{use: transformers, with: {{layout: {layout}, verify: {str(verify).lower()}}}}}"
    chosen = settings(family, folder, place, f"exporters=[{exporter}]", *more)
    return run(load_pipeline("smoke", chosen), output_dir=place / "run", quiet=True)


@pytest.mark.parametrize("family", BACK)
def test_the_online_export_is_bit_equal_in_a_fresh_process(family: str, tmp_path: Path) -> None:
    """Planted: the latent weights written in bfloat16."""
    result = exported(family, tmp_path, "online")
    assert result.failed_exports == {}
    told = manifest(tmp_path / "run", "transformers")
    assert told["verified"]["relative_l2"] == 0.0
    assert told["verified"]["rows"] >= 4
    assert told["architecture"] == json.loads(
        (tmp_path / "model/config.json").read_text()
    )["architectures"][0]  # fmt: skip
    written = tmp_path / "run/exports/transformers"
    for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        first = tmp_path / "model" / name
        assert not first.exists() or (written / name).read_bytes() == first.read_bytes()
    assert load_file(written / "model.safetensors").keys() == load_file(
        tmp_path / "model/model.safetensors"
    ).keys()  # fmt: skip


@pytest.mark.deep
@pytest.mark.parametrize("layout", ["bitlinear", "autobitlinear"])
@pytest.mark.parametrize("family", [*(name for name in FAMILIES if name != "gpt2"), PACKED[1]])
def test_a_packed_export_is_near_and_is_trained_on_here(
    family: str, layout: str, tmp_path: Path
) -> None:
    result = exported(family, tmp_path, layout)
    assert result.failed_exports == {}
    told = manifest(tmp_path / "run", "transformers")
    assert told["verified"]["relative_l2"] < 1e-2
    assert told["verified"]["top1_agreement"] > 0.95
    again = read_model_folder(str(tmp_path / "run/exports/transformers"))
    model = load_model(again, seed=0).model
    assert type(model).__name__ == told["architecture"]


def test_our_own_export_is_a_folder_that_a_run_begins_with(tmp_path: Path) -> None:
    result = exported("qwen2", tmp_path, "online", verify=False)
    folder = tmp_path / "run/exports/transformers"
    chosen = settings("qwen2", folder, tmp_path, "run.max_steps=1", "optimizer.with.lr=1e-30")
    again = run(load_pipeline("smoke", chosen), output_dir=tmp_path / "again", quiet=True)
    tokens = torch.randint(260, (2, 9))
    with torch.no_grad():
        assert torch.equal(result.model.eval()(tokens).logits, again.model.eval()(tokens).logits)


def test_the_transposed_layers_of_gpt2_have_no_place_in_the_librarys_quantized_layers(
    tmp_path: Path,
) -> None:
    library()
    with pytest.raises(PluginError, match=r"Conv1D.*state_dict \(weights: applied\)"):
        exported("gpt2", tmp_path, "online")


def test_a_plain_layer_whose_name_ends_anothers_is_named_exactly(tmp_path: Path) -> None:
    """Planted: the name as it is; transformers took pre_classifier for it and left it plain."""
    transformers = library()
    config = transformers.DistilBertConfig(
        vocab_size=260, dim=32, hidden_dim=64, n_layers=1, n_heads=4, max_position_embeddings=64,
        num_labels=5,
    )  # fmt: skip
    folder = tmp_path / "model"
    transformers.DistilBertForSequenceClassification(config).save_pretrained(folder)
    chosen = settings(
        "bert", folder, tmp_path, "run.max_steps=1",
        "exporters=[{use: transformers, with: {layout: online, verify: false}}]",
    )  # fmt: skip
    result: Any = run(load_pipeline("smoke", chosen), output_dir=tmp_path / "run", quiet=True)
    written = tmp_path / "run/exports/transformers"
    found = transformers.DistilBertForSequenceClassification.from_pretrained(written)
    kinds = {name: type(module).__name__ for name, module in found.named_modules()}
    assert kinds["pre_classifier"] == "AutoBitLinear"
    assert kinds["classifier"] == "Linear"
    assert torch.equal(found.classifier.weight, result.model.classifier.weight)


def test_gpt2_as_applied_is_read_by_the_library_under_its_own_names(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "gpt2")
    chosen = settings("gpt2", folder, tmp_path, "run.max_steps=2",
                      "exporters=[{use: state_dict, with: {weights: applied}}]")  # fmt: skip
    result: Any = run(load_pipeline("smoke", chosen), output_dir=tmp_path / "run", quiet=True)
    written = load_file(tmp_path / "run/exports/state_dict/model.safetensors")
    plain = library().GPT2LMHeadModel.from_pretrained(folder)
    missing, unexpected = plain.load_state_dict(written, strict=False)
    assert (set(missing) | set(unexpected)) <= {"lm_head.weight", "transformer.wte.weight"}
    layer = result.model.transformer.h[0].mlp.c_fc
    assert torch.equal(plain.transformer.h[0].mlp.c_fc.weight, layer.applied_weight().t())


@pytest.mark.deep
@pytest.mark.parametrize("layout", ["bitlinear", "autobitlinear"])
def test_packed_with_sub_norms_the_activations_take_the_same_levels(
    layout: str, tmp_path: Path
) -> None:
    """At most one level in a thousand differs, by one: a rounding that fell to the other side.

    Planted: the scales of the packed weights 1 % larger in every second layer.
    """
    result = exported("bitnet", tmp_path, layout, verify=False)
    ours = result.model.eval()
    theirs = library().AutoModelForCausalLM.from_pretrained(
        tmp_path / "run/exports/transformers", dtype="float32"
    )
    tokens = torch.randint(260, (16, 64), generator=torch.Generator().manual_seed(3))
    levels = [_levels(model.eval(), tokens) for model in (ours, theirs)]
    assert levels[0].keys() == levels[1].keys()
    assert len(levels[0]) == 14
    apart = torch.cat([(one - levels[1][name]).flatten() for name, one in levels[0].items()])
    assert float(apart.abs().max()) <= 1
    assert float((apart != 0).double().mean()) <= 1e-3


def _levels(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """The whole numbers that each quantized layer makes of its inputs, by the layer's name."""
    result: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def keep(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            largest = inputs[0].abs().amax(-1, keepdim=True).clamp(min=1e-5)
            result[name] = (inputs[0] * (127 / largest)).round().clamp(-128, 127)

        return keep

    hooks = [
        layer.register_forward_pre_hook(hook(name))
        for name, layer in model.named_modules()
        if name.endswith("_proj")
    ]
    with torch.no_grad():
        model(tokens)
    for one in hooks:
        one.remove()
    return result
