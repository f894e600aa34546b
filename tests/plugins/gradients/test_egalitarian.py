"""Matrices with all singular values at one, against an SVD."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_parts import make_session
from torch import nn

from forge_kernel.config.use import UseGradients
from forge_kernel.contract.values import Batch
from forge_plugins.mathematics.optimizers.newton_schulz import polar_factor


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), size=st.floats(1e-4, 1e4))
@settings(max_examples=40, deadline=None)
def test_by_svd_every_singular_value_is_one_and_directions_stay(
    rows: int, columns: int, size: float
) -> None:
    torch.manual_seed(rows * 41 + columns)
    matrix = torch.randn(rows, columns) * size
    found = polar_factor(matrix, "svd")
    values = torch.linalg.svdvals(found.double())
    assert torch.allclose(values, torch.ones_like(values), atol=1e-4)
    # the polar factor is what makes U^T M symmetric and not negative
    core = found.double().T @ matrix.double() / size
    assert torch.allclose(core, core.T, atol=1e-3)
    assert float(torch.linalg.eigvalsh((core + core.T) / 2).min()) > -1e-3


def test_a_direction_that_is_not_there_is_not_invented() -> None:
    """Planted fault: no cut of the singular values."""
    matrix = torch.outer(torch.tensor([1.0, 2.0, 2.0]), torch.tensor([3.0, 4.0]))
    assert torch.allclose(polar_factor(matrix, "svd"), matrix / 15, atol=1e-6)
    logits = torch.randn(16, 3, requires_grad=True)
    nn.functional.cross_entropy(logits, torch.arange(16) % 3).backward()
    assert logits.grad is not None
    gradient = logits.grad.T @ torch.randn(16, 9)  # of a head: its rows sum to zero
    values = torch.linalg.svdvals(polar_factor(gradient, "svd"))
    assert values.tolist() == pytest.approx([1.0, 1.0, 0.0], abs=1e-5)
    assert not polar_factor(torch.zeros(3, 2), "svd").any()
    assert not polar_factor(torch.zeros(3, 2)).any()


@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (48, 48)])
def test_newton_schulz_comes_near_and_more_iterations_reach_smaller_values(
    shape: tuple[int, int],
) -> None:
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.logspace(0, -1.5, min(shape))
    found = polar_factor((left * values) @ right * 1e-3)
    singular = torch.linalg.svdvals(found)
    assert float(singular.min()) > 0.65
    assert float(singular.max()) < 1.25
    few = torch.linalg.svdvals(polar_factor((left * values) @ right, iterations=2))
    assert float(few.min()) < 0.5


def step_of(model: nn.Module, **config: Any) -> dict[str, torch.Tensor]:
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    torch.manual_seed(1)
    batch = Batch(torch.randn(6, 2, 4, 4), torch.randint(3, (6,)))
    uses = {"gradients": (UseGradients("egalitarian", config),)} if config else {}
    make_session(model, [batch], uses=uses, lr=1.0).step(batch)
    return {name: before[name] - value.detach() for name, value in model.named_parameters()}


def fresh() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 5, 3), nn.Flatten(), nn.Linear(20, 3))


def test_the_run_whitens_matrices_and_filters_and_leaves_vectors() -> None:
    plain, whitened = step_of(fresh()), step_of(fresh(), solver="svd")
    for name in ("0.bias", "2.bias"):
        assert torch.equal(plain[name], whitened[name])
    for name in ("0.weight", "2.weight"):
        wanted = polar_factor(plain[name].flatten(1), "svd").view_as(plain[name])
        assert torch.allclose(whitened[name], wanted, atol=1e-3)
    kept = step_of(fresh(), solver="svd", keep_norm=True)
    assert torch.allclose(kept["2.weight"].norm(), plain["2.weight"].norm(), rtol=1e-3)
    few, more = step_of(fresh(), iterations=1), step_of(fresh(), iterations=5)
    assert not torch.allclose(few["2.weight"], more["2.weight"], atol=1e-2)
