"""Ternary layers: forward and gradient against a textbook reference, conversion, packing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_parts import make_session
from torch import nn

from forge_kernel import run
from forge_kernel.contract.values import Batch
from forge_kernel.errors import PlanError, PluginError
from forge_kernel.planning.pipeline_file import load_pipeline
from forge_kernel.planning.plan import plan
from forge_plugins.interchange.packed_ternary import pack_model, read_packed, write_packed
from forge_plugins.mathematics.quantization.bit_linear import BitLinear
from forge_plugins.mathematics.quantization.conversion import convert_linears
from forge_plugins.mathematics.quantization.packing import pack_two_bits, unpack_two_bits
from forge_plugins.mathematics.quantization.quantizers import (
    activation_scale,
    quantize_activation,
    quantize_weight,
    straight_through,
    ternary_levels,
    ternary_scale,
)


def reference_weight(weight: torch.Tensor) -> torch.Tensor:
    """The published form: scale, round half to even, clamp, divide (fp32, per tensor)."""
    scale = 1.0 / weight.float().abs().mean().clamp(min=1e-5)
    return ((weight.float() * scale).round().clamp(-1, 1) / scale).to(weight.dtype)


def reference_activation(inputs: torch.Tensor) -> torch.Tensor:
    """The published form: absmax per token, 127 levels, clamp to int8's range."""
    scale = 127 / inputs.float().abs().max(dim=-1, keepdim=True).values.clamp(min=1e-5)
    return ((inputs.float() * scale).round().clamp(-128, 127) / scale).to(inputs.dtype)


def textbook(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Two detached differences: the straight-through estimator as everybody writes it."""
    w = weight + (reference_weight(weight) - weight).detach()
    x = inputs + (reference_activation(inputs) - inputs).detach()
    return nn.functional.linear(x, w, bias)


shapes = st.tuples(st.integers(1, 17), st.integers(1, 33))
seeds = st.integers(0, 10_000)


def tensor(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


@given(shape=shapes, seed=seeds, power=st.integers(-6, 6))
@settings(max_examples=60, deadline=None)
def test_applied_weights_are_bit_equal_to_the_published_form(
    shape: tuple[int, int], seed: int, power: int
) -> None:
    weight = tensor(shape, seed, 10.0**power)
    assert torch.equal(quantize_weight(weight), reference_weight(weight))
    assert torch.equal(quantize_activation(weight), reference_activation(weight))
    half = weight.to(torch.bfloat16)
    assert torch.equal(quantize_weight(half), reference_weight(half))
    assert torch.equal(quantize_activation(half), reference_activation(half))


@given(shape=shapes, seed=seeds)
@settings(max_examples=40, deadline=None)
def test_applied_weights_lie_on_the_grid(shape: tuple[int, int], seed: int) -> None:
    weight = tensor(shape, seed)
    scale = ternary_scale(weight)
    levels = ternary_levels(weight, scale)
    assert set(levels.unique().tolist()) <= {-1.0, 0.0, 1.0}
    assert torch.equal(quantize_weight(weight), levels / scale)
    activations = quantize_activation(weight) * activation_scale(weight)
    assert torch.allclose(activations, activations.round(), atol=1e-3)
    assert float(activations.abs().max()) <= 127.001


@given(shape=shapes, seed=seeds, power=st.integers(-3, 3))
@settings(max_examples=40, deadline=None)
def test_scaling_the_weight_scales_what_is_applied(
    shape: tuple[int, int], seed: int, power: int
) -> None:
    """A power of two changes no rounding, so the equality is exact above the scale's floor."""
    weight = tensor(shape, seed)
    factor = 2.0**power
    assert torch.equal(quantize_weight(weight * factor), quantize_weight(weight) * factor)


@given(shape=shapes, seed=seeds)
@settings(max_examples=40, deadline=None)
def test_the_gradient_passes_straight_through(shape: tuple[int, int], seed: int) -> None:
    latent = tensor(shape, seed).requires_grad_()
    upstream = tensor(shape, seed + 1)
    straight_through(latent, quantize_weight(latent.detach())).backward(upstream)  # type: ignore[no-untyped-call]
    assert latent.grad is not None
    assert torch.equal(latent.grad, upstream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward_equal_the_textbook_bit_for_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = BitLinear(48, 24, dtype=dtype)
    scales = torch.logspace(-4, 2, 10).unsqueeze(1)
    x = (torch.randn(10, 48) * scales).to(dtype).requires_grad_()
    y = layer(x)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    weight, bias = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias))
    other = x.detach().clone().requires_grad_()
    expected = textbook(other, weight, bias)
    expected.backward(upstream)
    assert torch.equal(y, expected)
    for mine, theirs in ((x, other), (layer.weight, weight), (layer.bias, bias)):
        assert torch.equal(mine.grad, theirs.grad)  # type: ignore[arg-type]


