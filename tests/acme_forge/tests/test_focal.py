"""The focal loss."""

from __future__ import annotations

import pytest
import torch
from acme_forge.focal import AcmeFocal, AcmeFocalConfig
from torch import Tensor
from torch.nn.functional import cross_entropy

from forge_kernel.api import Batch

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.5], [0.1, 0.2, 0.3], [-3.0, 3.0, 0.0]])
TARGETS = torch.tensor([0, 2, 1, 1])


def focal(
    gamma: float, weights: Tensor | None = None, logits: Tensor = LOGITS
) -> tuple[Tensor, float]:
    batch = Batch(None, TARGETS[: len(logits)], weights)
    losses = AcmeFocal(AcmeFocalConfig(gamma=gamma)).compute_loss(batch, logits)
    loss, weight = batch.counted.mean(losses)
    return loss, float(weight)


def test_with_gamma_zero_it_is_cross_entropy() -> None:
    loss, weight = focal(0.0)
    torch.testing.assert_close(loss, cross_entropy(LOGITS, TARGETS))
    assert weight == 4


def test_it_follows_the_formula_of_the_paper() -> None:
    p = LOGITS.softmax(1)[range(4), TARGETS]
    torch.testing.assert_close(focal(2.0)[0], (-((1 - p) ** 2) * p.log()).mean())


def test_sample_weights_weigh_the_mean_and_their_sum_is_its_weight() -> None:
    loss, weight = focal(2.0, torch.tensor([1.0, 0.0, 3.0, 0.0]))
    p = LOGITS.softmax(1)[range(4), TARGETS]
    each = -((1 - p) ** 2) * p.log()
    torch.testing.assert_close(loss, (each[0] + 3 * each[2]) / 4)
    assert weight == 4


def test_a_batch_of_no_weight_costs_nothing() -> None:
    loss, weight = focal(2.0, torch.zeros(4))
    assert (float(loss), weight) == (0.0, 0.0)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_a_sure_answer_has_a_finite_gradient(gamma: float) -> None:
    logits = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    focal(gamma, logits=logits)[0].backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


def test_it_reads_only_the_positions_of_the_answers() -> None:
    everywhere = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    batch = Batch(None, TARGETS[:, None], positions=slice(-1, None))
    losses = AcmeFocal(AcmeFocalConfig()).compute_loss(batch, everywhere)
    loss, weight = batch.counted.mean(losses)
    torch.testing.assert_close(loss, focal(2.0, logits=everywhere[:, -1])[0])
    assert weight == 4
