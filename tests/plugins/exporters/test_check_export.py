"""What an exporter cannot write is told before the first step, with what can be done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from clients import need
from live_exports import batches, live_run, manifest
from onnx_networks import ask_here
from torch import Tensor, nn

from forge_kernel import load_pipeline, plan
from forge_kernel.errors import PlanError, PluginError
from forge_plugins.mathematics.networks.llama import Llama, LlamaShape
from forge_plugins.mathematics.networks.mlp import Mlp

TOKENS = [(torch.randint(257, (2, 8)), torch.randint(257, (2, 8)))]


def llama(**shape: Any) -> Llama:
    sizes = {"width": 256, "layers": 1, "heads": 4, "groups": 2, "hidden": 256, **shape}
    return Llama(LlamaShape(vocabulary=257, context=16, **sizes))


class Sparse(nn.Linear):
    """With a tensor that no safetensors file holds."""

    def __init__(self, kept: Tensor) -> None:
        super().__init__(4, 3)
        self.register_buffer("kept", kept)


class Foreign(nn.Module):
    """With an extra state that is only plain on the outside."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs)

    def get_extra_state(self) -> Any:
        return Texts(a=1)

    def set_extra_state(self, state: Any) -> None:
        del state


class Texts(dict[str, Any]):
    """A dictionary of a class that the default loader does not know."""


def refusal(model: nn.Module, data: Any, folder: Path, exporters: str, *settings: str) -> str:
    """What is said; no step is taken."""
    steps: list[Any] = []
    with pytest.raises((PluginError, PlanError)) as told:
        live_run(model, data, folder, exporters, *settings, on_progress=steps.append)
    assert not [event for event in steps if event["event"] == "log"]
    return str(told.value)


@pytest.mark.parametrize(
    ("exporter", "shape", "words"),
    [
        ("{use: gguf}", {"activation": "relu2"}, "activation: silu"),
        ("{use: gguf}", {"hidden": 300}, "multiple of 256"),
        ("{use: gguf}", {"sub_norms": True}, "tied: true"),
        ("{use: transformers}", {"hidden": 258}, "multiple of 4"),
        ("{use: transformers}", {"sub_norms": True, "feed_bias": True}, "feed_bias"),
    ],
)
def test_a_live_llama_that_a_client_cannot_compute(
    exporter: str, shape: dict[str, Any], words: str, tmp_path: Path
) -> None:
    assert words in refusal(llama(**shape), TOKENS, tmp_path / "run", exporter)


@pytest.mark.parametrize("exporter", ["gguf", "transformers"])
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("{weight_bits: 4}", "weights of 4 bits"),
        ("{weight_bits: 8}", "weights of 8 bits"),
        ("{granularity: row}", "each row"),
        ("{activation_bits: 4}", "activations of 4 bits"),
        ("{sub_norm: ['*attention.output']}", "norm in front"),
    ],
)
def test_levels_that_a_format_does_not_hold_name_the_format_that_does(
    exporter: str, settings: str, words: str, tmp_path: Path
) -> None:
    said = refusal(
        llama(), TOKENS, tmp_path / "run", f"{{use: {exporter}}}", f"quantizer.with={settings}"
    )
    if words.startswith("weights of"):
        assert "packed_ternary" in said  # known when the run is planned
    else:
        assert words in said
        assert "packed_ternary" in said
    done = live_run(
        llama(), TOKENS, tmp_path / "other", "{use: packed_ternary}", f"quantizer.with={settings}"
    )
    assert done.failed_exports == {}


@pytest.mark.parametrize("exporter", ["gguf", "transformers"])
def test_another_architecture(exporter: str, tmp_path: Path) -> None:
    said = refusal(nn.Linear(4, 3), batches(), tmp_path / "run", f"{{use: {exporter}}}")
    assert "Linear is no architecture" in said
    assert "packed_ternary" in said


def test_integer_products_want_eight_bit_activations(tmp_path: Path) -> None:
    said = refusal(
        Mlp(features=4, hidden=(8,), outputs=3), batches(), tmp_path / "run",
        "{use: onnx, with: {weights: matmul_integer}}", "quantizer.with.activation_bits=16",
    )  # fmt: skip
    assert "matmul_nbits" in said


@pytest.mark.parametrize("settings", ["{weight_bits: 1}", "{rounding: learned_threshold}"])
def test_weights_that_the_client_would_quantize_otherwise(settings: str, tmp_path: Path) -> None:
    said = refusal(
        llama(), TOKENS, tmp_path / "run", "{use: transformers, with: {layout: online}}",
        f"quantizer.with={settings}",
    )  # fmt: skip
    assert "bitlinear" in said


@pytest.mark.parametrize("exporter", ["{use: packed_ternary}", "{use: state_dict}"])
@pytest.mark.parametrize("kept", [torch.eye(3).to_sparse(), torch.zeros(2, dtype=torch.complex128)])
def test_tensors_that_no_safetensors_file_holds(
    exporter: str, kept: Tensor, tmp_path: Path
) -> None:
    said = refusal(nn.Sequential(Sparse(kept)), batches(), tmp_path / "run", exporter,
                   "quantizer.with.skip=[]")  # fmt: skip
    assert "0.kept" in said
    assert "phase6" in said


