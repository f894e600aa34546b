"""Every scheme of the quantized layers, against references of two or three lines."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from forge_plugins.mathematics.quantization import bit_linear, quantized_linear, quantizers
from forge_plugins.mathematics.quantization.bit_conv2d import BitConv2d
from forge_plugins.mathematics.quantization.bit_layer import BitLayer, QuantizationState
from forge_plugins.mathematics.quantization.bit_linear import BitLinear
from forge_plugins.mathematics.quantization.conversion import convert_model_to_bitnet
from forge_plugins.mathematics.quantization.scheme import Scheme

seeds = st.integers(0, 10_000)
GRIDS = [
    Scheme(weight_bits=bits, granularity=granularity, group_size=4, scale_statistic=measure)
    for bits, granularity, measure in [
        *itertools.product((1, 1.58, 2, 4, 8), ("tensor", "row", "group"), (None,)),
        (1.58, "tensor", "absmedian"),
        (1.58, "row", "absmedian"),
        (2, "tensor", "absmean"),
    ]
]


def name_of(scheme: Scheme) -> str:
    return f"{scheme.weight_bits:g}-{scheme.granularity}-{scheme.step_from}"


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def linear(scheme: Scheme, width: int = 16, out: int = 8, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return BitLinear(width, out, scheme=scheme, **options)


def shared_blocks(weight: Tensor, scheme: Scheme) -> Tensor:
    """What shares a step, one to a row."""
    if scheme.granularity == "tensor":
        return weight.reshape(1, -1)
    size = scheme.group_size if scheme.granularity == "group" else weight[0].numel()
    return weight.reshape(-1, size)


@pytest.mark.spec("D4")
@pytest.mark.parametrize("scheme", GRIDS, ids=name_of)
def test_the_weight_that_is_applied_has_the_levels_of_its_bits(scheme: Scheme) -> None:
    """Planted fault: `top` of 4 bits returned for 2 bits."""
    layer = linear(scheme, 64, 32)
    layer.eval()
    applied = layer.applied_weight()
    most = {1: 2, 1.58: 3, 2: 3, 4: 15, 8: 255}[scheme.weight_bits]
    for block in shared_blocks(applied, scheme):
        found = block.unique()
        assert len(found) <= most
        step = found.abs().max() / scheme.qmax
        if float(step) == 0:
            continue
        assert torch.allclose(found / step, (found / step).round(), atol=1e-3)
    if scheme.granularity == "tensor" and scheme.weight_bits != 8:
        assert len(applied.unique()) == most
    levels, scale = layer.levels()
    assert levels.dtype is torch.int8
    assert torch.equal((levels / scale).view(applied.shape), applied)


@pytest.mark.parametrize("bits", [16, 32])
def test_sixteen_bits_leave_the_weight_as_it_is(bits: int) -> None:
    layer = linear(Scheme(weight_bits=bits, activation_bits=16))
    x = normal(3, 16)
    assert torch.equal(layer(x), functional.linear(x, layer.weight, layer.bias))
    with pytest.raises(ValueError, match="no levels"):
        layer.levels()


@given(seed=seeds, index=st.integers(0, len(GRIDS) - 1))
@settings(max_examples=60, deadline=None)
def test_levels_lie_on_the_grid_and_round_to_the_nearest(seed: int, index: int) -> None:
    scheme = GRIDS[index]
    layer = linear(scheme, seed=seed)
    levels, scale = layer.levels()
    assert int(levels.abs().max()) <= scheme.qmax
    latent = quantizers.arranged(layer.weight.detach(), scheme)
    levels = levels.view(latent.shape).float()
    if scheme.weight_bits == 1:
        blocks = shared_blocks(layer.weight.detach(), scheme)
        signs = torch.where(blocks >= blocks.mean(1, keepdim=True), 1.0, -1.0)
        assert torch.equal(levels.view(blocks.shape), signs)
        return
    scaled = latent * scale.view(quantizers.weight_scale(layer.weight, scheme).shape)
    inside = scaled.abs() <= scheme.qmax
    assert bool(((levels - scaled).abs()[inside] <= 0.5001).all())
    assert torch.equal(levels[~inside], scaled.sign()[~inside] * scheme.qmax)


@given(seed=seeds, bits=st.sampled_from([1, 2, 4, 8]), fine=st.sampled_from(["tensor", "row"]))
@settings(max_examples=40, deadline=None)
def test_grids_from_the_largest_weight_and_signs_are_idempotent(
    seed: int, bits: int, fine: Any
) -> None:
    """Ternary ones are not: see the conversion's tests."""
    scheme = Scheme(weight_bits=bits, granularity=fine)
    layer = linear(scheme, seed=seed)
    levels, _ = layer.levels()
    once = layer.applied_weight().clone()
    with torch.no_grad():
        layer.weight.copy_(once)
    if bits == 1 and any(len(block.unique()) == 1 for block in shared_blocks(once, scheme)):
        return  # a block of one sign is all mean
    assert torch.equal(layer.levels()[0], levels)
    assert torch.allclose(layer.applied_weight(), once, rtol=3e-7, atol=0)


