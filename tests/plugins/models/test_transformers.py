"""Models of transformers from their folders: in by YAML alone, ternary, resumed bit for bit."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_folders import FAMILIES, PACKED, TIED, library, make_folder, settings
from safetensors.torch import load_file
from torch import Tensor

from forge_kernel import load_pipeline, resume, run
from forge_kernel.api import trained_model
from forge_kernel.storage.checkpoint_store import CheckpointStore
from forge_kernel.testing.compare import differences
from forge_plugins.interchange.model_folder import read_model_folder
from forge_plugins.interchange.transformers_model import load_model, prepare_inputs
from forge_plugins.mathematics.quantization.conversion import convert_model_to_bitnet
from forge_plugins.mathematics.quantization.quantizers import quantize_weight
from forge_plugins.mathematics.quantization.resume_from_quantized import dequantized_state

QUICK = ("llama", "gpt2", "bert", "vit", "bitnet_bitlinear")
DEEP = [
    pytest.param(name, marks=[] if name in QUICK else pytest.mark.deep)
    for name in (*FAMILIES, *PACKED)
]


@pytest.fixture
def eager() -> Any:
    """The library's own quantizers are decorated with torch.compile: minutes for nothing."""
    before = torch._dynamo.eval_frame._stance
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance(before.stance)


def inputs_of(family: str) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    if family == "vit":
        return torch.randn(3, 64, generator=generator)
    return torch.randint(260, (3, 17), generator=generator)


def logits_here(folder: Path, family: str) -> Tensor:
    looked_at = read_model_folder(str(folder))
    model = load_model(looked_at, seed=1).model
    prepare_inputs(model, looked_at)
    with torch.no_grad():
        found: Tensor = model(inputs_of(family)).logits
    return found


