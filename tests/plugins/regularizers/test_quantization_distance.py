"""The distance of latent weights to their levels: zero on the grid, free of scale."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_plugins.mathematics.quantization.bit_linear import BitLinear
from forge_plugins.mathematics.quantization.quantization_distance import quantization_distance
from forge_plugins.mathematics.quantization.scheme import Scheme

SCHEMES = [
    Scheme(weight_bits=bits, granularity=granularity, group_size=8)
    for bits in (1, 1.58, 4, 8)
    for granularity in ("tensor", "row", "group")
]


def layer_of(scheme: Scheme, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return BitLinear(32, 16, scheme=scheme)


@pytest.mark.spec("D15")
@given(index=st.integers(0, len(SCHEMES) - 1), seed=st.integers(0, 999), step=st.floats(0.01, 10))
@settings(max_examples=40, deadline=None)
def test_weights_on_the_grid_have_no_distance_whatever_its_step(
    index: int, seed: int, step: float
) -> None:
    """Planted fault: the applied step 1/s for the fitted one."""
    layer = layer_of(SCHEMES[index], seed)
    levels, _ = layer.levels()
    with torch.no_grad():
        layer.weight.copy_((levels.float() * step).view(16, 32))
    found = quantization_distance(layer)
    found.backward()
    assert float(found.detach()) < 1e-3 * SCHEMES[index].qmax
    assert float(layer.weight.grad.abs().max()) < 1e-2 / step


@pytest.mark.spec("D15")
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_it_is_free_of_scale_and_pulls_each_weight_to_its_own_level(scheme: Scheme) -> None:
    layer = layer_of(scheme)
    found = quantization_distance(layer)
    found.backward()
    levels, _ = layer.levels()
    arranged = layer.weight.detach().reshape(levels.shape)
    dims = None if scheme.granularity == "tensor" else -1
    level = levels.float()
    step = (arranged * level).sum(dims, keepdim=dims is not None) / (level * level).sum(
        dims, keepdim=dims is not None
    )
    away = arranged - step * level
    assert torch.allclose(found.detach(), (away / step).square().sum(), rtol=1e-4)
    pull = layer.weight.grad.reshape(levels.shape)
    clear = away.abs() > 1e-6
    assert bool((pull.sign() == away.sign())[clear].all())
    with torch.no_grad():
        layer.weight.mul_(8)
    assert torch.allclose(quantization_distance(layer), found, rtol=1e-5)


def test_a_block_without_levels_adds_nothing() -> None:
    layer = layer_of(Scheme(granularity="row"))
    with torch.no_grad():
        layer.weight[3].zero_()
    quantization_distance(layer).backward()
    assert bool(torch.isfinite(layer.weight.grad).all())
    assert float(layer.weight.grad[3].abs().sum()) == 0
