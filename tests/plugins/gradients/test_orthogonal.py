"""Gradients at right angles to their weights, and StableMax, which they are used with."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_parts import make_session
from torch import nn

from forge_kernel.config.use import UseGradients, UseLoss
from forge_kernel.contract.values import Batch
from forge_plugins.mathematics.losses.stablemax import stablemax_logits
from forge_plugins.mathematics.optimizers.orthogonal_gradient import remove_parallel_part

SHAPES = ((3, 5), (7,), (2, 3, 4), (1, 6))


@given(seed=st.integers(0, 999), size=st.floats(1e-3, 1e3), keep_norm=st.booleans())
@settings(max_examples=40, deadline=None)
def test_what_is_left_is_the_projection_written_out_by_hand(
    seed: int, size: float, keep_norm: bool
) -> None:
    """Planted faults: the sign of the projection; the norm after the removal for the one before."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=generator) for shape in SHAPES]
    gradients = [torch.randn(shape, generator=generator) * size for shape in SHAPES]
    expected = []
    for weight, gradient in zip(weights, gradients, strict=True):
        w, g = weight.double().flatten(), gradient.double().flatten()
        left = g - (w @ g) / (w @ w) * w
        expected.append(left * (g.norm() / left.norm()) if keep_norm else left)
    remove_parallel_part(gradients, weights, keep_norm=keep_norm)
    for weight, gradient, wanted in zip(weights, gradients, expected, strict=True):
        found = gradient.double().flatten()
        assert float((found - wanted).norm() / wanted.norm()) < 1e-4
        across = float(found @ weight.double().flatten() / (found.norm() * weight.double().norm()))
        assert abs(across) < 1e-5


def test_a_parallel_gradient_becomes_zero_and_a_weight_of_zeros_leaves_it() -> None:
    weight = torch.tensor([[1.0, 2.0]])
    gradient, scalar, kept = weight * 3, torch.tensor([4.0]), torch.tensor([5.0, 6.0])
    remove_parallel_part([gradient, scalar, kept], [weight, torch.tensor([2.0]), torch.zeros(2)])
    assert gradient.tolist() == [[0.0, 0.0]]
    assert scalar.tolist() == [0.0]
    assert kept.tolist() == [5.0, 6.0]


@pytest.mark.parametrize("matrices_only", [False, True])
def test_the_run_filters_what_it_is_told_to(matrices_only: bool) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    batch = Batch(torch.randn(5, 4), torch.randint(3, (5,)))
    uses = {"gradients": (UseGradients("orthogonal", {"matrices_only": matrices_only}),)}
    make_session(model, [batch], uses=uses, lr=0.5).step(batch)
    moved = {name: value.detach() - before[name] for name, value in model.named_parameters()}
    along = {name: float((moved[name] * before[name]).sum().abs()) for name in moved}
    assert along["weight"] < 1e-6
    assert (along["bias"] < 1e-6) is not matrices_only


@given(values=st.lists(st.floats(-50, 50), min_size=2, max_size=9))
@settings(max_examples=50, deadline=None)
def test_stablemax_is_the_papers_formula(values: list[float]) -> None:
    """Planted fault: `x` for `-x` in the lower branch."""
    logits = torch.tensor(values, dtype=torch.float64)
    shares = torch.softmax(stablemax_logits(logits), -1)
    sizes = [x + 1 if x >= 0 else 1 / (1 - x) for x in values]
    assert torch.allclose(shares, torch.tensor([s / sum(sizes) for s in sizes]).double())


def test_stablemax_has_its_slope_at_zero_and_does_not_round_to_nothing() -> None:
    logits = torch.zeros(3, requires_grad=True)
    stablemax_logits(logits).sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [1.0, 1.0, 1.0]
    sure = torch.tensor([[200.0, 0.0]])
    target = torch.tensor([0])
    assert float(nn.functional.cross_entropy(sure, target)) == 0.0
    assert float(nn.functional.cross_entropy(stablemax_logits(sure), target)) > 1e-3
    assert stablemax_logits(sure.bfloat16()).dtype == torch.float32


def test_the_loss_takes_stablemax_in_the_place_of_softmax() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    batch = Batch(torch.randn(5, 4) * 3, torch.randint(3, (5,)))
    session = make_session(
        model, [batch], own_loss=True, lr=0.0,
        uses={"loss": UseLoss("cross_entropy", {"activation": "stablemax", "label_smoothing": 0.1})},
    )  # fmt: skip
    found = session.step(batch)
    expected = nn.functional.cross_entropy(
        stablemax_logits(model(batch.inputs)), batch.targets, label_smoothing=0.1
    )
    torch.testing.assert_close(found, expected.detach())
