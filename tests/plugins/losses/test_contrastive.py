"""The contrastive loss in training: which anchors count, and how much, by its sums written out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from kernel_parts import SgdPart, make_session
from torch import Tensor, nn

from forge_kernel.config.use import UseLoss
from forge_kernel.contract.data import DataSpec
from forge_kernel.contract.values import Batch
from forge_kernel.errors import PluginError
from forge_kernel.training.loaders.data_loaders import LoaderData

LABELS = [0, 0, 1, 2, 1, 1, 3, 2]  # 3 stands alone
RATE = 0.1


def batch(weights: list[float] | None = None, labels: list[int] | None = None) -> Batch:
    inputs = torch.randn(len(labels or LABELS), 4, generator=torch.Generator().manual_seed(2))
    given = None if weights is None else torch.tensor(weights)
    return Batch(inputs, torch.tensor(labels or LABELS), given)


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def session_of(
    model: nn.Module, temperature: float = 0.5, *, accumulate: int = 1, nested: bool = False
) -> Any:
    use: str = "contrastive"
    config: dict[str, Any] = {"temperature": temperature}
    if nested:
        use, config = "multi_task", {"tasks": {"alike": {"use": use, "with": config}}}
    return make_session(
        model, LoaderData([], [batch()], spec=DataSpec(classes=4)), optimizer=SgdPart(RATE),
        own_loss=True, uses={"loss": UseLoss(use, config)}, accumulate=accumulate,
    )  # fmt: skip


def by_hand(model: nn.Module, given: Batch, temperature: float) -> list[tuple[Tensor, float]]:
    """Loss and weight of each anchor that has a positive, pair by pair."""
    unit = [row / row.norm() for row in model(given.inputs)]
    labels = given.targets.tolist()
    counts = [1.0] * len(labels) if given.weights is None else given.weights.tolist()
    there = [i for i, (label, one) in enumerate(zip(labels, counts, strict=True))
             if one > 0 and label != -100]  # fmt: skip
    found = []
    for anchor in there:
        others = [i for i in there if i != anchor]
        score = {i: unit[anchor] @ unit[i] / temperature for i in others}
        positives = [i for i in others if labels[i] == labels[anchor]]
        if positives:
            low = torch.stack(list(score.values())).exp().sum().log()
            losses = torch.stack([low - score[i] for i in positives])
            found.append((losses.mean(), counts[anchor]))
    return found


def expected(
    model: nn.Module, *batches: Batch, temperature: float = 0.5
) -> tuple[float, list[Tensor]]:
    """The loss of a window, and the weights after its step."""
    pairs = [pair for one in batches for pair in by_hand(model, one, temperature)]
    loss = sum(value * count for value, count in pairs) / sum(count for _, count in pairs)
    assert isinstance(loss, Tensor)
    parameters = list(model.parameters())
    slopes = torch.autograd.grad(loss, parameters)
    return loss.item(), [one - RATE * slope for one, slope in zip(parameters, slopes, strict=True)]


def check(*batches: Batch, temperature: float = 0.5, nested: bool = False) -> None:
    model = network()
    loss, after = expected(copy.deepcopy(model), *batches, temperature=temperature)
    session = session_of(model, temperature, accumulate=len(batches), nested=nested)
    assert float(session.step(*batches)) == pytest.approx(loss, rel=1e-5)
    for one, other in zip(model.parameters(), after, strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.spec("F11")
@pytest.mark.parametrize("temperature", [0.05, 0.5, 2.0])
def test_a_step_is_that_of_the_mean_over_the_anchors_that_have_a_positive(
    temperature: float,
) -> None:
    """Planted: one that stands alone in the divisor; the temperature not handed on."""
    check(batch(), temperature=temperature)


@pytest.mark.parametrize(
    "weights",
    [
        [1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0],  # one is no neighbour either
        [1.0, 0.0, 2.0, 0.5, 1.0, 3.0, 1.0, 0.5],  # which leaves the other 0 alone
        [0.25] * 8,
    ],
)
def test_an_anchor_counts_as_its_sample_and_none_without_weight_is_in_a_pair(
    weights: list[float],
) -> None:
    """Planted: weights not handed on (a sample of weight 0 stays a neighbour)."""
    check(batch(weights))


@pytest.mark.parametrize("nested", [False, True], ids=["alone", "a task"])
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (batch(), batch(labels=[0, 0, 1, 2, 3])),  # seven anchors and two
        (batch([1.0, 0.0, 2.0, 0.5, 1.0, 3.0, 1.0, 0.5]), batch()),
        (batch(labels=[0, 1, 2]), batch()),  # none in the first
    ],
)
def test_the_anchors_of_all_micro_batches_count_alike(
    one: Batch, other: Batch, nested: bool
) -> None:
    """Planted: the samples counted in place of the anchors; the mean of the means."""
    check(one, other, nested=nested)
    check(other, one, nested=nested)


def test_ignored_samples_are_nobodys_neighbours() -> None:
    """Planted: two ignored ones each other's positive."""
    check(batch(labels=[0, 0, -100, 1, 1, -100, 2, 2]))


@pytest.mark.parametrize(
    "given", [batch(labels=[0, 1, 2]), batch([0.0] * 8), batch([1.0] + [0] * 7)]
)
def test_a_batch_without_any_pair_teaches_nothing(given: Batch) -> None:
    model, untouched = network(), network()
    assert float(session_of(model).step(given)) == 0.0
    for one, other in zip(model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(one, other)


def test_as_many_embeddings_as_labels_are_asked_for() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3)), nn.Flatten(0, 1))
    with pytest.raises(PluginError, match="16 embeddings, 8 labels"):
        session_of(model).step(batch())
