"""What is left unquantized is named with its weights; what would be lost is left."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from live_exports import batches, live_run
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from forge_plugins.mathematics.quantization.bit_conv2d import BitConv2d
from forge_plugins.mathematics.quantization.bit_linear import BitLinear
from forge_plugins.mathematics.quantization.conversion import convert_model_to_bitnet


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Helped(nn.Linear):
    """Another layer calls `halved`."""

    def halved(self, inputs: Tensor) -> Tensor:
        return self(inputs) / 2


class Loading(nn.Linear):
    def _load_from_state_dict(self, *arguments: Any, **named: Any) -> None:
        super()._load_from_state_dict(*arguments, **named)


class Drawn(nn.Linear):
    """Nothing but other first weights: the same layer."""

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def replaced(layer: nn.Module) -> None:
    old = layer.forward
    layer.forward = lambda inputs: old(inputs) * 2


def compiled(layer: nn.Module) -> None:
    layer.compile(backend="eager")


def with_parameter(layer: nn.Module) -> None:
    layer.register_parameter("gain", nn.Parameter(torch.ones(1)))


def with_module(layer: nn.Module) -> None:
    layer.add_module("adapter", nn.Linear(2, 2))


def with_bias_of(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "bias", Doubled())


def with_scale(layer: nn.Module) -> None:
    layer.scale = 3.0


def with_reference_scale(layer: nn.Module) -> None:
    layer.register_buffer("reference_scale", torch.ones(1))


def in_whole_numbers(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda layer: layer.register_forward_hook(lambda *_: None),
    "forward with names": lambda layer: layer.register_forward_hook(
        lambda *_: None, with_kwargs=True
    ),
    "before forward": lambda layer: layer.register_forward_pre_hook(lambda *_: None),
    "backward": lambda layer: layer.register_full_backward_hook(lambda *_: None),
    "before backward": lambda layer: layer.register_full_backward_pre_hook(lambda *_: None),
    "state": lambda layer: layer.register_state_dict_post_hook(lambda *_: None),
    "before state": lambda layer: layer.register_state_dict_pre_hook(lambda *_: None),
    "loading": lambda layer: layer.register_load_state_dict_pre_hook(lambda *_: None),
    "loaded": lambda layer: layer.register_load_state_dict_post_hook(lambda *_: None),
}
CHANGES: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    **{f"hook: {name}": (hook, "hooks") for name, hook in HOOKS.items()},
    "forward replaced": (replaced, "replaced on the instance"),
    "compiled": (compiled, "compiled by itself"),
    "weight norm": (parametrizations.weight_norm, "parametrized"),
    "old weight norm": (nn.utils.weight_norm, "parametrized"),
    "spectral norm": (parametrizations.spectral_norm, "parametrized"),
    "parametrized bias": (with_bias_of, "its bias is computed"),
    "parameter": (with_parameter, "parameters of its own (gain)"),
    "module": (with_module, "modules of its own (adapter)"),
    "name in use": (with_scale, "another use for its scale"),
    "buffer in use": (with_reference_scale, "another use for its reference_scale"),
    "whole numbers": (in_whole_numbers, "int8"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", CHANGES)
def test_a_layer_to_which_something_was_done_stays_with_the_reason(name: str) -> None:
    change, words = CHANGES[name]
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    change(model[0])
    layer = model[0]
    _, report = convert_model_to_bitnet(model)
    assert model[0] is layer
    assert words in report.left["0"]
    assert isinstance(model[1], BitLinear)


@pytest.mark.parametrize(
    "name", ["hook: forward", "forward replaced", "parameter", "buffer in use"]
)
def test_a_convolution_to_which_something_was_done_stays_too(name: str) -> None:
    change, words = CHANGES[name]
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    change(model[0])
    _, report = convert_model_to_bitnet(model, convolutions=True)
    assert words in report.left["0"]
    assert isinstance(model[1], BitConv2d)


@pytest.mark.parametrize(
    ("kind", "words"), [(Helped, "halved of its own"), (Loading, "_load_from_state_dict")]
)
def test_a_subclass_with_behaviour_of_its_own_stays(kind: type[nn.Linear], words: str) -> None:
    _, report = convert_model_to_bitnet(nn.Sequential(kind(4, 4)))
    assert words in report.left["0"]


def test_a_subclass_that_only_draws_other_weights_is_converted() -> None:
    _, report = convert_model_to_bitnet(nn.Sequential(Drawn(4, 4), nn.Linear(4, 4)))
    assert set(report.layers) == {"0", "1"}


@pytest.mark.parametrize("persistent", [True, False])
def test_buffers_and_attributes_go_on(persistent: bool) -> None:
    """Planted: only the parameters are taken over."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(1, 1, 1))
    for layer in model:
        layer.register_buffer("seen", torch.arange(3), persistent=persistent)
        layer.note = {"from": "outside"}
    notes = [layer.note for layer in model]
    keys = list(model.state_dict())
    convert_model_to_bitnet(model, convolutions=True)
    assert [type(layer) for layer in model] == [BitLinear, BitConv2d]
    assert [layer.note for layer in model] == notes
    assert torch.equal(model[0].seen, torch.arange(3))
    assert list(model.state_dict()) == keys