@given(seed=seeds, power=st.integers(-3, 3), index=st.integers(0, len(GRIDS) - 1))
@settings(max_examples=60, deadline=None)
def test_a_power_of_two_passes_through_the_quantizer(seed: int, power: int, index: int) -> None:
    layer = linear(GRIDS[index], seed=seed)
    before = layer.applied_weight().clone()
    with torch.no_grad():
        layer.weight.mul_(2.0**power)
    assert torch.equal(layer.applied_weight(), before * 2.0**power)


@pytest.mark.spec("D5")
@pytest.mark.parametrize(("bits", "top"), [(8, 127), (4, 7)])
@pytest.mark.parametrize("share", ["token", "tensor"])
def test_activations_are_whole_steps_of_their_largest(bits: int, top: int, share: Any) -> None:
    """Planted fault: 4 bits read as 8."""
    scheme = Scheme(weight_bits=32, activation_bits=bits, activation_granularity=share)
    layer = BitLinear(16, 16, bias=False, scheme=scheme)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(16))
    x = normal(5, 16) * torch.logspace(-2, 2, 5).unsqueeze(1)
    largest = x.abs().amax(1, keepdim=True) if share == "token" else x.abs().amax()
    levels = layer(x).detach() * top / largest
    assert torch.allclose(levels, levels.round(), atol=1e-3)
    assert float(levels.abs().max()) == pytest.approx(top, abs=1e-3)
    assert torch.allclose(levels, (x * top / largest).round(), atol=1e-3)