@pytest.mark.parametrize("family", DEEP)
@pytest.mark.usefixtures("eager")
def test_the_untrained_model_gives_the_librarys_own_logits(family: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", family)
    inputs = inputs_of(family)
    inputs = inputs.view(3, 1, 8, 8) if family == "vit" else inputs
    transformers = library()
    config = json.loads((folder / "config.json").read_text())
    cls = getattr(transformers, config["architectures"][0])
    theirs = cls.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    with torch.no_grad():
        wanted = theirs(inputs).logits
    assert torch.equal(logits_here(folder, family), wanted)


@pytest.mark.parametrize("family", DEEP)
def test_twenty_ternary_steps_by_yaml_alone_and_a_resumed_run_is_the_same(
    family: str, tmp_path: Path
) -> None:
    """Planted: the memory of the transposed layer's parameter laid out anew."""
    folder = make_folder(tmp_path / "model", family)
    chosen = settings(family, folder, tmp_path)
    told: list[dict[str, Any]] = []
    straight = run(
        load_pipeline("smoke", chosen), output_dir=tmp_path / "straight", quiet=True,
        on_progress=told.append,
    )  # fmt: skip
    assert straight.outcome == "completed"
    first = run(
        load_pipeline("smoke", [*chosen, "run.max_steps=10"]),
        output_dir=tmp_path / "cut",
        quiet=True,
    )
    assert first.steps == 10
    assert resume(tmp_path / "cut", ["run.max_steps=20"], quiet=True).steps == 20
    left, right = (CheckpointStore(tmp_path / name / "checkpoints").path(20) for name in
                   ("straight", "cut"))  # fmt: skip
    assert differences(left, right) == []
    assert straight.model is not None
    check_ties(family, straight.model)
    check_ties(family, trained_model(tmp_path / "cut"))
    account = json.loads((tmp_path / "straight/quantization.json").read_text())
    check_account(family, account, told)


def check_ties(family: str, model: Any) -> None:
    if family.split("_", maxsplit=1)[0] in TIED and hasattr(model, "lm_head"):
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        assert head.weight is embedding.weight


def check_account(family: str, account: dict[str, Any], told: list[dict[str, Any]]) -> None:
    """What was converted, from which origin; experts are named with their share of the weights."""
    origins = {one["origin"] for one in account["converted"].values()}
    assert origins == ({"packed"} if family in PACKED[1:] else {"latent"})
    per_layer = {"gpt2": 4, "phi3": 4, "bert": 6, "bert_tokens": 6, "vit": 6, "mixtral": 4}
    further = {"bert": 1}.get(family, 0)  # the pooler
    assert len(account["converted"]) == 2 * per_layer.get(family, 7) + further
    if family == "mixtral":
        name = "model.layers.0.mlp.experts"
        assert account["left_weights"][name] == 4 * 3 * 32 * 64
        assert account["left_shares"][name] > 0.2
        (line,) = [one for one in told if one.get("name") == "quantized"]
        assert "MixtralExperts" in line["message"]


@pytest.mark.parametrize(
    "family",
    [PACKED[1], *(pytest.param(name, marks=pytest.mark.deep) for name in (PACKED[0], PACKED[2]))],
)
@pytest.mark.usefixtures("eager")
def test_levels_go_on_where_they_were(family: str, tmp_path: Path) -> None:
    """Planted: a packed weight quantized a second time, which shrinks it by a third."""
    folder = make_folder(tmp_path / "model", family)
    wanted = logits_here(folder, family)
    loaded = load_model(read_model_folder(str(folder)), seed=1).model
    model, report = convert_model_to_bitnet(loaded)
    with torch.no_grad():
        found = model(inputs_of(family)).logits
    assert float((found - wanted).norm() / wanted.norm()) < 1e-3  # an activation's level or two
    assert len(report.layers) == 14
    state = load_file(folder / "model.safetensors")
    about = json.loads((folder / "config.json").read_text())["quantization_config"]
    plain = dequantized_state(state, quantization=about)
    for name, layer in report.layers.items():
        weight = plain[f"{name}.weight"]
        meant = quantize_weight(weight) if family == PACKED[0] else weight
        assert torch.equal(layer.applied_weight(), meant)


@pytest.mark.parametrize("family", ["vit", "bert", "bert_tokens"])
def test_classifiers_are_judged(family: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", family)
    chosen = settings(family, folder, tmp_path, "run.max_steps=2", "data.with.validation_split=0.5",
                      "validators=[{use: classification}]")  # fmt: skip
    result = run(load_pipeline("smoke", chosen), output_dir=tmp_path / "run", quiet=True)
    accuracy = result.final["validation_accuracy"]
    assert accuracy is not None
    assert 0.0 <= accuracy <= 1.0


def test_inputs_by_name_are_brought_into_form_too(tmp_path: Path) -> None:
    folder = read_model_folder(str(make_folder(tmp_path / "model", "bert")))
    model = load_model(folder, seed=1).model
    prepare_inputs(model, folder)
    tokens, mask = inputs_of("bert"), torch.ones(3, 17, dtype=torch.long)
    with torch.no_grad():
        plain, named = model(tokens).logits, model(input_ids=tokens, attention_mask=mask).logits
    torch.testing.assert_close(plain, named)
    with pytest.raises(ValueError, match="64 positions"):
        model(input_ids=tokens.repeat(1, 4))


def test_loading_leaves_no_trace_in_the_process(tmp_path: Path) -> None:
    """Planted: a new head drawn from torch's own stream."""
    folder = read_model_folder(
        str(make_folder(tmp_path / "model", "llama")), "token_classification"
    )
    torch.manual_seed(7)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    dtype = torch.get_default_dtype()
    for options in ({}, {"random": True}):
        loaded = load_model(folder, seed=1, classes=3, dtype="bfloat16", **options)
        assert loaded.model.config.num_labels == 3
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()
    assert torch.get_default_dtype() is dtype
    assert next(loaded.model.parameters()).dtype is torch.bfloat16


def test_new_weights_are_drawn_from_the_seed(tmp_path: Path) -> None:
    folder = read_model_folder(str(make_folder(tmp_path / "model", "llama")), random=True)
    models = [load_model(folder, seed=seed, random=True).model for seed in (1, 1, 2)]
    first, same, other = [model.state_dict() for model in models]
    assert all(torch.equal(value, same[name]) for name, value in first.items())
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    stored = load_model(read_model_folder(str(folder.path)), seed=1).model.state_dict()
    assert not torch.equal(first["lm_head.weight"], stored["lm_head.weight"])


def test_another_task_gets_a_new_head_of_the_datas_classes_and_the_run_says_so(
    tmp_path: Path,
) -> None:
    folder = make_folder(tmp_path / "model", "llama")
    told: list[dict[str, Any]] = []
    chosen = settings("bert", folder, tmp_path, "model.with.task=sequence_classification",
                      "run.max_steps=2")  # fmt: skip
    result = run(
        load_pipeline("smoke", chosen), output_dir=tmp_path / "run", quiet=True,
        on_progress=told.append,
    )  # fmt: skip
    assert result.model is not None
    assert result.model.score.weight.shape == (5, 32)
    (line,) = [one for one in told if one.get("name") == "started_from"]
    assert line["facts"] == {"new": 1, "left_out": 1}
    assert "LlamaForCausalLM" in line["message"]


def test_eager_attention_is_taken_where_it_is_asked_for(tmp_path: Path) -> None:
    folder = read_model_folder(str(make_folder(tmp_path / "model", "llama")))
    for attention in ("sdpa", "eager"):
        model: Any = load_model(folder, seed=1, attention=attention).model
        assert model.config._attn_implementation == attention


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("validator", ["language_model", "classification"])
def test_the_chunked_loss_finds_the_head_and_is_the_plain_loss(
    family: str, validator: str, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "model", family)
    losses = []
    for loss in ("cross_entropy", "language_model"):
        chosen = settings(
            family, folder, tmp_path, f"loss={{use: {loss}}}", "run.max_steps=3",
            f"validators=[{{use: {validator}}}]", "quantizer=null",
        )  # fmt: skip
        result = run(load_pipeline("smoke", chosen), output_dir=tmp_path / loss, quiet=True)
        metrics = (
            result.final["loss"],
            *(v for k, v in sorted(result.final.items()) if "valid" in k),
        )
        losses.append(metrics)
    assert len(losses[0]) > 1
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_soft_cap_behind_the_head_is_refused_by_the_chunked_loss(tmp_path: Path) -> None:
    """Planted: the look at what follows the head left out; the loss was of uncapped logits."""
    from forge_kernel.errors import PluginError

    folder = make_folder(tmp_path / "model", "gemma3", final_logit_softcapping=30.0)
    chosen = settings("gemma3", folder, tmp_path, "loss={use: language_model}")
    with pytest.raises(PluginError, match="soft cap"):
        run(load_pipeline("smoke", chosen), output_dir=tmp_path / "run", quiet=True)


@pytest.mark.parametrize("family", ["llama", "bitnet_autobitlinear"])
@pytest.mark.usefixtures("eager")
def test_a_model_learns_from_itself_and_from_another_run(family: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", family)
    chosen = settings(family, folder, tmp_path, "run.max_steps=3")
    for name, teacher in (("own", "null"), ("other", str(tmp_path / "own"))):
        result = run(
            load_pipeline("smoke", [*chosen, f"loss={{use: distillation, with: {{teacher: {teacher}}}}}"]),
            output_dir=tmp_path / name, quiet=True,
        )  # fmt: skip
        assert result.final["distillation"] is not None


def test_a_sharded_folder_and_a_pickled_one_are_the_same_model(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "llama")
    wanted = logits_here(folder, "llama")
    transformers = library()
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    looked_at = read_model_folder(str(tmp_path / "shards"))
    assert len(looked_at.files) > 2
    assert torch.equal(logits_here(tmp_path / "shards", "llama"), wanted)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save(load_file(folder / "model.safetensors"), pickled / "pytorch_model.bin")
    assert torch.equal(logits_here(pickled, "llama"), wanted)
