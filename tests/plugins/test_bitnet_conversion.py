"""Conversion: what is kept, what is left and why, and weights that were quantized before."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from forge_plugins.interchange.packed_ternary import pack_model, read_packed, write_packed
from forge_plugins.mathematics.quantization.bit_conv2d import BitConv2d
from forge_plugins.mathematics.quantization.bit_layer import BitLayer, QuantizationState
from forge_plugins.mathematics.quantization.bit_linear import BitLinear
from forge_plugins.mathematics.quantization.conversion import (
    convert_linears,
    convert_model_to_bitnet,
)
from forge_plugins.mathematics.quantization.quantizers import (
    quantize_weight,
    ternary_levels,
    ternary_scale,
)
from forge_plugins.mathematics.quantization.resume_from_quantized import (
    dequantized_state,
    step_of,
    unpack_rows,
)
from forge_plugins.mathematics.quantization.scheme import Scheme

GRIDS = [
    Scheme(),
    Scheme(granularity="row"),
    Scheme(granularity="group", group_size=16),
    Scheme(scale_statistic="absmedian"),
    Scheme(weight_bits=1),
    Scheme(weight_bits=1, granularity="row"),
    Scheme(rounding="stochastic"),
    Scheme(rounding="learned_threshold"),
    Scheme(arithmetic="int8"),
]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.a = nn.Linear(8, 8, dtype=torch.bfloat16)
        self.b = nn.Linear(8, 8, bias=False)
        self.c = nn.Linear(8, 8)
        self.c.weight = self.b.weight
        self.again = self.b
        self.attention = nn.MultiheadAttention(8, 2)
        self.conv = nn.Conv2d(3, 4, 3)
        self.tied = nn.Linear(8, 7, bias=False)
        self.tied.weight = self.embed.weight
        self.lazy = nn.LazyLinear(4)
        self.computed = nn.utils.parametrizations.orthogonal(nn.Linear(8, 8))
        self.hooked = nn.Linear(8, 8)
        self.hooked.register_forward_hook(lambda *_: None)
        self.own = Doubled(8, 8)
        self.head = nn.Linear(8, 2)


class Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


@pytest.mark.spec("D10")
def test_parameters_ties_and_dtypes_stay_and_each_layer_is_accounted_for() -> None:
    """Planted fault: a new parameter made from the old one's values (ties are lost)."""
    net = Net()
    parameters = {name: id(p) for name, p in net.named_parameters()}
    keys = list(net.state_dict())
    converted, report = convert_model_to_bitnet(net)
    assert converted is net
    assert {name: id(p) for name, p in net.named_parameters()} == parameters
    assert list(net.state_dict()) == keys
    assert set(report.layers) == {"a", "b", "c", "again"}
    assert net.again is net.b
    assert net.c.weight is net.b.weight
    assert net.a.applied_weight().dtype is torch.bfloat16
    reasons = {
        "embed": "embedding", "attention": "MultiheadAttention", "conv": "convolution",
        "attention.out_proj": "past the layer", "tied": "shares its weight with the embedding embed",
        "lazy": "no shape yet", "computed": "parametrized", "hooked": "hooks",
        "own": "forward pass of its own", "head": "named by skip",
    }  # fmt: skip
    assert report.left.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in report.left[name]
    data = report.to_data()
    assert data["converted_weights"] == 128  # a tied weight counts once
    assert data["converted"]["a"] == {"kind": "BitLinear", "shape": [8, 8], "origin": "latent"}


@pytest.mark.spec("D10")
def test_converting_twice_changes_nothing() -> None:
    net = Net()
    _, first = convert_model_to_bitnet(net)
    before = copy.deepcopy(first.layers["a"].weight)
    _, second = convert_model_to_bitnet(net)
    assert first.layers.items() <= second.layers.items()
    assert set(second.origins.values()) == {"converted before"}
    assert torch.equal(net.a.weight, before)