def gradients_of(layer: BitLayer, x: Tensor, upstream: Tensor) -> list[Tensor | None]:
    layer.zero_grad()
    x = x.clone().requires_grad_()
    layer(x).backward(upstream)
    return [x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.spec("D6", "D13")
@given(seed=seeds, index=st.integers(0, len(GRIDS) - 1), clipped=st.booleans())
@settings(max_examples=50, deadline=None)
def test_gradients_are_those_of_the_two_line_estimator(
    seed: int, index: int, clipped: bool
) -> None:
    """Planted fault: the clip's comparison turned round."""
    scheme = Scheme(
        weight_bits=GRIDS[index].weight_bits,
        granularity=GRIDS[index].granularity,
        group_size=4,
        scale_statistic=GRIDS[index].scale_statistic,
        ste="clipped" if clipped else "plain",
    )
    layer = linear(scheme, seed=seed)
    x, upstream = normal(5, 16, seed=seed), normal(5, 8, seed=seed + 1)
    to_x, to_weight, to_bias = gradients_of(layer, x, upstream)
    weight = layer.weight.detach().clone().requires_grad_()
    other = x.clone().requires_grad_()
    w = weight + (layer.applied_weight() - weight).detach()
    v = other + (quantizers.quantize_activation(other) - other).detach()
    functional.linear(v, w, layer.bias.detach()).backward(upstream)
    wanted = weight.grad
    assert wanted is not None
    if clipped:
        blocks = shared_blocks(layer.weight.detach(), scheme)
        centre = blocks.mean(1, keepdim=True) if scheme.weight_bits == 1 else 0.0
        scale = quantizers.weight_scale(layer.weight, scheme).view(-1, 1)
        inside = ((blocks - centre) * scale).abs() <= scheme.qmax
        wanted = wanted * inside.view(wanted.shape)
    assert torch.allclose(to_x, other.grad, rtol=1e-5, atol=1e-6)  # type: ignore[arg-type]
    assert torch.allclose(to_weight, wanted, rtol=1e-5, atol=1e-6)  # type: ignore[arg-type]
    assert torch.allclose(to_bias, upstream.sum(0), rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.spec("D6")
def test_without_an_estimator_only_biases_and_inputs_get_gradients() -> None:
    layer = linear(Scheme(ste="none"))
    to_x, to_weight, to_bias = gradients_of(layer, normal(5, 16), normal(5, 8))
    assert to_weight is None
    assert to_x is not None
    assert to_bias is not None


@pytest.mark.spec("D3")
@pytest.mark.parametrize("bits", [1, 1.58, 2, 4, 8])
def test_stochastic_rounding_has_the_clipped_weight_as_its_mean(bits: float) -> None:
    """Planted fault: draws compared with a sigmoid of slope 10."""
    scheme = Scheme(weight_bits=bits, rounding="stochastic")
    layer = linear(scheme, 6, 4)
    torch.manual_seed(3)
    draws = torch.stack([layer.applied_weight() for _ in range(10_000)]).double()
    latent = layer.weight.detach().double()
    if bits == 1:
        latent = latent - latent.mean()
    edge = scheme.qmax / quantizers.weight_scale(layer.weight, scheme).double()
    clipped = latent.clamp(-edge, edge)
    sigma = draws.std(0).clamp(min=1e-9) / math.sqrt(len(draws))
    assert float(((draws.mean(0) - clipped).abs() / (sigma + 1e-7)).max()) < 3.9  # of 24 weights
    assert float(((draws.mean(0) - clipped).abs() < 3 * sigma + 1e-7).double().mean()) > 0.9


@pytest.mark.spec("D2", "D3")
def test_evaluation_is_deterministic_and_training_draws() -> None:
    layer = linear(Scheme(rounding="stochastic"))
    nearest = linear(Scheme())
    x = normal(3, 16)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(layer(x), nearest(x))
    assert torch.equal(nearest(x), nearest(x))


def test_a_kept_draw_holds_until_it_is_forgotten_and_not_in_evaluation() -> None:
    layer = linear(Scheme(rounding="stochastic"))
    nearest = linear(Scheme())
    layer.weight_cache.enabled = True
    first = layer.applied_weight().clone()
    assert torch.equal(layer.applied_weight(), first)
    layer.eval()
    assert torch.equal(layer.applied_weight(), nearest.applied_weight())
    layer.train()
    layer.invalidate()
    assert not torch.equal(layer.applied_weight(), first)


@pytest.mark.parametrize("bits", [1, 1.58])
def test_a_learned_threshold_begins_as_rounding_and_learns(bits: float) -> None:
    layer = linear(Scheme(weight_bits=bits, rounding="learned_threshold"), 32, 16)
    plain = linear(Scheme(weight_bits=bits), 32, 16)
    assert torch.equal(layer.applied_weight(), plain.applied_weight())
    layer(normal(4, 32)).square().sum().backward()
    assert float(layer.threshold.grad) != 0
    before, _ = layer.levels()
    with torch.no_grad():
        layer.threshold.add_(0.03)
    after, _ = layer.levels()
    raised = before.abs() - after.abs() if bits == 1.58 else before - after
    assert int(raised.min()) >= 0
    assert int(raised.max()) > 0


def test_the_thresholds_gradient_follows_the_smoothed_jump() -> None:
    """Against finite differences of a ternary quantizer whose jump is a ramp one step wide."""
    torch.manual_seed(0)
    values, upstream = torch.randn(64, 64).double(), torch.randn(64, 64).double()
    scale = torch.tensor(2.0).double()

    def smooth(border: float) -> Tensor:
        ramp = ((values.abs() - border) / (2 * quantizers.BAND) + 0.5).clamp(0, 1)
        return (upstream * values.sign() * ramp / scale).sum()

    slope = (smooth(0.5 + 1e-5) - smooth(0.5 - 1e-5)) / 2e-5 / math.sqrt(values.numel())
    border = torch.tensor(0.5).double()
    found = quantizers.threshold_gradient(upstream, values, border, scale, Scheme())
    assert float(found) == pytest.approx(float(slope), rel=1e-3)


@pytest.mark.spec("D8", "D16")
@pytest.mark.parametrize("scheme", GRIDS, ids=name_of)
def test_sparsity_is_counted_in_the_weight_that_is_applied(scheme: Scheme) -> None:
    """Planted fault: zeros written into the latent weight, where one bit turns them into +1."""
    quantization = QuantizationState(sparsity=0.75)
    layer = linear(scheme, 32, 16, quantization=quantization)
    zeros = int((layer.applied_weight() == 0).sum())
    assert zeros == 0.75 * layer.weight.numel()
    assert not bool((layer.weight == 0).any())
    quantization.sparsity = 0.0
    layer.invalidate()
    assert int((layer.applied_weight() == 0).sum()) < zeros


@given(share=st.floats(0, 1), seed=seeds, equal=st.booleans())
@settings(max_examples=50, deadline=None)
def test_the_smallest_are_as_many_as_asked_also_among_equals(
    share: float, seed: int, equal: bool
) -> None:
    values = torch.ones(7, 5) if equal else normal(7, 5, seed=seed)
    found = quantizers.smallest(values, share)
    assert int(found.sum()) == math.floor(share * 35)
    if 0 < int(found.sum()) < 35:
        assert float(values.abs()[found].max()) <= float(values.abs()[~found].min())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 3}, "weight_bits is one of"),
        ({"activation_bits": 5}, "activation_bits is one of"),
        ({"weight_bits": 1, "scale_statistic": "absmedian"}, "absmean"),
        ({"scale_statistic": "absmax"}, "round nearly all"),
        ({"weight_bits": 8, "scale_statistic": "absmean"}, "absmax"),
        ({"weight_bits": 4, "rounding": "learned_threshold"}, "learned threshold"),
        ({"weight_bits": 16, "rounding": "stochastic"}, "no levels to draw"),
        ({"parity": "torchao", "granularity": "row"}, "parity torchao"),
        ({"parity": "torchao", "activation_bits": 4}, "parity torchao"),
        ({"arithmetic": "int8", "activation_bits": 16}, "multiplies integers"),
        ({"arithmetic": "int8", "granularity": "group"}, "one step for each output row"),
        ({"group_size": 0}, "at least 1"),
    ],
)
def test_combinations_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scheme(**options)