def test_weights_that_have_no_levels(tmp_path: Path) -> None:
    for exporter in ("{use: packed_ternary}", "{use: state_dict, with: {weights: applied}}"):
        said = refusal(nn.Linear(4, 3), batches(), tmp_path / "run", exporter, "quantizer=null")
        assert "quantized" in said
    said = refusal(
        nn.Linear(4, 3), batches(), tmp_path / "run", "{use: packed_ternary}",
        "quantizer.with={weight_bits: 16}",
    )  # fmt: skip
    assert "quantized" in said


def test_an_extra_state_that_the_default_loader_refuses(tmp_path: Path) -> None:
    assert "get_extra_state" in refusal(
        Foreign(), batches(), tmp_path / "run", "{use: phase6}", "quantizer=null"
    )


def test_all_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    said = refusal(nn.Linear(4, 3), batches(), tmp_path / "run", "{use: gguf}, {use: transformers}")
    assert said.count("Linear is no architecture") == 2


class Undecided(nn.Module):
    """With a decision by the values of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.layer(inputs)
        return outputs if outputs.sum() > 0 else -outputs


def test_a_forward_pass_that_onnx_cannot_hold(tmp_path: Path) -> None:
    need("onnx", "onnxscript")
    data = batches()
    said = refusal(Undecided(), (data, data), tmp_path / "run", "{use: onnx}")
    assert "the model (Undecided): Could not guard on data-dependent" in said
    several = [({"input": inputs}, targets) for inputs, targets in data]
    said = refusal(nn.Linear(4, 3), (several, several), tmp_path / "other", "{use: onnx}")
    assert "the inputs of a batch are a dict" in said


def test_onnx_holds_levels_that_other_formats_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("onnx", "onnxscript", "onnxruntime")
    ask_here(monkeypatch)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    done = live_run(
        model, (batches(), batches()), tmp_path / "run", "{use: onnx}",
        "quantizer.with={weight_bits: 4, granularity: group, group_size: 4, activation_bits: 4, "
        "sub_norm: ['2'], skip: []}",
    )  # fmt: skip
    assert done.failed_exports == {}
    told = manifest(tmp_path / "run", "onnx")
    assert told["packed_weights"] == 4 * 16 + 16 * 3
    assert told["packed_bytes"] == told["packed_weights"] * (1 / 2 + 4 / 4)
    assert told["verified"]["relative_l2"] <= 1e-2


def test_looking_at_an_export_beforehand_changes_nothing(tmp_path: Path) -> None:
    """Planted: random numbers drawn for the example, a model left in evaluation."""
    need("onnx", "onnxscript")

    def data() -> Any:
        """Without a validation set, and readable once: the first batch is the example."""
        return iter(batches())

    def weights(exporters: str) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = Mlp(features=4, hidden=(8,), outputs=3, dropout=0.5)
        folder = tmp_path / str(len(exporters))
        done = live_run(model, data(), folder, exporters)
        assert done.failed_exports == {}
        return model.state_dict()

    seen = weights("{use: onnx, with: {verify: false}}")
    for name, value in weights("").items():
        assert torch.equal(seen[name], value)


class Pooled(nn.Module):
    """Whose ONNX operators keep the length that they were made with."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(257, 16)
        self.pool = nn.AdaptiveAvgPool1d(2)
        self.layer = nn.Linear(32, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layer(self.pool(self.embedding(tokens).transpose(1, 2)).flatten(1))


def test_a_length_that_the_file_cannot_leave_open_is_fixed_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("onnx", "onnxscript", "onnxruntime")
    ask_here(monkeypatch)
    import onnx

    data = [(torch.randint(257, (4, 8)), torch.randint(3, (4,)))]
    done = live_run(
        Pooled(), (data, data), tmp_path / "run", "{use: onnx}", "quantizer.with.skip=[]"
    )
    assert done.failed_exports == {}
    told = manifest(tmp_path / "run", "onnx")
    assert told["any_length"] is False
    assert told["verified"]["relative_l2"] <= 1e-2
    inputs = onnx.load(tmp_path / "run/exports/onnx/model.onnx").graph.input[0]
    assert [one.dim_value for one in inputs.type.tensor_type.shape.dim] == [0, 8]


def test_a_library_that_is_missing_is_told_when_the_run_is_planned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from importlib.util import find_spec

    def without(name: str) -> Any:
        return None if name == "onnxscript" else find_spec(name)

    monkeypatch.setattr("forge_kernel.planning.plan.find_spec", without)
    with pytest.raises(PlanError, match=r"onnxscript.*\n?.*pip install 'forge-kernel\[onnx\]'"):
        plan(load_pipeline("smoke", ["exporters=[{use: onnx}]"]))