def test_zero_rows_and_zero_weights_stay_finite() -> None:
    layer = BitLinear(8, 4)
    with torch.no_grad():
        layer.weight.zero_()
    assert torch.equal(layer(torch.zeros(2, 8)), layer.bias.expand(2, 4))


def test_quantizing_what_is_quantized_shrinks_it() -> None:
    """Why exporters take the scale from the latent weights: the mean of a ternary tensor is its
    density times the level."""
    weight = tensor((256, 256), 0)
    once = quantize_weight(weight)
    density = float((once != 0).float().mean())
    level = float(once.abs().max())
    twice = quantize_weight(once)
    assert float(twice.abs().max()) == pytest.approx(level * density, rel=1e-4)
    assert density < 0.75


def test_conversion_keeps_parameters_ties_dtype_and_skips_by_name() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4, dtype=torch.bfloat16)
            self.b = nn.Linear(4, 4, bias=False)
            self.head = nn.Linear(4, 2)
            self.shared = self.b
            self.b.weight = nn.Parameter(torch.ones(4, 4))

    net = Net()
    parameters = {name: id(p) for name, p in net.named_parameters()}
    keys = list(net.state_dict())
    converted, layers = convert_linears(net, lambda name: name != "head")
    assert converted is net
    assert {name: id(p) for name, p in net.named_parameters()} == parameters
    assert list(net.state_dict()) == keys
    assert isinstance(net.a, BitLinear)
    assert net.b is net.shared
    assert type(net.head) is nn.Linear
    again, layers_again = convert_linears(net, lambda name: name != "head")
    assert layers_again == layers
    assert again is net


def test_a_bare_linear_layer_is_converted_too() -> None:
    linear = nn.Linear(4, 2)
    model, layers = convert_linears(linear, lambda name: True)
    assert isinstance(model, BitLinear)
    assert model.weight is linear.weight
    assert list(layers) == [""]


def uses(**options: Any) -> dict[str, Any]:
    from forge_kernel.config.use import UseQuantizer

    return {"quantizer": UseQuantizer("bitnet", options)}


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))


def batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [
        Batch(torch.randn(6, 4, generator=generator), torch.randint(3, (6,), generator=generator))
        for _ in range(count)
    ]


def test_the_weight_that_is_applied_is_ternary_also_in_evaluation() -> None:
    """Probed from outside: the outputs are linear in the input with three-valued coefficients."""
    session = make_session(net(), batches(1), uses=uses(activation_bits=16))
    for batch in batches(5):
        session.step(batch)
    session.run.model.eval()
    layer = session.run.model[0]
    probe = layer(torch.eye(4)) - layer(torch.zeros(1, 4))
    assert len(probe.detach().abs().round(decimals=5).unique()) <= 2


def test_the_kept_weight_within_a_window_changes_no_bit() -> None:
    plain, kept = net(), net()
    first = make_session(plain, batches(1), uses=uses(), accumulate=1)
    second = make_session(kept, batches(1), uses=uses(), accumulate=2)
    assert second.run.model[0].weight_cache.enabled
    assert not first.run.model[0].weight_cache.enabled
    for index in range(5):
        window = batches(12)[2 * index : 2 * index + 2]
        first.step(*window)
        second.step(*window)
    assert torch.equal(first.run.model[0].weight, second.run.model[0].weight)