def test_groups_that_do_not_divide_the_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="groups of 5"):
        BitLinear(16, 8, scheme=Scheme(granularity="group", group_size=5))


@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
@pytest.mark.parametrize("bits", [1, 1.58, 4])
def test_a_convolution_equals_its_reference(bits: float, granularity: Any) -> None:
    torch.manual_seed(0)
    scheme = Scheme(weight_bits=bits, granularity=granularity, group_size=9)
    layer = BitConv2d(4, 6, 3, stride=2, padding=1, groups=2, scheme=scheme)
    x = normal(3, 4, 8, 8) * torch.tensor([0.1, 1.0, 10.0]).view(3, 1, 1, 1)
    scale = 127 / x.abs().amax((1, 2, 3), keepdim=True)
    values = (x * scale).round() / scale
    wanted = functional.conv2d(values, layer.applied_weight(), layer.bias, 2, 1, 1, 2)
    assert torch.allclose(layer(x), wanted, atol=1e-6)
    assert torch.allclose(layer(x[1]), wanted[1], atol=1e-6)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    levels, scales = layer.levels()
    assert torch.equal((levels / scales).view(layer.weight.shape), layer.applied_weight())


# -- integer arithmetic ----------------------------------------------------------------------------

INT8 = not quantized_linear.lacks_int8("cpu")


