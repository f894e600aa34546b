"""Losses against torch, independent references and their laws."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_parts import SgdPart, loss_and_weight, make_session
from torch import nn
from torch.nn import functional

from forge_kernel.config.use import UseLoss
from forge_kernel.contract.data import DataSpec
from forge_kernel.contract.values import Batch
from forge_kernel.errors import ConfigError, PluginError
from forge_kernel.training.loaders.data_loaders import LoaderData
from forge_plugins.losses.cross_entropy import CrossEntropy, CrossEntropyConfig
from forge_plugins.losses.regression import Regression, RegressionConfig
from forge_plugins.mathematics.losses.contrastive import supervised_contrastive
from forge_plugins.mathematics.losses.cross_entropy import classification_losses
from forge_plugins.mathematics.losses.distillation import distillation
from forge_plugins.mathematics.losses.loss_weights import RateOfFall, Uncertainty


def value(tensor: torch.Tensor) -> float:
    return float(tensor.detach())


def classification_loss(
    logits: torch.Tensor, targets: torch.Tensor, ignored: int = -100, **options: Any
) -> tuple[torch.Tensor, float]:
    """The mean over what counts, by the plugin's mathematics and the kernel's counting."""
    values, factors = classification_losses(logits, targets, ignored=ignored, **options)
    mean, weight = Batch(logits, targets, ignore_index=ignored).counted.mean(values, factors)
    return mean, float(weight)


def sample(n: int = 12, classes: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator).mul_(3).requires_grad_()
    return logits, torch.randint(classes, (n,), generator=generator)


@pytest.mark.spec("F9", "F16")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignored", [-100, 2])
def test_without_focus_it_is_torchs_cross_entropy(
    smoothing: float, weighted: bool, ignored: int
) -> None:
    logits, targets = sample()
    weights = torch.tensor([0.5, 1.0, 2.0, 0.1]) if weighted else None
    theirs = functional.cross_entropy(
        logits, targets, weights, label_smoothing=smoothing, ignore_index=ignored
    )
    (expected,) = torch.autograd.grad(theirs, logits)
    plugin = CrossEntropy(
        CrossEntropyConfig(
            label_smoothing=smoothing,
            class_weights=tuple(weights.tolist()) if weights is not None else None,
        )
    )
    batch = Batch(logits, targets, ignore_index=ignored)
    loss, weight = loss_and_weight(plugin, batch, logits)
    (found,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, theirs)
    torch.testing.assert_close(found, expected)
    if not weighted and ignored == -100:
        assert torch.equal(loss, theirs)
    counted = [1.0 if weights is None else float(weights[t]) for t in targets if t != ignored]
    assert float(weight) == pytest.approx(sum(counted))


@pytest.mark.spec("F16")
def test_focus_is_the_papers_formula_also_with_smoothing_and_class_weights() -> None:
    logits, targets = sample()
    chosen = [0.5, 1.0, 2.0, 0.1]
    loss, _ = classification_loss(
        logits, targets, class_weights=torch.tensor(chosen), label_smoothing=0.2, focal_gamma=2.0
    )
    total = divisor = 0.0
    for row, target in zip(logits.double(), targets.tolist(), strict=True):
        log_p = row - row.logsumexp(0)
        smoothed = 0.8 * chosen[target] * -log_p[target]
        smoothed += 0.2 / 4 * sum(chosen[c] * -log_p[c] for c in range(4))
        total += value((1 - log_p[target].exp()) ** 2 * smoothed)
        divisor += chosen[target]
    assert value(loss) == pytest.approx(total / divisor, rel=1e-5)


def test_a_sample_that_is_sure_weighs_less_under_focus_and_its_gradient_is_finite() -> None:
    logits = torch.tensor([[60.0, 0.0], [0.0, 0.1]], requires_grad=True)
    loss, _ = classification_loss(logits, torch.tensor([0, 0]), focal_gamma=0.5)
    loss.backward()
    assert logits.grad is not None
    assert bool(torch.isfinite(logits.grad).all())
    assert float(logits.grad[0].abs().sum()) < 1e-6 < float(logits.grad[1].abs().sum())


def test_nothing_to_average_is_zero_with_weight_zero() -> None:
    logits, targets = sample()
    loss, weight = classification_loss(logits, targets.fill_(3), ignored=3)
    assert (value(loss), float(weight)) == (0.0, 0.0)
    loss.backward()


@given(
    split=st.integers(1, 11),
    gamma=st.sampled_from([0.0, 2.0]),
    smoothing=st.sampled_from([0.0, 0.1]),
    weighted=st.booleans(),
    sampled=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_two_parts_weighed_by_their_weights_are_the_whole(
    split: int, gamma: float, smoothing: float, weighted: bool, sampled: bool
) -> None:
    """What gradient accumulation builds on."""
    logits, targets = sample()
    plugin = CrossEntropy(
        CrossEntropyConfig(
            label_smoothing=smoothing, focal_gamma=gamma,
            class_weights=(0.5, 1.0, 2.0, 0.1) if weighted else None,
        )
    )  # fmt: skip
    own = torch.linspace(0.1, 2, 12) if sampled else None

    def loss(chosen: slice) -> tuple[Any, Any]:
        weights = own[chosen] if own is not None else None
        batch = Batch(logits[chosen], targets[chosen], weights)
        return loss_and_weight(plugin, batch, logits[chosen])

    whole, total = loss(slice(None))
    parts = [loss(slice(None, split)), loss(slice(split, None))]
    mean = sum(value(part) * float(weight) for part, weight in parts)
    assert mean / float(total) == pytest.approx(value(whole), rel=1e-5)
    assert sum(float(weight) for _, weight in parts) == pytest.approx(float(total), rel=1e-5)


def test_class_weights_of_another_number_of_classes_are_refused() -> None:
    logits, targets = sample()
    plugin = CrossEntropy(CrossEntropyConfig(class_weights=(1.0, 2.0)))
    with pytest.raises(PluginError, match="2 class_weights for 4 classes"):
        plugin.compute_loss(None, None, Batch(logits, targets), logits)
    with pytest.raises(ValueError, match="all 0"):
        CrossEntropyConfig(class_weights=(0.0, 0.0))


@pytest.mark.spec("F10")
@pytest.mark.parametrize(
    ("distance", "theirs"),
    [
        ("squared", functional.mse_loss),
        ("absolute", functional.l1_loss),
        ("huber", lambda a, b: functional.huber_loss(a, b, delta=0.7)),
    ],
)
def test_regression_is_torchs(distance: Any, theirs: Any) -> None:
    outputs, targets = torch.randn(9, 3), torch.randn(9, 3)
    delta = {"delta": 0.7} if distance == "huber" else {}
    plugin = Regression(RegressionConfig(distance=distance, **delta))
    loss, weight = loss_and_weight(plugin, Batch(outputs, targets), outputs)
    torch.testing.assert_close(loss, theirs(outputs, targets))
    assert weight == 9
    weights = torch.linspace(0, 1, 9)
    loss, total = loss_and_weight(plugin, Batch(outputs, targets, weights), outputs)
    each = torch.stack([theirs(o, t) for o, t in zip(outputs, targets, strict=True)])
    torch.testing.assert_close(loss, (each * weights).sum() / weights.sum())
    assert total == pytest.approx(float(weights.sum()))


def test_regression_takes_a_column_for_a_row_but_no_broadcast() -> None:
    plugin = Regression(RegressionConfig())
    outputs, targets = torch.randn(5, 1), torch.randn(5)
    loss, _ = loss_and_weight(plugin, Batch(outputs, targets), outputs)
    torch.testing.assert_close(loss, functional.mse_loss(outputs[:, 0], targets))
    with pytest.raises(PluginError, match="shape"):
        plugin.compute_loss(None, None, Batch(outputs, torch.randn(5, 2)), outputs)
    with pytest.raises(ValueError, match="huber"):
        RegressionConfig(delta=2.0)


def slow_contrastive(embeddings: torch.Tensor, labels: list[int], temperature: float) -> float:
    """The paper's sums, written out in double precision."""
    unit = [row / row.norm() for row in embeddings.double()]
    losses = []
    for i in range(len(unit)):
        positives = [p for p in range(len(unit)) if p != i and labels[p] == labels[i]]
        if not positives:
            continue
        scores = [float(unit[i] @ unit[a]) / temperature for a in range(len(unit)) if a != i]
        high = max(scores)
        log_sum = high + math.log(sum(math.exp(score - high) for score in scores))
        each = [log_sum - float(unit[i] @ unit[p]) / temperature for p in positives]
        losses.append(sum(each) / len(each))
    return sum(losses) / len(losses)


