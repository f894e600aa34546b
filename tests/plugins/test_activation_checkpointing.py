"""Activation checkpointing: the same training with less kept for the way back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_parts import make_session
from torch import nn

from forge_kernel import RunResult, load_pipeline, run
from forge_kernel.api import Kind, PluginError
from forge_kernel.config.use import UseWrapper
from forge_kernel.contract.hookspecs import hookimpl
from forge_kernel.contract.plugin import PluginInfo
from forge_kernel.contract.values import Batch
from forge_kernel.runner import resume
from forge_kernel.training.loaders.in_memory import NoConfig

SETTINGS = [
    "run.max_steps=6", "run.device=cpu", "run.save_every=3", "data.with.modulus=11",
    "model.with.dropout=0.1", "callbacks=[]", "exporters=[]", "run.validate_every=3",
    "schedule={use: constant}",
]  # fmt: skip
WRAPPED = "wrappers=[{use: activation_checkpointing}]"


class Kept:
    """Bytes that a step keeps for the way back."""

    info = PluginInfo(name="kept", kind=Kind.OBSERVERS, config=NoConfig)
    config = NoConfig()

    def __init__(self) -> None:
        self.bytes = 0

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.bytes += tensor.numel() * tensor.element_size()
        return tensor

    @hookimpl
    def on_batch(self, run: Any, step: Any, batch: Any) -> None:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held)
        self._hooks.__enter__()

    @hookimpl
    def on_step_end(self, run: Any, step: Any) -> None:
        self._hooks.__exit__()


def train(folder: Path, *settings: str, plugins: Any = ()) -> RunResult:
    pipeline = load_pipeline("bitnet_grokfast", [*SETTINGS, *settings])
    return run(pipeline, output_dir=folder, quiet=True, plugins=list(plugins))


@pytest.mark.spec("K6")
@pytest.mark.parametrize("quantizer", ["quantizer=null", "quantizer.with.rounding=stochastic"])
def test_the_weights_are_the_same_to_the_bit(tmp_path: Path, quantizer: str) -> None:
    # Planted: the random state not kept (preserve_rng_state=False): dropout differs.
    plain = train(tmp_path / "plain", quantizer).model
    wrapped = train(tmp_path / "wrapped", quantizer, WRAPPED).model
    assert plain is not None
    assert wrapped is not None
    assert wrapped.state_dict().keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, wrapped.state_dict()[name]), name


@pytest.mark.spec("K6")
def test_less_is_kept_for_the_way_back(tmp_path: Path) -> None:
    # Planted: `every` ignored (half keeps as little as all), no layer wrapped (ratio 1).
    kept = {}
    for name, settings in (
        ("none", []), ("half", [WRAPPED.replace("}]", ", with: {every: 2}}]")]), ("all", [WRAPPED]),
    ):  # fmt: skip
        counter = Kept()
        train(tmp_path / name, *settings, "quantizer=null", "run.max_steps=1", plugins=[counter])
        kept[name] = counter.bytes
    assert kept["all"] < 0.3 * kept["none"]
    assert kept["all"] < kept["half"] < kept["none"]


def test_a_resumed_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    straight = train(tmp_path / "straight", WRAPPED).model
    first = train(tmp_path / "parts", WRAPPED, "run.max_steps=3")
    assert first.folder is not None
    again = resume(first.folder, ["run.max_steps=6"], quiet=True).model
    assert straight is not None
    assert again is not None
    for one, other in zip(straight.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_name_that_no_layer_has_is_refused(tmp_path: Path) -> None:
    named = WRAPPED.replace("}]", ", with: {layers: ['encoder.*']}}]")
    with pytest.raises(PluginError, match=r"no layer of .* is named \['encoder"):
        train(tmp_path / "run", named)


def test_an_averaged_copy_computes_with_its_own_weights(tmp_path: Path) -> None:
    """Planted fault: a closure over the layer, which a copy of the model shares."""
    average = "callbacks=[{use: weight_average, with: {decay: 0.9, warm: false}}]"
    plain = train(tmp_path / "plain", average)
    wrapped = train(tmp_path / "wrapped", average, WRAPPED)
    assert wrapped.final["validation_loss"] == plain.final["validation_loss"]


def test_a_wrapped_model_can_be_copied_and_pickled(tmp_path: Path) -> None:
    model = train(tmp_path / "wrapped", "quantizer=null", WRAPPED).model
    assert model is not None
    torch.save(model.eval(), tmp_path / "model.pt")
    tokens = torch.arange(8).view(2, 4)
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    for one in (copy.deepcopy(model), again):
        with torch.no_grad():
            assert torch.equal(one(tokens), model(tokens))
            one.blocks[0].expand.weight.zero_()
            assert not torch.equal(one(tokens), model(tokens))


class Normed(nn.Module):
    """A block whose forward pass writes running means."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.linear(inputs)))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_running_means_are_written_once(accumulate: int) -> None:
    """Red when the second forward pass writes them again."""

    def trained(uses: dict[str, Any]) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(Normed(), Normed(), nn.Linear(6, 3))
        batches = [Batch(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(accumulate)]
        session = make_session(model, batches, uses=uses, accumulate=accumulate)
        for _ in range(3):
            session.step(*batches)
        return model.state_dict()

    plain = trained({})
    again = trained({"wrappers": (UseWrapper("activation_checkpointing"),)})
    assert int(plain["0.norm.num_batches_tracked"]) == 3 * accumulate
    for name, value in plain.items():
        assert torch.equal(again[name], value), name