@pytest.mark.skipif(not INT8, reason="the processor multiplies no int8")
@pytest.mark.parametrize("bits", [1, 1.58, 4, 8])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("share", ["token", "tensor"])
def test_integer_products_equal_the_exact_ones_up_to_rounding(
    bits: float, granularity: Any, share: Any
) -> None:
    options: dict[str, Any] = {
        "weight_bits": bits, "granularity": granularity, "activation_granularity": share,
    }  # fmt: skip
    layers = {
        name: linear(Scheme(**options, arithmetic=name), 96, 40)
        for name in ("exact", "int8", "int8_bf16_backward", "int8_backward")
    }
    x, upstream = normal(3, 11, 96), normal(3, 11, 40, seed=1)
    exact = layers["exact"](x).detach()
    assert torch.allclose(layers["int8"](x), exact, rtol=0, atol=3e-6 * float(exact.abs().max()))
    wanted = gradients_of(layers["exact"], x, upstream)
    for mine, theirs in zip(gradients_of(layers["int8"], x, upstream), wanted, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]
    for name, most, least in (("int8_bf16_backward", 8e-3, 1e-4), ("int8_backward", 15e-3, 1e-3)):
        errors = [
            float((a - b).norm() / b.norm())  # type: ignore[operator, union-attr]
            for a, b in zip(gradients_of(layers[name], x, upstream), wanted, strict=True)
        ]
        assert max(errors) < most
        assert min(errors[:2]) > least  # bf16, or whole numbers, it is


@pytest.mark.skipif(not INT8, reason="the processor multiplies no int8")
def test_integer_sums_are_exact() -> None:
    layer = linear(Scheme(arithmetic="int8"), 4096, 8, bias=False)
    x = normal(2, 4096)
    levels, scale = layer.levels()
    steps = 127.0 / x.abs().amax(1, keepdim=True)
    sums = (x * steps).round().long() @ levels.long().t()
    assert torch.allclose(layer(x), sums.float() / (steps * scale), rtol=1e-6, atol=0)


def test_without_the_instructions_the_exact_path_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bit_linear, "multiplies_integers", lambda device: False)
    fast, exact = linear(Scheme(arithmetic="int8")), linear(Scheme())
    x = normal(5, 16)
    assert torch.equal(fast(x), exact(x))


def test_missing_instructions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    quantized_linear.lacks_int8.cache_clear()
    quantized_linear.lacks_bf16.cache_clear()
    try:
        assert "avx512_vnni" in quantized_linear.lacks_int8("cpu")
        assert "avx512_bf16" in quantized_linear.lacks_bf16("cpu")
        assert "mps" in quantized_linear.lacks_int8("mps")
    finally:
        quantized_linear.lacks_int8.cache_clear()
        quantized_linear.lacks_bf16.cache_clear()


def test_integers_are_saved_for_backward() -> None:
    """Exact: one float input for all siblings and int8 weights; int8: no float at all."""
    for arithmetic in ("exact", "int8"):
        if arithmetic == "int8" and not INT8:
            continue
        layer = linear(Scheme(arithmetic=arithmetic), 64, 32)  # type: ignore[arg-type]
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kept = layer(normal(100, 64).requires_grad_())
        del kept
        values = 100 * 64 * (4 if arithmetic == "exact" else 1)
        assert sum(sizes.values()) <= values + 64 * 32 + 100 * 4 + 64


# -- sharing ---------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        mixed = self.q(x).tanh() * self.k(x).tanh() + self.v(x)
        return self.o(mixed)  # type: ignore[no-any-return]


def attention(arithmetic: Any = "exact", *, shares: bool = True) -> Any:
    torch.manual_seed(0)
    model, report = convert_model_to_bitnet(Attention(), Scheme(arithmetic=arithmetic))
    for layer in report.layers.values():
        if not shares:
            layer.shared = None
    return model