def test_a_replaced_forward_is_called_in_a_run(tmp_path: Path) -> None:
    calls: list[int] = []
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    old = model[0].forward

    def forward(inputs: Tensor) -> Tensor:
        calls.append(1)
        return old(inputs) * 2

    model[0].forward = forward
    live_run(model, batches(), tmp_path / "run", "")
    assert calls


# -- heads -----------------------------------------------------------------------------------------


class Task(nn.Module):
    """A body and a head by some name."""

    def __init__(self, name: str, head: nn.Module) -> None:
        super().__init__()
        self.body = nn.Linear(4, 8)
        self.name = name
        self.add_module(name, head)

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.get_submodule(self.name)(torch.relu(self.body(inputs)))
        return found


class Output(Task):
    """A head that only a method tells."""

    def get_output_embeddings(self) -> nn.Module:
        return self.get_submodule(self.name)


@pytest.mark.parametrize(
    "name",
    ["head", "lm_head", "classifier", "score", "qa_outputs", "output_embeddings", "embed_out"],
)
@pytest.mark.parametrize("inside", [False, True])
def test_task_heads_stay_by_default(name: str, inside: bool) -> None:
    model: nn.Module = Task(name, nn.Linear(8, 3))
    model = nn.ModuleDict({"model": model}) if inside else model
    _, report = convert_model_to_bitnet(model)
    assert [one.rpartition(".")[2] for one in report.layers] == ["body"]
    _, report = convert_model_to_bitnet(model, skip=[])
    assert len(report.layers) == 2


@pytest.mark.parametrize("name", ["lm_head", "classifier", "classification_head"])
def test_heads_of_several_layers_stay_by_default(name: str) -> None:
    head = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    _, report = convert_model_to_bitnet(Task(name, head))
    assert list(report.layers) == ["body"]


def test_what_a_model_says_makes_its_outputs_stays_by_default() -> None:
    _, report = convert_model_to_bitnet(Output("to_words", nn.Linear(8, 3)))
    assert list(report.layers) == ["body"]
    assert "Output.get_output_embeddings()" in report.left["to_words"]
    _, report = convert_model_to_bitnet(Output("to_words", nn.Linear(8, 3)), skip=["body"])
    assert list(report.layers) == ["to_words"]


def test_the_last_layer_of_a_perceptron_is_no_head() -> None:
    _, report = convert_model_to_bitnet(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)))
    assert set(report.layers) == {"0", "1"}


# -- the account -----------------------------------------------------------------------------------


