"""`arithmetic: int8_backward`: how far its gradients are off, whatever comes in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from forge_plugins.mathematics.quantization import quantized_linear
from forge_plugins.mathematics.quantization.bit_linear import BitLinear
from forge_plugins.mathematics.quantization.integer_gradients import token_order
from forge_plugins.mathematics.quantization.scheme import Scheme

pytestmark = pytest.mark.skipif(
    bool(quantized_linear.lacks_int8("cpu")), reason="the processor multiplies no int8"
)
TOKENS, WIDTH, OUT = 700, 96, 80


def layers() -> tuple[BitLinear, BitLinear]:
    torch.manual_seed(0)
    exact = BitLinear(WIDTH, OUT, bias=False)
    fast = BitLinear.from_linear(exact, Scheme(arithmetic="int8_backward"))
    return exact, fast


def weight_gradient(layer: BitLinear, inputs: Tensor, upstream: Tensor) -> Tensor:
    return torch.autograd.grad(layer(inputs), layer.weight, upstream)[0].double()


def trained_like(tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """Inputs, and gradients whose tokens differ in size as those of a trained network do."""
    source = torch.Generator().manual_seed(1)
    inputs = torch.randn(tokens, WIDTH, generator=source)
    sizes = torch.randn(tokens, 1, generator=source).mul(1.5).exp()
    return inputs, torch.randn(tokens, OUT, generator=source) * sizes * 1e-7


def planted(kind: str, upstream: Tensor) -> Tensor:
    upstream, spread = upstream.clone(), upstream.std()
    if kind == "a token":
        upstream[17] = 100 * spread
    elif kind == "numbers":
        spots = torch.randperm(upstream.numel(), generator=torch.Generator().manual_seed(2))[:20]
        upstream.view(-1)[spots] = 100 * spread
    elif kind == "a column":
        upstream[:, 5] *= 100
    return upstream


@pytest.mark.parametrize("kind", ["nothing", "a token", "numbers", "a column"])
def test_weight_gradients_are_near_whatever_outliers_there_are(kind: str) -> None:
    """Red when a chunk that 8 bits are too coarse for gets no finer levels."""
    exact, fast = layers()
    inputs, upstream = trained_like()
    upstream = planted(kind, upstream)
    wanted = weight_gradient(exact, inputs, upstream)
    found = weight_gradient(fast, inputs, upstream)
    assert (found - wanted).norm() <= 0.015 * wanted.norm()
    assert (found * wanted).sum() >= 0.9995 * found.norm() * wanted.norm()
    if kind == "a token":  # what the outlier leaves of the others: not its own share of the norm
        others = torch.arange(TOKENS) != 17
        wanted = weight_gradient(exact, inputs[others], upstream[others])
        alone = weight_gradient(exact, inputs[~others], upstream[~others])
        assert (found - alone - wanted).norm() <= 0.25 * wanted.norm()


@pytest.mark.parametrize("tokens", [1, 255, 256, 257, 4097])
def test_any_number_of_tokens_is_counted_once(tokens: int) -> None:
    """Red when the tokens beyond the last whole chunk get lost, or come twice."""
    exact, fast = layers()
    inputs, upstream = trained_like(tokens)
    wanted = weight_gradient(exact, inputs, upstream)
    found = weight_gradient(fast, inputs, upstream)
    assert (found - wanted).norm() <= 0.02 * wanted.norm()


def test_tokens_without_a_gradient_change_nothing() -> None:
    """Red when ignored targets share a step with others, or take part in it."""
    _, fast = layers()
    inputs, upstream = trained_like(256)
    fewer = weight_gradient(fast, inputs, upstream)
    more = torch.cat([inputs, torch.randn(300, WIDTH)])
    padded = weight_gradient(fast, more, torch.cat([upstream, torch.zeros(300, OUT)]))
    assert torch.equal(fewer, padded)
    assert not weight_gradient(fast, inputs, torch.zeros_like(upstream)).any()


def test_the_error_has_no_bias() -> None:
    """Red when levels are cut off instead of rounded: the mean over draws would not shrink."""
    exact, fast = layers()
    off: Any = 0.0
    for seed in range(16):
        torch.manual_seed(seed)
        inputs = torch.randn(TOKENS, WIDTH)
        upstream = torch.randn(TOKENS, OUT)
        wanted = weight_gradient(exact, inputs, upstream)
        off = off + (weight_gradient(fast, inputs, upstream) - wanted) / wanted.norm()
    assert (off / 16).norm() < 0.5 * 0.007


@pytest.mark.parametrize("lost", [float("nan"), float("inf")])
def test_what_is_no_number_comes_out_as_none(lost: float) -> None:
    """Red when a NaN becomes a whole number, and the step is taken."""
    _, fast = layers()
    inputs, upstream = trained_like()
    upstream[300, 7] = lost
    inputs.requires_grad_()
    to_input, to_weight = torch.autograd.grad(fast(inputs), [inputs, fast.weight], upstream)
    assert not to_weight[7].isfinite().any()
    assert to_weight[:7].isfinite().all()
    assert not to_input[300].isfinite().any()
    assert to_input[:300].isfinite().all()


def test_a_layer_that_comes_first_needs_no_gradient_of_its_input() -> None:
    _, fast = layers()
    inputs, upstream = trained_like()
    alone = weight_gradient(fast, inputs, upstream)
    both = weight_gradient(fast, inputs.clone().requires_grad_(), upstream)
    assert (alone - both).norm() <= 1e-6 * both.norm()


def test_tokens_are_put_in_order_within_parts() -> None:
    sizes = torch.rand(5000, 1)
    order = token_order(sizes)
    assert len(order) == 5120
    assert sorted(order.tolist()) == list(range(5120))
    taken = torch.cat([sizes.flatten(), torch.full((120,), -1.0)])[order]
    assert (taken[:4096].diff() <= 0).all()
    assert (taken[4096:].diff() <= 0).all()