def count_grids(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls = [0]
    real = quantizers.activation_grid

    def counted(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        return real(*arguments, **options)

    monkeypatch.setattr(quantizers, "activation_grid", counted)
    return calls


@pytest.mark.parametrize("arithmetic", ["exact", "int8"])
def test_layers_that_read_the_same_tensor_quantize_it_once(
    monkeypatch: pytest.MonkeyPatch, arithmetic: str
) -> None:
    calls = count_grids(monkeypatch)
    model, plain = attention(arithmetic), attention(arithmetic, shares=False)
    x = normal(5, 16)
    shared = model(x)
    assert calls == [2]  # q, k, v together; o
    wanted = plain(x)
    assert calls == [6]
    assert torch.equal(shared, wanted)
    shared.square().sum().backward()
    wanted.square().sum().backward()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_an_input_that_was_changed_in_place_is_quantized_anew() -> None:
    model = attention()
    x = normal(5, 16)
    with torch.no_grad():
        before = model.q(x).clone()
        x.mul_(-1)
        after = model.q(x)
    plain = attention(shares=False)
    assert torch.equal(after, plain.q(x))
    assert not torch.equal(after, before)


@pytest.mark.parametrize("parity", ["hf", "torchao"])
@pytest.mark.parametrize(("source", "wanted"), [
    (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32),
])  # fmt: skip
def test_many_rows_are_quantized_like_few(
    source: torch.dtype, wanted: torch.dtype, parity: Any
) -> None:
    """More numbers than are quantized at once, with a ragged last part."""
    scheme = Scheme(parity=parity)
    inputs = torch.randn(3, 211, 700, dtype=torch.float32).to(source)
    assert inputs.numel() > quantizers.CACHED
    values = quantizers.activation_values(inputs, scheme, wanted)
    levels, scale = quantizers.activation_levels(inputs, scheme)
    for place in ((0, 0), (1, 100), (2, 210)):
        number = place[0] * 211 + place[1]
        row = inputs[place][None]
        grid, own = quantizers.activation_grid(row, scheme)
        assert torch.equal(levels[number][None], grid.to(torch.int8))
        assert torch.equal(scale[number][None], own)
        assert torch.equal(values[place][None], (grid / own).to(source).to(wanted))


@pytest.mark.parametrize("bits", [1.58, 2, 4, 8])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_a_large_weight_is_quantized_like_a_small_one(bits: Any, source: torch.dtype) -> None:
    """More numbers than are quantized at once, with a ragged last part."""
    layer = BitLinear(701, 613, scheme=Scheme(weight_bits=bits), dtype=source)
    assert layer.weight.numel() > quantizers.CACHED
    weight = layer.weight.detach().float()
    measure = weight.abs().mean() if bits == 1.58 else weight.abs().max()
    scale = layer.scheme.qmax / measure.clamp(min=1e-5)
    levels = (weight * scale).round().clamp(-layer.scheme.qmax, layer.scheme.qmax)
    with torch.no_grad():
        found = layer.quantized(torch.bfloat16, as_int8=False)
        whole = layer.quantized(torch.bfloat16, as_int8=True)
    assert found.applied is not None
    assert found.levels is not None
    assert whole.levels is not None
    assert torch.equal(found.applied, (levels / scale).to(source).to(torch.bfloat16))
    assert torch.equal(found.levels, levels.to(torch.int8))
    assert torch.equal(whole.levels, levels.to(torch.int8))
    assert torch.equal(found.scale, scale)


def test_what_is_shared_does_not_outlive_its_input() -> None:
    model = attention()
    with torch.no_grad():
        x = normal(5, 16)
        model.q(x)
        assert model.q.shared._entry is not None
        del x
        gc.collect()
    assert model.q.shared._entry is None


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("arithmetic", ["exact", "int8"])
def test_checkpointing_gives_the_same_gradients(reentrant: bool, arithmetic: str) -> None:
    model, plain = attention(arithmetic), attention(arithmetic)
    x = normal(5, 16).requires_grad_()
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    plain(x).square().sum().backward()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_sharing_respects_autocast_and_inference_mode() -> None:
    model, plain = attention(), attention(shares=False)
    x = normal(5, 16)
    full = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x)
        assert torch.equal(low, plain(x))
    assert not torch.equal(low.float(), full)
    with torch.inference_mode():
        assert torch.equal(model(x), full)


def test_copies_are_independent_and_begin_empty() -> None:
    model = attention()
    for layer in (model.q, model.k):
        layer.weight_cache.enabled = True
    x = normal(5, 16)
    wanted = model(x)
    for other in (copy.deepcopy(model), _through_a_file(model)):
        assert not other.q.weight_cache.enabled
        assert other.q.shared is other.k.shared
        assert other.q.shared is not model.q.shared
        assert other.q.quantization is other.o.quantization
        assert torch.equal(other(x), wanted)
        with torch.no_grad():
            other.q.weight.neg_()
        assert torch.equal(other.q.applied_weight(), -model.q.applied_weight())


def _through_a_file(model: nn.Module) -> Any:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.filterwarnings("ignore")  # torch's own, while it traces
@pytest.mark.parametrize(
    ("arithmetic", "kept", "autocast"),
    [  # each pair of two choices; what is left of the product is deep
        ("exact", False, False), ("exact", True, True), ("int8", False, True), ("int8", True, False),
        *(
            pytest.param(*case, marks=pytest.mark.deep)
            for case in [
                ("exact", False, True), ("exact", True, False), ("int8", False, False),
                ("int8", True, True),
            ]
        ),
    ],
)  # fmt: skip
def test_compiled_layers_give_the_same_bits(arithmetic: str, kept: bool, autocast: bool) -> None:
    """In one graph: int8 products too, also if nobody has asked whether the processor has them."""
    torch._dynamo.reset()
    quantized_linear.lacks_int8.cache_clear()
    quantized_linear._ASKED.clear()
    model, plain = attention(arithmetic), attention(arithmetic)
    for layer in (model.q, model.o):
        layer.weight_cache.enabled = kept
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = normal(5, 16)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found, wanted = compiled(x), plain(x)
        assert torch.equal(found, wanted)
        found.square().sum().backward()
        wanted.square().sum().backward()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-5, atol=1e-5)