class Experts(nn.Module):
    """Fused experts: one parameter of three dimensions for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 4, 8))
        self.down = nn.Parameter(torch.randn(2, 8, 4))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.einsum("bi,eio,eoj->bj", inputs, self.up, self.down)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(1, 1, 3, padding=1)
        self.experts = Experts()
        self.memory = nn.GRU(4, 4, batch_first=True)
        self.body = nn.Linear(4, 8)
        self.norm = nn.LayerNorm(8)
        self.score = nn.Linear(8, 3, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        mixed = self.experts(self.mix(inputs[:, None])[:, 0])
        found: Tensor = self.score(self.norm(self.body(self.memory(mixed[:, None])[0][:, 0])))
        return found


def test_whatever_stays_is_named_with_its_weights_on_the_screen_and_in_the_account(
    tmp_path: Path,
) -> None:
    told: list[dict[str, Any]] = []
    model = Mixed()
    total = sum(parameter.numel() for parameter in model.parameters())
    live_run(model, batches(), tmp_path / "run", "", on_progress=told.append)
    account = json.loads((tmp_path / "run/quantization.json").read_text())
    assert account["weights"] == total
    assert account["converted_weights"] == 32
    assert account["left_weights"] == {
        "score": 24, "mix": 4, "experts": 128, "memory": 2 * (12 * 4) + 2 * 12,
    }  # fmt: skip
    assert account["left_shares"]["experts"] == pytest.approx(128 / total, abs=1e-6)
    for name, words in {"experts": "up, down", "mix": "Conv1d", "memory": "GRU"}.items():
        assert words in account["left"][name]
    assert sum(account["left_kinds"].values()) == total - 32
    (line,) = [one for one in told if one.get("name") == "quantized"]
    assert "32 of" in line["message"]
    for words in ("128", "Experts", "convolutions", "GRU", "named by skip", "norms, biases"):
        assert words in line["message"]
    assert line["facts"] == {
        "weights": total, "converted_weights": 32, "left_weights": total - 32,
    }  # fmt: skip


def test_shared_weights_count_once() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(8, 4), "body": nn.Linear(4, 4, bias=False)})
    model["again"] = model["body"]
    model["lm_head"] = nn.Linear(4, 8, bias=False)
    model["lm_head"].weight = model["embed"].weight
    _, report = convert_model_to_bitnet(model)
    assert report.weights == 32 + 16
    assert report.converted_weights == 16
    assert report.left_weights == {"embed": 32, "lm_head": 32}
    assert report.left_kinds == {"in embeddings": 32}
    assert report.summary().startswith("16 of 48 weights (33.3%) are quantized")


def test_all_weights_on_levels_leave_nothing_to_tell() -> None:
    _, report = convert_model_to_bitnet(nn.Sequential(nn.Linear(4, 4, bias=False)))
    assert report.summary() == "16 of 16 weights (100.0%) are quantized"
    assert report.left == {}


@pytest.mark.parametrize("kind", ["MixtralForCausalLM", "Qwen2MoeForCausalLM"])
def test_the_experts_of_a_mixture_are_named(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32,
        "num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 48,
    }  # fmt: skip
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**sizes))
    total = sum(parameter.numel() for parameter in model.parameters())
    _, report = convert_model_to_bitnet(model)
    experts = [name for name in report.left if name.endswith("experts")]
    assert [report.left_weights[name] for name in experts] == [4 * 3 * 32 * 48]
    assert report.weights == total
    assert report.converted_weights + sum(report.left_kinds.values()) == total
    assert "lm_head" in report.left


def test_the_transposed_layers_of_gpt2_are_converted_as_they_stand() -> None:
    """The same parameters, of the same shapes, under the same names; the head stays."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=1,
        n_head=2,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config)
    before = {name: (id(one), one.shape) for name, one in model.named_parameters()}
    values = {name: value.clone() for name, value in model.state_dict().items()}
    _, report = convert_model_to_bitnet(model)
    assert {name: (id(one), one.shape) for name, one in model.named_parameters()} == before
    assert list(model.state_dict()) == list(values)
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert len(report.layers) == 4
    assert report.converted_weights == 32 * (96 + 32 + 128 + 128)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert sum(report.left_kinds.values()) + report.converted_weights == report.weights
