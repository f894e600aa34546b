"""Evaluation of quantized layers: what is kept of the weight, and when it is not used."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from forge_plugins.mathematics.quantization import evaluation, quantizers
from forge_plugins.mathematics.quantization.bit_conv2d import BitConv2d
from forge_plugins.mathematics.quantization.bit_linear import BitLinear
from forge_plugins.mathematics.quantization.scheme import Scheme

SCHEMES = [
    Scheme(),
    Scheme(arithmetic="int8"),
    Scheme(weight_bits=1),
    Scheme(weight_bits=4, granularity="group", group_size=16),
    Scheme(granularity="row", activation_bits=16),
    Scheme(rounding="learned_threshold"),
    Scheme(rounding="stochastic"),
    Scheme(weight_bits=16),
]


def layer_of(scheme: Scheme, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(3)
    return BitLinear(64, 48, scheme=scheme, dtype=dtype).eval()


def fresh(layer: Any, input: Tensor) -> Tensor:
    """What a layer gives of which nothing was kept, on the way that has gradients."""
    again = copy.deepcopy(layer)
    result: Tensor = again(input.clone().requires_grad_()).detach()
    return result


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation_is_bit_for_bit_what_has_gradients(
    scheme: Scheme, autocast: bool, dtype: torch.dtype
) -> None:
    """Red when the kept weight is of another dtype, or the product another."""
    layer = layer_of(scheme, dtype)
    for rows in (1, 7, 64):
        input = torch.randn(rows, 64).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            expected = fresh(layer, input)
            with torch.no_grad():
                assert torch.equal(layer(input), expected)
                assert torch.equal(layer(input), expected)


@pytest.mark.parametrize("blend", [0.0, 0.4])
def test_a_layer_in_its_warm_up_evaluates_what_it_trains(blend: float) -> None:
    layer, input = layer_of(Scheme()), torch.randn(5, 64)
    layer.quantization.warmup_lambda = blend
    with torch.no_grad():
        assert torch.equal(layer(input), fresh(layer, input))
        layer.quantization.warmup_lambda = 1.0
        assert torch.equal(layer(input), fresh(layer, input))


def fused_step(layer: Any) -> None:
    layer.weight.grad = torch.randn_like(layer.weight)
    torch.optim.AdamW([layer.weight], lr=0.1, fused=True).step()


def half(layer: Any) -> None:
    layer.half().float()


def other_sparsity(layer: Any) -> None:
    layer.quantization.sparsity = 0.9


CHANGES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda layer: layer.weight.detach().mul_(torch.randn(48, 64)),
    "through .data": lambda layer: layer.weight.data.copy_(torch.randn(48, 64)),
    "other data": lambda layer: setattr(layer.weight, "data", torch.randn(48, 64)),
    "other parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(48, 64))),
    "load_state_dict": lambda layer: layer.load_state_dict(
        {**layer.state_dict(), "weight": torch.randn(48, 64)}
    ),
    "fused optimizer": fused_step,
    "another dtype and back": half,
    "sparsity": other_sparsity,
    "scheme": lambda layer: layer.configure(Scheme(weight_bits=4)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("arithmetic", ["exact", "int8"])
def test_a_weight_that_has_changed_is_quantized_anew(change: str, arithmetic: str) -> None:
    """Red when any trace of a change is not looked at."""
    layer, input = layer_of(Scheme(arithmetic=arithmetic)), torch.randn(9, 64)  # type: ignore[arg-type]
    with torch.no_grad():
        before = layer(input)
        CHANGES[change](layer)
        assert torch.equal(layer(input), fresh(layer, input))
        assert change == "another dtype and back" or not torch.equal(layer(input), before)


def test_a_learned_threshold_that_moves_is_heard() -> None:
    layer, input = layer_of(Scheme(rounding="learned_threshold")), torch.randn(9, 64)
    with torch.no_grad():
        before = layer(input)
        layer.threshold.add_(3.0)
        assert torch.equal(layer(input), fresh(layer, input))
        assert not torch.equal(layer(input), before)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_a_weight_is_quantized_once_for_many_evaluations(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many calls as a text has tokens; red when nothing is kept."""
    layer: Any = layer_of(Scheme()) if kind == "linear" else BitConv2d(4, 8, 3).eval()
    input = torch.randn(3, 64) if kind == "linear" else torch.randn(2, 4, 8, 8)
    calls = []
    plain = quantizers.in_levels
    monkeypatch.setattr(quantizers, "in_levels", lambda *a: (calls.append(1), plain(*a))[1])
    with torch.no_grad():
        results = [layer(input) for _ in range(4)]
    assert len(calls) == 1
    assert all(torch.equal(result, results[0]) for result in results)


def test_training_drops_what_evaluation_kept() -> None:
    layer, input = layer_of(Scheme()), torch.randn(3, 64)
    with torch.no_grad():
        layer(input)
    assert layer.weight_cache.evaluated
    layer.train()(input)
    assert not layer.weight_cache.evaluated


def test_a_copy_and_a_weight_without_memory_keep_nothing() -> None:
    layer = layer_of(Scheme())
    with torch.no_grad():
        layer(torch.randn(3, 64))
        assert not copy.deepcopy(layer).weight_cache.evaluated
        meta = BitLinear(64, 48, device="meta").eval()
        assert meta(torch.randn(3, 64, device="meta")).shape == (3, 48)
        assert not meta.weight_cache.evaluated
    with torch.inference_mode():
        own = BitLinear(64, 48).eval()
        first = own(torch.ones(1, 64))
        own.weight.copy_(torch.randn(48, 64))
        assert not torch.equal(own(torch.ones(1, 64)), first)


def test_weights_of_several_models_at_once_are_not_mixed_up() -> None:
    """functorch hands the same layer other weights: nothing of one is kept for the next."""
    layer, input = layer_of(Scheme()), torch.randn(3, 64)
    stacked = torch.stack([torch.randn(48, 64), torch.randn(48, 64)])

    def applied(weight: Tensor) -> Tensor:
        given = {"weight": weight, "bias": layer.bias}
        return torch.func.functional_call(layer, given, (input,))  # type: ignore[no-any-return]

    with torch.no_grad():
        layer(input)
        both = [applied(weight) for weight in stacked]
        for weight, result in zip(stacked, both, strict=True):
            other = layer_of(Scheme())
            other.weight.copy_(weight)
            other.bias.copy_(layer.bias)
            assert torch.equal(result, fresh(other, input))


def test_another_kernel_replaces_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red when evaluation does not go through it, or training does."""
    model = nn.Sequential(layer_of(Scheme()))
    calls: list[int] = []

    def kernel(layer: Any, input: Tensor) -> Tensor:
        calls.append(len(input))
        return torch.zeros(len(input), layer.out_features)

    monkeypatch.setattr(evaluation, "evaluated_linear", kernel)
    input = torch.randn(3, 64)
    with torch.no_grad():
        assert not model(input).any()
    assert calls == [3]
    assert model(input).any()
    model.train()(input)
    assert calls == [3]