@pytest.mark.spec("F11")
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
def test_contrastive_is_the_papers_also_at_a_low_temperature(temperature: float) -> None:
    embeddings = torch.randn(10, 6, requires_grad=True)
    labels = [0, 0, 1, 1, 1, 2, 3, 3, 2, 4]  # 4 stands alone
    loss, anchors = supervised_contrastive(embeddings, torch.tensor(labels), temperature)
    assert int(anchors) == 9
    expected = slow_contrastive(embeddings.detach(), labels, temperature)
    assert value(loss) == pytest.approx(expected, rel=1e-4)
    loss.backward()
    assert embeddings.grad is not None
    assert bool(torch.isfinite(embeddings.grad).all())


def test_contrastive_without_any_positive_is_zero_with_a_finite_gradient() -> None:
    embeddings = torch.randn(3, 4, requires_grad=True)
    loss, anchors = supervised_contrastive(embeddings, torch.tensor([0, 1, 2]), 0.1)
    loss.backward()
    assert (value(loss), int(anchors)) == (0.0, 0)
    assert embeddings.grad is not None
    assert bool(torch.isfinite(embeddings.grad).all())


@pytest.mark.spec("F13")
def test_distillation_is_the_divergence_times_the_temperature_squared() -> None:
    student, teacher = torch.randn(7, 5), torch.randn(7, 5)
    p = torch.softmax(teacher.double() / 3, -1)
    q = torch.softmax(student.double() / 3, -1)
    expected = float((p * (p / q).log()).sum(-1).mean() * 9)
    assert float(distillation(student, teacher, 3.0)) == pytest.approx(expected, rel=1e-5)
    assert float(distillation(teacher, teacher, 2.0)) == pytest.approx(0.0, abs=1e-6)


