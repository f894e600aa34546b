"""A teacher of tokens is asked about the positions that have targets, and about no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_parts import SgdPart, make_session
from torch import Tensor, nn

from forge_kernel.config.use import UseLoss, UseQuantizer
from forge_kernel.contract.data import DataSpec
from forge_kernel.contract.values import Batch
from forge_kernel.training.loaders.data_loaders import LoaderData
from forge_plugins.mathematics.losses.distillation import row_distances

PLACES = [slice(1, 3), slice(-1, None), slice(0, 1), slice(0, 3, 2)]
LENGTH, SAMPLES = 4, 5


class WithState(nn.Module):
    """A layer that gives its rows and what it remembers, as recurrent layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Linear(6, 6)

    def forward(self, given: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.rows(given)
        return rows, rows[:, -1] * 3


class Network(nn.Module):
    """Answers at the positions that it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 6)
        self.trunk = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11)
        self.summary = nn.Linear(6, 2)
        self.memory = WithState()

    def forward(self, tokens: Tensor, positions: Any = None) -> Tensor:
        hidden = torch.tanh(self.trunk(self.embedding(tokens)))
        self.summary(hidden.mean(1))
        self.memory(hidden)
        return self.head(hidden if positions is None else hidden[:, positions])  # type: ignore[no-any-return]


def stepped(
    batch: Batch, *hidden: str, loss: str = "distillation", model: nn.Module | None = None
) -> tuple[float, list[Tensor]]:
    """The loss of a step, and the weights after it."""
    model = Network() if model is None else model
    config: dict[str, Any] = {"loss": {"use": "cross_entropy"}}
    if hidden:
        config |= {"hidden": list(hidden), "hidden_weight": 0.5}
    session = make_session(
        model, LoaderData([], spec=DataSpec(vocabulary=11, sequence=LENGTH, classes=11)),
        optimizer=SgdPart(0.5), own_loss=True,
        uses={"loss": UseLoss(loss, config),
              "quantizer": UseQuantizer("bitnet", {"skip": ["head"]})},
    )  # fmt: skip
    value = float(session.step(batch))
    return value, [value.detach().clone() for value in session.run.parameters.values()]


def drawn() -> tuple[Tensor, Tensor]:
    """Tokens, and a target for each."""
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(11, (SAMPLES, LENGTH), generator=generator)
    return tokens, torch.randint(11, (SAMPLES, LENGTH), generator=generator)


@pytest.mark.parametrize("hidden", [["trunk"], ["summary", "trunk"]], ids=str)
@pytest.mark.parametrize("places", PLACES, ids=str)
def test_a_step_on_some_positions_is_one_in_which_all_other_targets_are_ignored(
    places: slice, hidden: list[str]
) -> None:
    """Planted: the hidden rows of positions without a target counted as well.

    Red too when they count beside a layer that has one row for each sample.
    """
    tokens, targets = drawn()
    ignored = torch.full_like(targets, -100)
    ignored[:, places] = targets[:, places]
    some = stepped(Batch(tokens, targets[:, places], positions=places), *hidden)
    every = stepped(Batch(tokens, ignored), *hidden)
    assert some[0] == pytest.approx(every[0], rel=1e-5)
    for one, other in zip(some[1], every[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("places", PLACES, ids=str)
def test_hidden_rows_are_those_of_the_targets_whether_the_layer_gave_all_or_only_them(
    places: slice,
) -> None:
    """Planted: positions taken from rows that are chosen already."""
    student, teacher = torch.randn(
        2, SAMPLES, LENGTH, 6, generator=torch.Generator().manual_seed(1)
    )
    targets = torch.zeros(SAMPLES, LENGTH, dtype=torch.int64)[:, places]
    chosen = student[:, places], teacher[:, places]
    by_hand = (chosen[0] - chosen[1]).square().sum(-1) / chosen[1].square().sum(-1)
    torch.testing.assert_close(row_distances(student, teacher, targets, places), by_hand.flatten())
    torch.testing.assert_close(row_distances(*chosen, targets, places), by_hand.flatten())


def test_a_layer_without_a_row_for_each_target_is_compared_sample_by_sample() -> None:
    student, teacher = torch.randn(2, SAMPLES, 7, 6, generator=torch.Generator().manual_seed(1))
    targets = torch.zeros(SAMPLES, LENGTH, dtype=torch.int64)
    by_hand = (student - teacher).square().sum((1, 2)) / teacher.square().sum((1, 2))
    torch.testing.assert_close(row_distances(student, teacher, targets), by_hand)


@pytest.mark.parametrize("count", [1, LENGTH])
def test_layers_with_rows_and_layers_with_samples_count_alike(count: int) -> None:
    """Red when one of them alone is compared, or the samples' distances are mixed."""
    tokens, targets = drawn()
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0])
    batch = Batch(tokens, targets[:, :count], weights, positions=slice(0, count))
    without, rows, samples, both = (
        stepped(batch, *hidden)[0] for hidden in ([], ["trunk"], ["summary"], ["trunk", "summary"])
    )
    assert min(rows, samples) > without
    assert rows != pytest.approx(samples, rel=1e-2)
    assert both == pytest.approx((rows + samples) / 2, rel=1e-5)


def test_of_a_layer_that_gives_several_the_first_is_compared() -> None:
    """Red when what a recurrent layer remembers is compared, or nothing of it."""
    tokens, targets = drawn()
    batch = Batch(tokens, targets)
    found, first, without = (
        stepped(batch, *hidden)[0] for hidden in (["memory"], ["memory.rows"], [])
    )
    assert found == first > without


class Everywhere(Network):
    """Answers at all positions, whichever have targets."""

    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(tokens)


@pytest.mark.parametrize("network", [Network, Everywhere])
@pytest.mark.parametrize("loss", ["distillation", "consistency"])
@pytest.mark.parametrize("places", PLACES, ids=str)
def test_a_model_that_answers_everywhere_is_compared_where_the_targets_are(
    places: slice, loss: str, network: type[Network]
) -> None:
    """Red when the teacher is not asked about the positions, or the model's others are compared."""
    tokens, targets = drawn()
    ignored = torch.full_like(targets, -100)
    ignored[:, places] = targets[:, places]
    found = [
        stepped(batch, loss=loss, model=model)[0]
        for batch, model in (
            (Batch(tokens, targets[:, places], positions=places), network()),
            (Batch(tokens, ignored), Network()),
        )
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