# -- the published arithmetic, by hand --------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7,), (2, 5), (2, 3, 4), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_every_form_of_call_is_bit_equal_to_the_textbook(
    bias: bool, shape: tuple[int, ...], dtype: torch.dtype, autocast: bool
) -> None:
    torch.manual_seed(0)
    layer = BitLinear(48, 24, bias=bias, dtype=dtype)
    x = torch.randn(*shape, 48).to(dtype).requires_grad_()
    parts = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    other = x.detach().clone().requires_grad_()

    def reference() -> Tensor:
        w = quantizers.straight_through(parts[0], quantizers.quantize_weight(parts[0].detach()))
        v = other.float()
        s = 127 / v.abs().max(dim=-1, keepdim=True).values.clamp(min=1e-5)
        v = ((v * s).round().clamp(-128, 127) / s).to(dtype)
        return functional.linear(
            quantizers.straight_through(other, v.detach()), w, parts[1] if bias else None
        )

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        mine, theirs = layer(x), reference()
    assert mine.dtype == theirs.dtype
    assert torch.equal(mine, theirs)
    upstream = torch.randn_like(mine)
    mine.backward(upstream)
    theirs.backward(upstream)
    pairs = [(x, other), *zip(layer.parameters(), parts, strict=True)]
    for mine_at, theirs_at in pairs:
        assert torch.equal(mine_at.grad, theirs_at.grad)


def test_torchaos_arithmetic_keeps_its_floor_on_the_step() -> None:
    """Rows below 1.27e-3 come out smaller there: its floor of 1e-5 is on the step."""
    layer, hf = linear(Scheme(parity="torchao")), linear(Scheme())
    x = normal(2, 16) * torch.tensor([[1.0], [1e-4]])
    step = x.abs().amax(1, keepdim=True) / 127
    values = (x * (1.0 / step.clip(1e-5))).round().clip(-128, 127) * step
    mean = layer.weight.detach().abs().mean()
    weight = (layer.weight.detach() / mean.clip(1e-5)).round().clip(-1, 1) * mean
    wanted = functional.linear(values, weight, layer.bias)
    assert torch.allclose(layer(x), wanted, rtol=1e-6, atol=1e-7)
    assert torch.allclose(layer(x)[0], hf(x)[0], rtol=1e-6, atol=1e-7)
    assert not torch.allclose(layer(x)[1] - layer.bias, hf(x)[1] - hf.bias, rtol=0.1)


@given(seed=seeds, index=st.integers(0, len(GRIDS) - 1))
@settings(max_examples=30, deadline=None)
def test_a_converted_models_state_dict_loads_into_another(seed: int, index: int) -> None:
    scheme = GRIDS[index]
    first, second = (
        convert_model_to_bitnet(
            nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4)), scheme
        )[0]
        for _ in range(2)
    )
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.copy_(normal(*parameter.shape, seed=seed))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    x = normal(3, 16, seed=seed)
    assert torch.equal(first(x), second(x))
