"""BitNet of the Phase 5 face: what its settings do to weights that are really applied."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from agent_forge.phases.phase5_training.configuration import SettingError
from agent_forge.phases.phase5_training.pipeline.bitnet_optimizer import (
    BitNetConfig,
    BitNetLayer,
    BitNetLossFunction,
    BitNetOptimizer,
    BitNetQuantizer,
    QuantizationMode,
    StraightThroughEstimator,
    convert_model_to_bitnet,
    mean_quantization_distance,
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))


def applied(layer: nn.Module) -> Tensor:
    """The weight that a layer really multiplies with, seen from outside by unit inputs."""
    width = int(layer.in_features)  # type: ignore[arg-type]
    with torch.no_grad():
        return (layer(torch.eye(width)) - layer(torch.zeros(1, width))).T


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    torch.manual_seed(1)
    inputs = torch.randn(64, 16)
    targets = inputs[:, :4].argmax(1)
    losses = []
    for _ in range(steps):
        loss = functional.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("bits", "most"), [(1, 2), (1.58, 3), ("ternary", 3), ("binary", 2), (2, 3), (4, 15)]
)
def test_the_applied_weight_has_the_levels_that_weight_bits_says(bits: Any, most: int) -> None:
    """Spec: D4, D12. Planted: weight_bits not handed on (three levels for each)."""
    model = convert_model_to_bitnet(network(), BitNetConfig(weight_bits=bits))
    values = applied(model[0]).unique()  # type: ignore[index]
    rounded = (values / values.abs().max() * 1000).round().unique()
    assert 2 <= len(rounded) <= most
    assert len(rounded) == most or bits == 4


def test_full_precision_bits_leave_the_outputs_alone() -> None:
    """Spec: D4, D5."""
    plain = network()
    config = BitNetConfig(weight_bits=16, activation_bits=16)
    model = convert_model_to_bitnet(copy.deepcopy(plain), config)
    inputs = torch.randn(5, 16)
    assert torch.equal(model(inputs), plain(inputs))


def test_activation_bits_change_the_outputs() -> None:
    """Spec: D5."""
    inputs = torch.randn(5, 16)
    found = [
        convert_model_to_bitnet(network(), BitNetConfig(activation_bits=bits))(inputs)
        for bits in (4, 8, 16)
    ]
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


def test_stochastic_rounding_is_the_weight_in_the_mean_and_still_in_evaluation() -> None:
    """Spec: D3, D2."""
    layer = nn.Linear(6, 5, bias=False)
    config = BitNetConfig(
        weight_bits=1.58, activation_bits=16, quantization_mode=QuantizationMode.STOCHASTIC
    )
    model = convert_model_to_bitnet(layer, config)
    torch.manual_seed(3)
    draws = torch.stack([applied(model) for _ in range(10_000)])
    step = draws.abs().max()
    weight = layer.weight.detach().clamp(-step, step)
    error = (draws.mean(0) - weight).abs() / (draws.std(0) / 100).clamp_min(1e-6)
    assert float(error.max()) < 4.0  # 30 weights, four sigma
    model.eval()
    assert torch.equal(applied(model), applied(model))


def test_without_the_estimator_quantized_weights_keep_their_values() -> None:
    """Spec: D6, D13."""
    model = convert_model_to_bitnet(network(), BitNetConfig(straight_through_estimator=False))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = BitNetOptimizer(model.parameters(), BitNetConfig(weight_decay=0.0))
    train(model, optimizer, 5)
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert moved == [False, True, False, True]  # weight, bias, weight, bias


def test_the_estimators_gradient_is_that_of_the_identity() -> None:
    """Spec: D6, D13."""
    latent = torch.randn(4, 4, requires_grad=True)
    upstream = torch.randn(4, 4)
    StraightThroughEstimator.apply(latent, latent.detach().sign()).backward(upstream)  # type: ignore[no-untyped-call]
    assert torch.equal(latent.grad, upstream)  # type: ignore[arg-type]


@pytest.mark.parametrize("total", [100, 4000])
def test_the_optimizer_leads_the_warmup_and_a_short_run_ends_quantized(total: int) -> None:
    """Spec: D7, D17. Planted: `settle` not called: the weights stay in full precision."""
    config = BitNetConfig(quantization_warmup_steps=1000, activation_bits=16)
    plain = network()
    model: Any = convert_model_to_bitnet(copy.deepcopy(plain), config)
    optimizer = BitNetOptimizer(model.parameters(), config, total_steps=total)
    assert torch.allclose(applied(model[0]), plain[0].weight, atol=1e-6)  # type: ignore[arg-type]
    train(model, optimizer, 100)
    levels = len((applied(model[0]) * 1e4).round().unique())
    assert levels == 2 if total == 100 else levels > 50
    assert optimizer.get_quantization_info()["blend"] == (1.0 if total == 100 else 0.1)


def blend(optimizer: BitNetOptimizer) -> Any:
    return optimizer.get_quantization_info()["blend"]


@pytest.mark.parametrize("steps", [1, 10, 40])
def test_a_warmup_that_was_set_is_made_though_the_runs_length_is_not_known(steps: int) -> None:
    """Planted: quantized from the first step, whatever was set."""
    config = BitNetConfig(quantization_warmup_steps=steps, activation_bits=16)
    plain = network()
    model: Any = convert_model_to_bitnet(copy.deepcopy(plain), config)
    optimizer = BitNetOptimizer(model.parameters(), config)
    assert torch.allclose(applied(model[0]), plain[0].weight, atol=1e-6)  # type: ignore[arg-type]
    seen = []
    for _ in range(steps + 2):
        seen.append(blend(optimizer))
        train(model, optimizer, 1)
    assert seen == pytest.approx([min(1.0, done / steps) for done in range(steps + 2)])
    assert len((applied(model[0]) * 1e4).round().unique()) == 2


def test_a_ramp_that_was_set_is_made_though_the_runs_length_is_not_known() -> None:
    config = BitNetConfig(
        target_sparsity=0.5, sparsity_warmup_steps=10, quantization_warmup_steps=0
    )
    model: Any = convert_model_to_bitnet(network(), config)
    optimizer = BitNetOptimizer(model.parameters(), config)
    train(model, optimizer, 5)
    assert optimizer.get_quantization_info()["target_sparsity"] == pytest.approx(0.25)


def test_a_warmup_that_nobody_set_is_none_where_the_length_is_not_known() -> None:
    """A short run would end in full precision otherwise, and nobody would know."""
    for config in (BitNetConfig(), BitNetConfig(target_sparsity=0.5)):
        model: Any = convert_model_to_bitnet(network(), config)
        optimizer = BitNetOptimizer(model.parameters(), config)
        info = optimizer.get_quantization_info()
        assert (info["blend"], info["target_sparsity"]) == (1.0, config.target_sparsity)
    config = BitNetConfig(quantization_warmup_steps=8)
    config.full_precision_warmup = False
    model = convert_model_to_bitnet(network(), config)
    assert blend(BitNetOptimizer(model.parameters(), config)) == 1.0


def test_full_precision_warmup_off_quantizes_from_the_first_step() -> None:
    """Spec: D7."""
    config = BitNetConfig(full_precision_warmup=False, activation_bits=16)
    model: Any = convert_model_to_bitnet(network(), config)
    BitNetOptimizer(model.parameters(), config, total_steps=4000)
    assert len((applied(model[0]) * 1e4).round().unique()) == 2


def test_sparsity_rises_to_its_target_in_the_applied_weights() -> None:
    """Spec: D8, D9, D16. Planted: the ramp left at its start."""
    config = BitNetConfig(sparsity_target=0.5, sparsity_warmup_steps=10, activation_bits=16,
                          quantization_warmup_steps=0)  # fmt: skip
    assert config.target_sparsity == config.sparsity_target == 0.5
    model: Any = convert_model_to_bitnet(network(), config)
    optimizer = BitNetOptimizer(model.parameters(), config, total_steps=100)
    assert float((applied(model[0]) == 0).float().mean()) == 0.0
    train(model, optimizer, 20)
    share = float((applied(model[0]).abs() < 1e-6).float().mean())
    assert share >= 0.5
    assert optimizer.get_quantization_info()["weight_sparsity"] == pytest.approx(0.5, abs=0.02)


def test_a_learned_border_moves_and_its_rate_matters() -> None:
    """Spec: D1."""
    ends = []
    for rate in (1.0, 30.0):
        config = BitNetConfig(
            weight_bits=1.58, learnable_threshold=True, threshold_lr_multiplier=rate
        )
        model: Any = convert_model_to_bitnet(network(), config)
        train(model, BitNetOptimizer(model.parameters(), config), 20)
        ends.append(applied(model[0]))
    assert not torch.equal(*ends)
    assert float(model[0].threshold.detach()) != 0.0


def test_conversion_keeps_ties_takes_a_bare_layer_and_does_nothing_twice() -> None:
    """Spec: D10, J2."""
    bare = nn.Linear(8, 8)
    converted = convert_model_to_bitnet(bare)
    assert converted is not bare
    assert converted.weight is bare.weight
    assert convert_model_to_bitnet(converted) is converted
    tied = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    tied[1].weight = tied[0].weight
    model: Any = convert_model_to_bitnet(tied)
    assert model[0].weight is model[1].weight
    kept: Any = convert_model_to_bitnet(network(), skip=["2"])
    assert type(kept[2]) is nn.Linear


def test_the_optimizer_takes_rate_decay_and_averages_from_the_settings() -> None:
    """Spec: D11."""
    config = BitNetConfig(learning_rate=0.5, weight_decay=0.25, momentum=0.7, eps=1e-3)
    group = BitNetOptimizer(network().parameters(), config).param_groups[0]
    assert (group["lr"], group["weight_decay"], group["eps"]) == (0.5, 0.25, 1e-3)
    assert group["betas"] == (0.7, 0.999)
    given = BitNetOptimizer(network().parameters(), config, lr=0.1, weight_decay=0.0)
    assert (given.param_groups[0]["lr"], given.param_groups[0]["weight_decay"]) == (0.1, 0.0)


def test_a_state_goes_on_as_the_straight_run_does() -> None:
    """Spec: D11. Planted: the averages of the scaling left out of the state."""
    config = BitNetConfig(quantization_warmup_steps=8)

    def made() -> tuple[nn.Module, BitNetOptimizer]:
        model = convert_model_to_bitnet(network(), config)
        return model, BitNetOptimizer(model.parameters(), config, total_steps=30)

    straight, first = made()
    train(straight, first, 5)
    again, second = made()
    again.load_state_dict(straight.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # torch shares tensors
    assert train(again, second, 5) == train(straight, first, 5)
    for one, other in zip(again.parameters(), straight.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_spike_in_one_tensor_does_not_slow_it_down_for_long() -> None:
    """Spec: D14. Planted: `scale_limit` ignored: both updates are equally small."""
    moved = {}
    for adaptive in (True, False):
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.zeros(10)) for _ in range(3)]
        config = BitNetConfig(adaptive_gradient_scaling=adaptive, weight_decay=0.0)
        optimizer = BitNetOptimizer(parameters, config)
        for step in range(40):
            for index, parameter in enumerate(parameters):
                parameter.grad = torch.ones(10) * (1000.0 if (step, index) == (5, 0) else 1.0)
            if step == 30:
                before, beside = (one.detach().clone() for one in parameters[:2])
            optimizer.step()
        way = (parameters[0].detach() - before).norm() / (parameters[1].detach() - beside).norm()
        moved[adaptive] = float(way)
    assert moved[True] > 0.4  # a tenfold gradient is still let in
    assert moved[False] < 0.1


def test_the_loss_adds_the_distance_to_the_levels_when_it_sees_the_model() -> None:
    """Spec: D15, F12."""
    config = BitNetConfig(weight_bits=1.58)
    model = convert_model_to_bitnet(network(), config)
    loss = BitNetLossFunction(config, functional.cross_entropy, weight=2.0)
    logits, targets = torch.randn(6, 4), torch.arange(6) % 4
    base = functional.cross_entropy(logits, targets)
    assert torch.equal(loss(logits, targets), base)
    distance = mean_quantization_distance(model)
    assert distance.item() > 0
    assert torch.equal(loss(logits, targets, model), base + 2.0 * distance)
    with pytest.raises(ValueError, match="no quantized layer"):
        loss(logits, targets, network())


def test_the_quantizer_gives_the_layers_weights_and_gradient() -> None:
    """Spec: D13."""
    config = BitNetConfig(weight_bits=1.58)
    layer = BitNetLayer(16, 12, config)
    quantizer = BitNetQuantizer(config, (12, 16))
    weight = layer.weight.detach().clone().requires_grad_()
    found = quantizer(weight)
    assert torch.equal(found, layer.applied_weight())
    upstream = torch.randn_like(found)
    found.backward(upstream)
    assert torch.equal(weight.grad, upstream)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"shape \(3, 3\)"):
        quantizer(torch.zeros(3, 3))


def test_settings_that_cannot_work_together_are_refused() -> None:
    """Spec: D1."""
    with pytest.raises(AttributeError, match="did you mean.*weight_bits"):
        BitNetConfig(weigth_bits=1)
    with pytest.raises(ValueError, match="no published 1-bit recipe"):
        BitNetConfig(gradient_bits=4)
    for wrong in (
        {"weight_bits": 3},
        {"weight_bits": "septenary"},
        {"weight_bits": 4, "learnable_threshold": True},
        {"learnable_threshold": True, "quantization_mode": QuantizationMode.STOCHASTIC},
        {"adaptive_gradient_scaling": False, "gradient_scale_factor": 2.0},
        {"threshold_lr_multiplier": 3.0},
        {"sparsity_warmup_steps": 3},
    ):
        with pytest.raises(SettingError):
            BitNetConfig(**wrong).check()


def test_a_converted_model_is_freed_when_its_user_drops_it() -> None:
    """Planted: layers held by the table that the optimizer reads."""
    model = convert_model_to_bitnet(network())
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None