class TwoHeads(nn.Module):
    """Two answers from one trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 8)
        self.kind = nn.Linear(8, 3)
        self.size = nn.Linear(8, 1)

    def forward(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.trunk(inputs).relu()
        return {"kind": self.kind(hidden), "size": self.size(hidden)}


def two_tasks() -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(8, 4, generator=generator)
    targets = {
        "kind": torch.randint(3, (8,), generator=generator),
        "size": torch.randn(8, generator=generator) * 5,
    }
    return [Batch(inputs, targets)]


def task_session(batches: list[Batch], **config: Any) -> Any:
    tasks = {"kind": {"use": "cross_entropy"}, "size": {"use": "regression"}}
    torch.manual_seed(0)
    return make_session(
        TwoHeads(), LoaderData(batches, spec=DataSpec(classes=3)), optimizer=SgdPart(0.05), log_every=1,
        uses={"loss": UseLoss("multi_task", {"tasks": tasks, **config})}, own_loss=True,
    )  # fmt: skip


@pytest.mark.spec("F14")
def test_fixed_weights_give_the_weighted_sum() -> None:
    batches = two_tasks()
    session = task_session(batches, weights={"size": 0.25})
    outputs = session.run.model(batches[0].inputs)
    targets = batches[0].targets
    expected = functional.cross_entropy(outputs["kind"], targets["kind"])
    expected = expected + 0.25 * functional.mse_loss(outputs["size"][:, 0], targets["size"])
    assert float(session.step(batches[0])) == pytest.approx(value(expected), rel=1e-6)
    metrics = session.log().metrics
    assert {"loss/kind", "loss/size"} <= metrics.keys()


@pytest.mark.spec("F14")
def test_uncertainty_weights_are_trained_by_the_runs_optimizer() -> None:
    batches = two_tasks()
    session = task_session(batches, weighting="uncertainty")
    weights = session.run.parameters["task_uncertainty.log_variance"]
    assert any(
        weights is p for group in session.run.optimizer.param_groups for p in group["params"]
    )
    for _ in range(30):
        session.step(batches[0])
    kind, size = weights.tolist()
    assert size > kind + 0.1, "the task with the greater loss is trusted less"


def test_uncertainty_has_the_published_gradient() -> None:
    module = Uncertainty(["a", "b"])
    losses = torch.tensor([3.0, 0.2])
    module(losses).backward()
    expected = -losses + 0.5  # d/ds (exp(-s) L + s / 2) at s = 0
    assert module.log_variance.grad is not None
    torch.testing.assert_close(module.log_variance.grad, expected)


@pytest.mark.spec("F15")
@given(
    falls=st.lists(st.floats(0.9, 1.0), min_size=2, max_size=4),
    temperature=st.floats(0.5, 5),
)
@settings(max_examples=40, deadline=None)
def test_adaptive_weights_sum_to_their_number_and_favour_the_slowest(
    falls: list[float], temperature: float
) -> None:
    progress = RateOfFall(len(falls), 0.9)
    losses = torch.ones(len(falls), dtype=torch.float64)
    for _ in range(50):
        progress.take(losses)
        losses = losses * torch.tensor(falls)
    weights = progress.weights(temperature, like=losses)
    assert float(weights.sum()) == pytest.approx(len(falls), rel=1e-5)
    order = sorted(range(len(falls)), key=lambda i: falls[i])
    for slower, faster in zip(order[1:], order[:-1], strict=True):
        if falls[slower] > falls[faster] + 1e-3:
            assert weights[slower] > weights[faster]
    again = RateOfFall(len(falls), 0.9)
    again.load_state_dict(copy.deepcopy(progress.state_dict()))
    assert torch.equal(again.weights(temperature, like=losses), weights)


@pytest.mark.parametrize("temperature", [0.5, 2.0, 6.0])
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_adaptive_weights_are_the_softmax_of_how_much_of_each_loss_is_left(
    temperature: float, scale: float
) -> None:
    """Planted: the ratio times the temperature; a least loss that is not least."""
    progress = RateOfFall(2, 0.5)
    losses = torch.tensor([[4.0, 2.0], [1.0, 1.9], [0.5, 1.8]]) * scale
    for one in losses:
        progress.take(one)

    def average(values: torch.Tensor, decay: float) -> float:
        shares = torch.tensor([decay**age for age in (2, 1, 0)])
        return value((values * shares).sum() / shares.sum())

    left = [average(one, 0.5) / average(one, 0.5**0.1) for one in losses.T]
    expected = 2 * torch.softmax(torch.tensor(left) / temperature, 0)
    torch.testing.assert_close(progress.weights(temperature), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("changed", [{"temperature": 9.0}, {"decay": 0.1}], ids=str)
def test_adaptive_weighting_reads_its_temperature_and_its_decay(changed: dict[str, float]) -> None:
    def last_loss(**config: float) -> float:
        session = task_session(two_tasks(), weighting="adaptive", **config)
        return [float(session.step(two_tasks()[0])) for _ in range(6)][-1]

    assert last_loss() != last_loss(**changed)


@pytest.mark.parametrize("steps", [2, 3, 6])
def test_adaptive_weights_are_shown_and_go_on_from_a_state(steps: int) -> None:
    """Planted: the averages not taken up; another decay than the setting's after it."""
    batches = two_tasks()
    straight, fresh = (task_session(batches, weighting="adaptive", decay=0.5) for _ in range(2))
    for _ in range(steps):
        straight.step(batches[0])
    fresh.run.model.load_state_dict(straight.run.model.state_dict())
    states = [copy.deepcopy(plugin.state_dict()) for _, plugin in straight.bus.stateful()]
    for (_, plugin), state in zip(fresh.bus.stateful(), states, strict=True):
        plugin.load_state_dict(state)
    for _ in range(3):
        assert float(straight.step(batches[0])) == float(fresh.step(batches[0]))
        shown, again = (session.log().metrics for session in (straight, fresh))
        weights = [shown["weight/kind"], shown["weight/size"]]
        assert sum(weights) == pytest.approx(2.0)
        assert weights == [again["weight/kind"], again["weight/size"]]
        assert weights[0] != weights[1]


def test_a_weight_of_no_task_and_a_task_without_output_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown tasks"):
        task_session(two_tasks(), weights={"colour": 1.0})
    batches = two_tasks()
    batches[0].targets.pop("size")
    with pytest.raises(PluginError, match="no target 'size'"):
        task_session(batches).step(batches[0])
