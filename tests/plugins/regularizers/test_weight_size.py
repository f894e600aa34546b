"""Regularizers of the weights' size: by hand, on the weights that are meant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_parts import make_session
from torch import nn

from forge_kernel.config.use import UseQuantizer, UseRegularizer
from forge_kernel.contract.values import Batch
from forge_kernel.errors import PluginError
from forge_plugins.mathematics.quantization.weight_size import mean_magnitude, mean_square

BATCH = Batch(torch.zeros(5, 4), torch.tensor([0, 1, 2, 0, 1]))


def session(model: nn.Module, *, quantized: bool = False, **config: Any) -> Any:
    uses: dict[str, Any] = {"regularizers": (UseRegularizer("weight_size", config),)}
    if quantized:
        uses["quantizer"] = UseQuantizer("bitnet", {})
    return make_session(model, [BATCH], uses=uses, lr=1.0, log_every=1)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))


def test_the_measures_are_their_formulas_and_count_tied_weights_once() -> None:
    """Planted: the mean of the tensors' means."""
    one, two = torch.randn(3, 4), torch.randn(5)
    entries = torch.cat([one.flatten(), two])
    torch.testing.assert_close(mean_square([one, two, one]), entries.square().mean())
    scaled = [value / value.square().mean().sqrt() for value in (one, two)]
    expected = torch.cat([value.flatten() for value in scaled]).abs().mean()
    torch.testing.assert_close(mean_magnitude([one, two, one]), expected)
    torch.testing.assert_close(mean_magnitude([7 * one, two]), expected)


def test_the_square_draws_each_trained_weight_by_its_share() -> None:
    """Planted: frozen weights counted; the strength squared."""
    model = network()
    model[2].bias.requires_grad_(requires_grad=False)
    before = model[0].weight.detach().clone()
    count = sum(one.numel() for one in model.parameters() if one.requires_grad)
    running = session(model, strength=0.5)
    running.step(BATCH)  # inputs are zeros: the loss has no gradient for the first weight
    torch.testing.assert_close(model[0].weight.detach(), before - 0.5 * 2 * before / count)
    assert running.log().metrics["weight_square"] > 0


def test_the_magnitude_of_quantized_weights_leaves_the_others_alone() -> None:
    model = network()
    model.append(nn.LayerNorm(3))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    plain = network()
    plain.append(nn.LayerNorm(3))
    without = make_session(plain, [BATCH], uses={"quantizer": UseQuantizer("bitnet", {})}, lr=1.0)
    without.step(BATCH)
    running = session(model, quantized=True, strength=0.3, measure="magnitude", weights="quantized")
    running.step(BATCH)
    torch.testing.assert_close(model[3].weight, plain[3].weight)
    moved = model[0].weight.detach() - before["0.weight"]
    assert torch.equal(moved.sign(), -before["0.weight"].sign())


def test_quantized_weights_that_are_not_there_or_not_trained_are_refused() -> None:
    with pytest.raises(PluginError, match="no quantized weights to train"):
        session(network(), weights="quantized")
    model = network()
    model[0].weight.requires_grad_(requires_grad=False)
    model[2].weight.requires_grad_(requires_grad=False)
    with pytest.raises(PluginError, match="no quantized weights to train"):
        session(model, quantized=True, weights="quantized")