def test_the_kept_weight_is_quantized_once_in_a_window_and_dropped_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = 0
    real = BitLinear._rounded

    def counted(layer: BitLinear, *, draw: bool) -> Any:
        nonlocal calls
        calls += 1
        return real(layer, draw=draw)

    monkeypatch.setattr(BitLinear, "_rounded", counted)
    session = make_session(net(), batches(1), uses=uses(), accumulate=4)
    session.step(*batches(4))
    assert calls == 2  # two layers, once each
    session.step(*batches(4))
    assert calls == 4


def test_a_write_through_data_is_seen_after_on_weights_changed() -> None:
    session = make_session(net(), batches(1), uses=uses(), accumulate=2)
    session.accumulate(batches(1)[0])
    layer = session.run.model[0]
    stale = layer.applied_weight()
    layer.weight.data.neg_()  # raises no version counter
    for notify in session.bus.calls("on_weights_changed"):
        notify(session.run)
    assert torch.equal(layer.applied_weight(), -stale)


def test_a_model_without_linear_layers_is_refused() -> None:
    model = nn.Sequential(nn.Flatten())
    with pytest.raises(PluginError, match="no linear layer"):
        make_session(model, batches(1), uses=uses())


def test_a_packed_export_without_a_quantizer_is_refused_at_plan_time() -> None:
    with pytest.raises(PlanError, match="needs weights of few bits"):
        plan(load_pipeline("smoke", ["quantizer=null"]))


@given(count=st.integers(0, 70), seed=seeds)
@settings(max_examples=60, deadline=None)
def test_packing_is_exact_for_any_length(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(-1, 2, (count,), generator=generator, dtype=torch.int8)
    packed = pack_two_bits(levels)
    assert packed.numel() == -(-count // 4)
    assert torch.equal(unpack_two_bits(packed, (count,)), levels)


def test_packing_refuses_what_is_not_ternary() -> None:
    with pytest.raises(ValueError, match="-1, 0 or 1"):
        pack_two_bits(torch.tensor([2], dtype=torch.int8))
    with pytest.raises(ValueError, match="int8"):
        pack_two_bits(torch.tensor([1.0]))
    with pytest.raises(ValueError, match="do not hold"):
        unpack_two_bits(torch.zeros(3, dtype=torch.uint8), (4,))
    with pytest.raises(ValueError, match="no level"):
        unpack_two_bits(torch.tensor([3], dtype=torch.uint8), (4,))


def test_a_packed_file_gives_the_applied_weights_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, _ = convert_linears(
        nn.Sequential(nn.Linear(33, 7), nn.LayerNorm(7), nn.Linear(7, 5)), lambda name: True
    )
    tensors, shapes_found = pack_model(model)
    write_packed(tmp_path / "m.safetensors", tensors, shapes_found)
    back = read_packed(tmp_path / "m.safetensors")
    assert torch.equal(back["0.weight"], reference_weight(model.get_parameter("0.weight")))
    assert torch.equal(back["1.weight"], model.get_parameter("1.weight"))
    assert back.keys() == model.state_dict().keys()


def test_packed_weights_take_a_sixteenth_of_full_precision(tmp_path: Path) -> None:
    import json

    result = run(
        load_pipeline("smoke", ["run.max_steps=5"]), output_dir=tmp_path / "run", quiet=True
    )
    manifest = json.loads((tmp_path / "run/exports/packed_ternary/manifest.json").read_text())
    assert manifest["ternary_bytes"] * 16 <= manifest["ternary_weights"] * 4
    assert manifest["verified"] == {"unpacked_bit_equal": True}
    assert result.model is not None
    back = read_packed(tmp_path / "run/exports/packed_ternary/model.safetensors")
    layers = [m for m in result.model.modules() if isinstance(m, BitLinear)]
    assert torch.equal(back["layers.0.weight"], layers[0].applied_weight())


def test_another_layout_is_refused_by_name(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="layout"):
        read_packed(tmp_path / "x.safetensors")


def test_the_state_dict_of_a_copy_loads_and_gives_the_same_outputs() -> None:
    model, _ = convert_linears(net(), lambda name: True)
    other, _ = convert_linears(net(), lambda name: True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    x = torch.randn(3, 4)
    assert torch.equal(model(x), other(x))