@pytest.mark.spec("D10")
def test_a_bare_layer_is_converted_with_its_mode() -> None:
    linear = nn.Linear(4, 2).eval()
    model, report = convert_model_to_bitnet(linear)
    assert isinstance(model, BitLinear)
    assert model.weight is linear.weight
    assert not model.training
    assert list(report.layers) == [""]
    bare, report = convert_model_to_bitnet(nn.Conv2d(3, 4, 3), convolutions=True)
    assert isinstance(bare, BitConv2d)


def test_convolutions_are_converted_when_asked_for() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect"), nn.Flatten())
    x = torch.randn(2, 3, 6, 6)
    shape = net(x).shape
    converted, report = convert_model_to_bitnet(net, convolutions=True)
    assert list(report.layers) == ["0"]
    assert converted(x).shape == shape


def test_names_are_skipped_by_pattern_and_literally() -> None:
    net = nn.ModuleDict({"a[0]": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    _, layers = convert_linears(net, lambda name: name == "b")
    assert list(layers) == ["b"]
    assert type(net["a[0]"]) is nn.Linear
    net = nn.ModuleDict({"out_a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    _, report = convert_model_to_bitnet(net, skip=["out_*"])
    assert list(report.layers) == ["b"]


def test_a_scheme_that_does_not_fit_names_the_layer() -> None:
    net = nn.Sequential(nn.Linear(12, 3))
    with pytest.raises(ValueError, match="0: rows of 12"):
        convert_model_to_bitnet(net, Scheme(granularity="group", group_size=5))


def test_a_norm_is_set_in_front_by_name() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, dtype=torch.bfloat16))
    _, report = convert_model_to_bitnet(net, sub_norm=["1"])
    assert report.layers["0"].sub_norm is None
    norm = report.layers["1"].sub_norm
    assert isinstance(norm, nn.RMSNorm)
    assert norm.weight.dtype is torch.bfloat16
    layer = report.layers["1"]
    x = torch.randn(3, 8).bfloat16()
    with_norm = layer(100 * x)
    layer.sub_norm = None
    assert torch.equal(with_norm, layer(norm(100 * x)))
    again = convert_model_to_bitnet(net, sub_norm=["1"])[1]
    assert again.layers["1"].sub_norm is not None
    with pytest.raises(ValueError, match="linear layer only"):
        convert_model_to_bitnet(
            nn.Sequential(nn.Conv2d(3, 4, 3)), convolutions=True, sub_norm=["0"]
        )


def test_torchs_encoder_layer_applies_levels_in_evaluation_too() -> None:
    """Its fast path reads the weights of its layers past them."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    convert_model_to_bitnet(encoder)
    x = torch.randn(2, 3, 16)
    wanted = encoder(x)
    encoder.eval()
    with torch.no_grad():
        assert torch.allclose(encoder(x), wanted, atol=1e-6)


# -- weights that were quantized before ------------------------------------------------------------


def quantized(scheme: Scheme, dtype: torch.dtype, seed: int) -> nn.Linear:
    """A layer of dequantized weights, its step any number (not one that a mean gave)."""
    torch.manual_seed(seed)
    linear = nn.Linear(64, 32, dtype=dtype)
    levels = torch.randint(-1, 2, (32, 64)).float()
    if scheme.weight_bits == 1:
        levels = torch.where(levels == 0, 1.0, levels)
    if scheme.scale_statistic == "absmedian":
        levels[torch.rand(32, 64) < 0.4] = 1.0
    step = torch.rand(()) * 0.1 + 0.01
    if scheme.granularity == "row":
        step = step * torch.linspace(0.5, 1.5, 32).view(-1, 1)
    with torch.no_grad():
        linear.weight.copy_((levels * step).to(dtype))
    return linear


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "scheme",
    GRIDS,
    ids=lambda s: f"{s.weight_bits:g}-{s.granularity}-{s.step_from}-{s.rounding}-{s.arithmetic}",
)
def test_a_quantized_weight_is_applied_bit_for_bit_and_trains_on(
    scheme: Scheme, dtype: torch.dtype, seed: int
) -> None:
    """Planted fault: the weight taken as latent (its step shrinks to density times the step)."""
    linear = quantized(scheme, dtype, seed)
    file, parameter = linear.weight.detach().clone(), linear.weight
    layer, report = convert_model_to_bitnet(
        linear, scheme, quantization=QuantizationState(warmup_lambda=0.0)
    )
    assert isinstance(layer, BitLinear)
    assert layer.weight is parameter
    assert report.origins == {"": "grid"}
    assert torch.equal(layer.applied_weight(), file)
    assert layer.warmup_lambda == 1.0  # no warm-up: it is where it should be
    assert layer.trained_quantized
    levels, scale = layer.levels()
    close = {"atol": 0, "rtol": 2e-7 if dtype is torch.float32 else 1e-2}
    assert torch.allclose((levels / scale).view(file.shape), file.float(), **close)
    if dtype is torch.float16:
        return
    x = torch.randn(4, 64, dtype=dtype)
    optimizer = torch.optim.Adam(layer.parameters(), lr=2e-2)
    for _ in range(5):
        optimizer.zero_grad()
        layer(x).float().square().mean().backward()
        optimizer.step()
    moved = layer.applied_weight()
    assert not torch.equal(moved, file)
    assert 0.3 < float(moved.abs().mean() / file.abs().mean()) < 3


def test_a_continued_latent_weight_is_not_taken_for_a_quantized_one() -> None:
    """Its state dict in another model is applied the same, not continued a second time."""
    scale = ternary_scale(torch.randn(32, 64))
    linear = nn.Linear(64, 32)
    with torch.no_grad():
        linear.weight.copy_(torch.randint(-1, 2, (32, 64)) / scale)
    layer, _ = convert_model_to_bitnet(linear)
    assert isinstance(layer, BitLinear)
    assert step_of(layer.weight, Scheme()) is None
    other = nn.Linear(64, 32)
    other.load_state_dict(
        {name: value for name, value in layer.state_dict().items() if name != "reference_scale"}
    )
    second, report = convert_model_to_bitnet(other)
    assert report.origins == {"": "latent"}
    assert torch.allclose(second.applied_weight(), layer.applied_weight(), rtol=2e-7, atol=0)
    assert torch.equal(ternary_levels(layer.weight, ternary_scale(layer.weight)), layer.levels()[0])


def test_tied_quantized_weights_are_continued_once() -> None:
    first, second = quantized(Scheme(), torch.float32, 0), nn.Linear(64, 32)
    second.weight = first.weight
    file = first.weight.detach().clone()
    net, report = convert_model_to_bitnet(nn.Sequential(first, second))
    assert set(report.origins.values()) == {"grid"}
    for layer in (net[0], net[1]):
        assert torch.allclose(layer.applied_weight(), file, rtol=2e-7, atol=0)
    assert net[0].weight is net[1].weight


def test_rows_of_zeros_stay_zero_and_finite() -> None:
    for scheme in (Scheme(granularity="row"), Scheme(granularity="group", group_size=16)):
        linear = quantized(scheme, torch.float32, 0)
        with torch.no_grad():
            linear.weight[3].zero_()
        file = linear.weight.detach().clone()
        layer, report = convert_model_to_bitnet(linear, scheme)
        assert report.origins == {"": "grid"}
        assert torch.equal(layer.applied_weight(), file)
        layer(torch.randn(2, 64)).sum().backward()
        assert bool(torch.isfinite(layer.weight.grad).all())


def test_what_cannot_be_continued_is_left_as_it_was() -> None:
    """More zeros than half under absmedian: no latent weight has the step as its median."""
    linear = quantized(Scheme(), torch.float32, 0)
    with torch.no_grad():
        linear.weight[:20].zero_()
    file = linear.weight.detach().clone()
    layer, report = convert_model_to_bitnet(linear, Scheme(scale_statistic="absmedian"))
    assert report.origins == {"": "latent"}
    assert torch.equal(layer.weight, file)
    assert not layer.continued


def test_random_and_constant_weights_are_not_shrunk() -> None:
    linear = nn.Linear(16, 8)
    latent = linear.weight.detach().clone()
    layer, report = convert_model_to_bitnet(linear)
    assert report.origins == {"": "latent"}
    assert torch.equal(layer.weight, latent)
    ones = nn.Linear(16, 8)
    nn.init.ones_(ones.weight)
    layer, _ = convert_model_to_bitnet(ones)
    assert torch.equal(layer.applied_weight(), torch.ones(8, 16))
    zeros = nn.Linear(16, 8)
    nn.init.zeros_(zeros.weight)
    layer, report = convert_model_to_bitnet(zeros)
    assert report.origins == {"": "latent"}


def test_our_packed_file_is_continued_with_the_same_bits(tmp_path: Any) -> None:
    torch.manual_seed(0)
    made, _ = convert_model_to_bitnet(nn.Sequential(nn.Linear(33, 7), nn.Linear(7, 5)))
    write_packed(tmp_path / "m.safetensors", *pack_model(made))
    back = nn.Sequential(nn.Linear(33, 7), nn.Linear(7, 5))
    back.load_state_dict(read_packed(tmp_path / "m.safetensors"))
    x = torch.randn(3, 33)
    again, report = convert_model_to_bitnet(back)
    assert set(report.origins.values()) == {"grid"}
    assert torch.equal(again(x), made(x))
    for mine, theirs in zip(again, made, strict=True):
        assert torch.equal(mine.levels()[0], theirs.levels()[0])
        assert torch.equal(mine.applied_weight(), quantize_weight(theirs.weight))


def test_a_continued_layers_state_survives_its_own_reload() -> None:
    for seed in range(6):
        linear, other = (
            quantized(Scheme(granularity="row"), torch.float32, seed) for _ in range(2)
        )
        first, _ = convert_model_to_bitnet(linear, Scheme(granularity="row"))
        second, _ = convert_model_to_bitnet(other, Scheme(granularity="row"))
        with torch.no_grad():
            first.weight.add_(torch.randn(32, 64) * 0.01)
        second.load_state_dict(first.state_dict())
        assert torch.equal(first.applied_weight(), second.applied_weight())


def test_a_packed_state_needs_to_say_what_its_scale_means() -> None:
    levels = torch.tensor([[1, -1], [0, 1], [-1, -1], [0, 0]])
    packed = ((levels + 1) << torch.tensor([[0], [2], [4], [6]])).sum(0, keepdim=True)
    state = {
        "x.weight": packed.to(torch.uint8), "x.weight_scale": torch.tensor([4.0]),
        "x.bias": torch.ones(4),
    }  # fmt: skip
    assert torch.equal(unpack_rows(state["x.weight"]), levels.to(torch.int8))
    with pytest.raises(ValueError, match="two opposite things"):
        dequantized_state(state)
    inverted = dequantized_state(state, quantization={"quant_method": "bitnet"})
    assert torch.equal(inverted["x.weight"], levels / 4)
    assert torch.equal(inverted["x.bias"], torch.ones(4))
    direct = dequantized_state(state, quantization={"linear_class": "autobitlinear"})
    assert torch.equal(direct["x.weight"], levels * 4.0)
    assert torch.equal(direct["x.bias"], torch.full((4,), 4.0))
    plain = {"x.weight": torch.ones(2)}
    assert dequantized_state(plain) == plain
    with pytest.raises(ValueError, match="no ternary level"):
        unpack_rows(torch.full((1, 2), 3, dtype=torch.uint8))


def test_the_layers_say_whether_they_were_trained_on_their_levels() -> None:
    layer: BitLayer = BitLinear(4, 4)
    assert not layer.trained_quantized
    layer.quantization.steps = 1
    assert layer.trained_quantized
