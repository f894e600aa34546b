"""The same bits as transformers' AutoBitLinear, and the same metrics as torchao's layer.

(The same arithmetic written out by hand, without these libraries: test_bitnet_schemes.py.)
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from forge_plugins.mathematics.quantization.bit_linear import BitLinear
from forge_plugins.mathematics.quantization.conversion import convert_model_to_bitnet
from forge_plugins.mathematics.quantization.resume_from_quantized import dequantized_state
from forge_plugins.mathematics.quantization.scheme import Scheme


def client(name: str) -> Any:
    """A module of a client library; where FORGE_CLIENTS is 1, a missing one fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if os.environ.get("FORGE_CLIENTS") == "1":
            return importlib.import_module(name)
        return pytest.importorskip(name, exc_type=ImportError)


@pytest.fixture
def theirs() -> Iterator[Any]:
    found = client("transformers.integrations.bitnet")
    before = torch._dynamo.eval_frame._stance
    torch.compiler.set_stance("force_eager")  # its quantizers are compiled: minutes
    yield found
    torch.compiler.set_stance(before.stance)


def trained(layer: nn.Module, x: Tensor, upstream: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(upstream.to(y.dtype))
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_forward_and_backward_are_bit_equal_to_autobitlinear(
    theirs: Any, dtype: torch.dtype, autocast: bool
) -> None:
    torch.manual_seed(0)
    reference = theirs.AutoBitLinear(512, 344, bias=True, online_quant=True, dtype=dtype)
    mine = BitLinear(512, 344, dtype=dtype)
    mine.load_state_dict(reference.state_dict())
    x = (torch.randn(4, 16, 512) * torch.logspace(-4, 2, 16).unsqueeze(1)).to(dtype)
    upstream = torch.randn(4, 16, 344)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        wanted = trained(reference, x, upstream)
        found = trained(mine, x, upstream)
    assert len(found) == len(wanted) == 4
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


def test_a_model_of_autobitlinear_layers_trains_on_here_with_the_same_bits(theirs: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        theirs.AutoBitLinear(32, 64, online_quant=True, use_rms_norm=True),
        nn.ReLU(),
        theirs.AutoBitLinear(64, 16, online_quant=True),
    )
    x = torch.randn(5, 32)
    wanted = net(x)
    converted, report = convert_model_to_bitnet(net)
    assert set(report.origins.values()) == {"latent"}
    assert torch.equal(converted(x), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_layers_are_continued_with_the_weights_that_they_apply(
    theirs: Any, dtype: torch.dtype
) -> None:
    """Both conventions: the scale inverted (BitLinear) and direct with the bias inside it."""
    torch.manual_seed(0)
    levels = torch.randint(-1, 2, (64, 32))
    step = torch.tensor([0.0371]).to(dtype)
    packed = theirs.BitLinear(32, 64, bias=True, dtype=dtype)
    packed.weight.copy_(pack(levels))
    packed.weight_scale.copy_(1.0 / step)
    direct = theirs.AutoBitLinear(32, 64, bias=True, online_quant=False, dtype=dtype)
    direct.requires_grad_(False)
    direct.weight.copy_(levels)
    direct.weight_scale.copy_(step)
    bias = torch.randn(64).to(dtype)
    packed.bias.copy_(bias)
    direct.bias.copy_(bias / step)
    x = torch.randn(3, 32).to(dtype)
    for layer in (packed, direct):
        wanted = layer(x).float()
        mine, report = convert_model_to_bitnet(layer)
        assert report.origins == {"": "packed"}
        assert isinstance(mine, BitLinear)
        assert torch.equal(mine.levels()[0], levels.to(torch.int8))
        factor = 1.0 / (1.0 / step) if layer is packed else step
        wanted_step = (1.0 / (1.0 / step).float()) if layer is packed else factor.float()
        assert torch.equal(mine.applied_weight(), (levels * wanted_step).to(dtype))
        close = 1e-6 if dtype is torch.float32 else 2e-2
        assert torch.allclose(mine(x).float(), wanted, rtol=close, atol=close)
        mine(x).sum().backward()
        assert mine.weight.grad is not None
        assert mine.bias.grad is not None


def pack(levels: Tensor) -> Tensor:
    rows = len(levels) // 4
    parts = [(levels[i * rows : (i + 1) * rows] + 1) << (2 * i) for i in range(4)]
    return torch.stack(parts).sum(0).to(torch.uint8)


def test_packed_state_dicts_come_back_as_plain_weights(theirs: Any) -> None:
    torch.manual_seed(0)
    levels = torch.randint(-1, 2, (64, 32))
    scale = torch.tensor([27.0])
    state = {
        "a.weight": theirs.pack_weights(levels.clone()),
        "a.weight_scale": scale,
        "n": torch.ones(2),
    }
    found = dequantized_state(state, quantization={"linear_class": "bitlinear"})
    assert torch.equal(found["a.weight"], levels / scale)
    assert found.keys() == {"a.weight", "n"}


def test_torchao_gives_the_same_metrics() -> None:
    torchao = client("torchao")
    training = client("torchao.prototype.quantized_training")
    torch.manual_seed(0)
    layer = nn.Linear(256, 96)
    mine = BitLinear(256, 96, scheme=Scheme(parity="torchao"))
    mine.load_state_dict(layer.state_dict())
    x = torch.randn(7, 256) * torch.logspace(-5, 2, 7).unsqueeze(1)
    upstream = torch.randn(7, 96)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchao.quantize_(layer, training.bitnet_training())
        wanted = trained(layer, x, upstream)
    found = trained(mine, x, upstream)
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, rtol=2e-5, atol=2e-6 * float(b.abs().max()))
    rows = (found[0] - mine.bias.detach()).norm(dim=1)
    hf = BitLinear(256, 96)
    hf.load_state_dict(mine.state_dict())
    other = (hf(x) - hf.bias).detach().norm(dim=1)
    assert float(abs(rows[0] / other[0] - 1)) > 0.1  # its floor acts on small rows, hf's does not
    assert torch.allclose(rows[3:], other[3:], rtol=1e-5)


def test_the_library_would_shrink_what_is_quantized_and_we_do_not(theirs: Any) -> None:
    """0.69 for Gaussian weights: the mean of a ternary weight is its density times the step."""
    torch.manual_seed(0)
    once = BitLinear(256, 256, bias=False)
    with torch.no_grad():
        once.weight.normal_()
    file = once.applied_weight().clone()
    twice = theirs.WeightQuant.apply(file)
    assert 0.66 < float(twice.abs().max() / file.abs().max()) < 0.72
    linear = nn.Linear(256, 256, bias=False)
    linear.weight = nn.Parameter(file.clone())
    x = torch.randn(3, 256)
    wanted = functional.linear(BitLinear.quantized_values(once, x), file)
    mine, _ = convert_model_to_bitnet(linear)
    assert torch.equal(mine(x), wanted)
