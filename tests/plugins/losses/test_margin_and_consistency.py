"""The margin of right answers, and the network's own answers in full precision as a teacher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_parts import SgdPart, make_session
from torch import Tensor, nn
from torch.nn import functional

from forge_kernel.config.use import UseLoss, UseQuantizer
from forge_kernel.contract.data import DataSpec
from forge_kernel.contract.values import Batch
from forge_kernel.errors import PluginError
from forge_kernel.training.loaders.data_loaders import LoaderData
from forge_plugins.mathematics.losses.latent_answer import latent_answer
from forge_plugins.mathematics.metrics.lacking_margin import lacking_margin
from forge_plugins.mathematics.quantization.bit_layer import BitLayer


def batch(count: int = 6, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 4, generator=generator)
    return Batch(inputs, torch.randint(3, (count,), generator=generator))


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def session_of(
    model: nn.Module, loss: str, config: dict[str, Any], *, quantized: bool = False
) -> Any:
    uses: dict[str, Any] = {"loss": UseLoss(loss, config)}
    if quantized:
        uses["quantizer"] = UseQuantizer("bitnet", {})
    data = LoaderData([], [batch()], spec=DataSpec(classes=3))
    return make_session(
        model, data, optimizer=SgdPart(0.1), log_every=1, uses=uses, own_loss=True
    )  # fmt: skip


def by_hand(logits: Tensor, targets: Tensor) -> Tensor:
    found = []
    for row, target in zip(logits, targets.tolist(), strict=True):
        wrong = max(value for place, value in enumerate(row.tolist()) if place != target)
        found.append(max(0.0, 1.0 - (row[target].item() - wrong)))
    return torch.tensor(found)


def test_the_margin_is_its_formula_and_asks_nothing_of_an_answer_that_leads() -> None:
    """Planted: the right logit among the wrong ones."""
    given = batch()
    logits = torch.randn(6, 3)
    torch.testing.assert_close(
        lacking_margin(logits, given.targets), by_hand(logits, given.targets)
    )
    leading = torch.tensor([[5.0, 1.0, 0.0]], requires_grad=True)
    loss = lacking_margin(leading, torch.tensor([0])).sum()
    loss.backward()
    assert loss.item() == 0.0
    assert leading.grad is not None
    assert not leading.grad.any()


def test_the_margin_is_the_mean_over_targets_that_count() -> None:
    """Planted: ignored targets and samples of weight 0 counted."""
    given, model = batch(), network()
    expected = by_hand(model(given.inputs), given.targets)
    session = session_of(model, "margin", {})
    assert float(session.step(given)) == pytest.approx(float(expected.mean()), rel=1e-5)
    model = network()
    session = session_of(model, "margin", {})
    targets = given.targets.clone()
    targets[:2] = -100
    weights = torch.tensor([1.0, 1.0, 0.0, 2.0, 1.0, 1.0])
    mean = (expected[2:] * weights[2:]).sum() / weights[2:].sum()
    found = session.step(Batch(given.inputs, targets, weights))
    assert float(found) == pytest.approx(float(mean), rel=1e-5)


def test_two_micro_batches_of_a_margin_are_one_batch() -> None:
    given = batch(7)
    targets = given.targets.clone()
    targets[:3] = -100
    whole, parts = network(), network()
    session_of(whole, "margin", {}).step(Batch(given.inputs, targets))
    session_of(parts, "margin", {}).step(
        Batch(given.inputs[:4], targets[:4]), Batch(given.inputs[4:], targets[4:])
    )
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("outputs", "message"), [(nn.Linear(4, 1), "two or more"), (nn.Flatten(0), "24 answers")]
)
def test_outputs_without_wrong_answers_are_refused(outputs: nn.Module, message: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), outputs)
    if message == "24 answers":
        model.append(nn.Unflatten(0, (24, 1)))
    with pytest.raises(PluginError, match=message):
        session_of(model, "margin", {}).step(batch())


def test_of_two_classes_the_other_one_is_wrong() -> None:
    """Red when a single wrong answer is too few."""
    given = Batch(torch.tensor([[0.5, 0.2], [3.0, 1.0], [0.0, 4.0]]), torch.tensor([0, 0, 0]))
    model = nn.Linear(2, 2, bias=False)
    nn.init.eye_(model.weight)
    lacks = [1.0 - 0.3, 0.0, 1.0 + 4.0]
    assert float(session_of(model, "margin", {}).step(given)) == pytest.approx(sum(lacks) / 3)


@pytest.mark.parametrize(("config", "weight"), [({"weight": 0.7}, 0.7), ({}, 0.1)])
def test_consistency_adds_the_divergence_from_the_latent_answers(
    config: dict[str, Any], weight: float
) -> None:
    """Planted: the blend left at 0 after the teacher's answer; the teacher with a gradient.

    Red when the divergence counts another part than is set or, with nothing set, than a tenth.
    """
    given, latent = batch(), network()(batch().inputs)
    plain = session_of(network(), "cross_entropy", {}, quantized=True)
    base = float(plain.step(given))
    session = session_of(network(), "consistency", config, quantized=True)
    outputs = session.run.model(given.inputs)
    told = functional.kl_div(
        outputs.log_softmax(1), latent.log_softmax(1), log_target=True, reduction="batchmean"
    )
    assert told.item() > 1e-4
    assert float(session.step(given)) == pytest.approx(base + weight * told.item(), rel=1e-5)
    assert session.log().metrics["target_loss"] == pytest.approx(base, rel=1e-6)
    assert all(
        one.warmup_lambda == 1.0 for one in session.run.model.modules() if isinstance(one, BitLayer)
    )


def test_a_validation_has_the_loss_towards_the_targets_alone() -> None:
    found = [
        session_of(network(), loss, {}, quantized=True).validate()["loss"]
        for loss in ("cross_entropy", "consistency")
    ]
    assert found[0] == found[1]


def test_the_latent_answer_moves_no_running_average_and_drops_nothing() -> None:
    """Planted: the model left in training mode."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
    model[2].train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = batch().inputs
    first, second = (latent_answer(model, lambda: model(inputs)) for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert model[2].training
