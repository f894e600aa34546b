"""The losses of the Phase 5 face against torch and plain formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from agent_forge.phases.phase5_training.pipeline.bitnet_optimizer import (
    BitNetConfig,
    convert_model_to_bitnet,
    mean_quantization_distance,
)
from agent_forge.phases.phase5_training.pipeline.loss_functions import (
    AdaptiveLoss,
    LossConfig,
    LossManager,
    LossType,
    MultiTaskLoss,
    create_loss_function,
)


@pytest.fixture
def logits() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(12, 5, requires_grad=True)


@pytest.fixture
def targets() -> Tensor:
    return torch.arange(12) % 5


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))


def test_classification_is_torchs_with_smoothing_and_class_weights(
    logits: Tensor, targets: Tensor
) -> None:
    """Spec: F9, A8, A9. Planted: class weights dropped."""
    assert torch.equal(
        create_loss_function("classification")(logits, targets),
        functional.cross_entropy(logits, targets),
    )
    weights = [0.5, 1.0, 2.0, 3.0, 0.1]
    for reduction in ("mean", "sum", "none"):
        config = LossConfig(label_smoothing=0.1, class_weights=weights, reduction=reduction)
        expected = functional.cross_entropy(
            logits, targets, torch.tensor(weights), label_smoothing=0.1, reduction=reduction
        )
        found = create_loss_function(LossType.CLASSIFICATION, config, num_classes=5)(
            logits, targets
        )
        torch.testing.assert_close(found, expected)


def test_focal_keeps_smoothing_and_class_weights(logits: Tensor, targets: Tensor) -> None:
    """Spec: F9, F16. Planted: gamma ignored."""
    weights = torch.tensor([0.5, 1.0, 2.0, 3.0, 0.1])
    config = LossConfig(focal_loss_gamma=2.0, label_smoothing=0.1, class_weights=weights.tolist())
    each = functional.cross_entropy(logits, targets, weights, label_smoothing=0.1, reduction="none")
    share = logits.softmax(1).gather(1, targets[:, None]).squeeze(1)
    expected = (each * (1 - share) ** 2).sum() / weights[targets].sum()
    torch.testing.assert_close(
        create_loss_function("classification", config)(logits, targets), expected
    )


@pytest.mark.parametrize(
    ("distance", "reference"),
    [("squared", functional.mse_loss), ("absolute", functional.l1_loss),
     ("huber", functional.huber_loss)],
)  # fmt: skip
def test_regression_is_torchs(distance: str, reference: Any) -> None:
    """Spec: F10."""
    torch.manual_seed(0)
    predictions, targets = torch.randn(7, 3) * 3, torch.randn(7, 3)
    found = create_loss_function(LossType.REGRESSION, distance=distance)(predictions, targets)
    torch.testing.assert_close(found, reference(predictions, targets))
    with pytest.raises(ValueError, match=r"\(7, 3\) for targets of shape \(7,\)"):
        create_loss_function("regression")(predictions, targets[:, 0])


def test_generation_leaves_padding_out() -> None:
    """Spec: F2."""
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 4, 9), torch.randint(0, 9, (2, 4))
    targets[0, 2:] = -100
    found = create_loss_function(LossType.GENERATION)(logits, targets)
    torch.testing.assert_close(
        found, functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    )


def test_contrastive_is_its_formula_also_when_cold() -> None:
    """Spec: F11. Planted: anchors without a positive counted."""
    torch.manual_seed(0)
    vectors, labels = torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 1, 2])
    for temperature in (0.5, 0.01):
        unit = functional.normalize(vectors.double(), dim=1)
        scores = unit @ unit.T / temperature
        losses = []
        for i in range(6):
            others = [j for j in range(6) if j != i]
            positives = [j for j in others if labels[j] == labels[i]]
            if positives:
                divisor = torch.logsumexp(scores[i, others], 0)
                losses.append(-torch.stack([scores[i, p] - divisor for p in positives]).mean())
        found = create_loss_function("contrastive", temperature=temperature)(vectors, labels)
        torch.testing.assert_close(found.double(), torch.stack(losses).mean(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", LossType)
def test_each_type_builds_and_learns(kind: LossType, logits: Tensor, targets: Tensor) -> None:
    """Spec: F2."""
    options: dict[str, Any] = {}
    aim: Any = targets
    if kind is LossType.MULTI_TASK:
        options["task_losses"] = {"main": functional.cross_entropy}
    if kind is LossType.REGRESSION:
        aim = torch.zeros(12, 5)
    loss = create_loss_function(kind, **options)(logits, aim)
    loss.backward()
    assert loss.ndim == 0
    assert logits.grad is not None
    assert float(logits.grad.abs().sum()) > 0


def test_bitnet_adds_its_parts_with_a_model_only(targets: Tensor) -> None:
    """Spec: F3, F12. Planted: the sparsity part summed, not averaged."""
    model: Any = convert_model_to_bitnet(network(), BitNetConfig(weight_bits=1.58))
    inputs = torch.randn(12, 6)
    outputs = model(inputs)
    config = LossConfig(
        quantization_loss_weight=0.5, sparsity_loss_weight=0.25, consistency_loss_weight=2.0
    )
    loss = create_loss_function("bitnet_classification", config, num_classes=5)
    base = functional.cross_entropy(outputs, targets)
    assert torch.equal(loss(outputs, targets), base)
    layers = [model[0], model[2]]
    magnitude = sum(
        one.weight.abs().sum() / one.weight.square().mean().sqrt() for one in layers
    ) / sum(one.weight.numel() for one in layers)
    expected = base + 0.5 * mean_quantization_distance(model) + 0.25 * magnitude
    torch.testing.assert_close(loss(outputs, targets, model=model), expected)
    latent = network()(inputs)
    told = functional.kl_div(
        outputs.log_softmax(1), latent.log_softmax(1), log_target=True, reduction="batchmean"
    )
    torch.testing.assert_close(
        loss(outputs, targets, model=model, inputs=inputs), expected + 2.0 * told
    )
    assert torch.equal(model(inputs), outputs)  # the layers apply their levels again


def test_grokfast_adds_distillation_margin_and_norm(logits: Tensor, targets: Tensor) -> None:
    """Spec: F4, F13. Planted: no factor T^2."""
    teacher, model = torch.randn(12, 5), network()
    base = functional.cross_entropy(logits, targets)
    for scaled, temperature in ((True, 2.0), (False, 1.0)):
        config = LossConfig(
            knowledge_distillation_weight=0.5, capability_acquisition_weight=0.3,
            regularization_weight=0.1, temperature_scaling=scaled,
        )  # fmt: skip
        loss = create_loss_function("grokfast_classification", config, num_classes=5)
        assert torch.equal(loss(logits, targets), base)
        told = temperature**2 * functional.kl_div(
            (logits / temperature).log_softmax(1), (teacher / temperature).softmax(1),
            reduction="batchmean",
        )  # fmt: skip
        torch.testing.assert_close(loss(logits, targets, teacher_logits=teacher), base + 0.5 * told)
        rows = torch.arange(12)
        wrong = logits.clone()
        wrong[rows, targets] = -torch.inf
        lacking = (1 - logits[rows, targets] + wrong.amax(1)).clamp_min(0).mean()
        square = torch.cat([one.flatten() for one in model.parameters()]).square().mean()
        torch.testing.assert_close(
            loss(logits, targets, model=model), base + 0.3 * lacking + 0.1 * square
        )


def test_an_unknown_name_lists_the_known_ones() -> None:
    """Spec: F5."""
    with pytest.raises(
        ValueError, match=r"no loss 'focal'; there are classification, .*bitnet_reg"
    ):
        create_loss_function("focal")
    with pytest.raises(AttributeError, match="did you mean.*focal_loss_gamma"):
        LossConfig(focal_loss_gama=2.0)


def test_the_manager_totals_what_it_names(logits: Tensor, targets: Tensor) -> None:
    """Spec: F6, F7, F8. Planted: the weight left out of the total."""
    manager = LossManager(LossConfig(focal_loss_gamma=2.0))
    manager.register_loss("primary", create_loss_function("bitnet_classification"), 0.5)
    manager.register_loss("size", lambda predictions, _: predictions.square().mean(), 2.0)
    found = manager.compute_total_loss(logits, targets)
    assert list(found) == ["primary", "size", "total_loss"]
    torch.testing.assert_close(found["total_loss"], 0.5 * found["primary"] + 2.0 * found["size"])
    found["total_loss"].backward()
    assert logits.grad is not None
    with pytest.raises(ValueError, match="'size' is taken"):
        manager.register_loss("size", functional.cross_entropy)
    with pytest.raises(ValueError, match="unknown losses"):
        manager.update_weights({"other": 1.0})
    manager.update_weights({"size": 0.0})
    assert manager.get_loss_statistics()["size"]["weight"] == 0.0


def test_an_error_in_one_loss_is_raised(logits: Tensor, targets: Tensor) -> None:
    """Spec: F8. Planted: the failing loss left out of the total."""

    def fails(predictions: Any, aims: Any) -> Tensor:
        raise RuntimeError("no such head")

    manager = LossManager()
    manager.register_loss("good", functional.cross_entropy)
    manager.register_loss("bad", fails)
    with pytest.raises(RuntimeError, match="no such head"):
        manager.compute_total_loss(logits, targets)


def test_a_manager_without_losses_computes_that_of_its_type(
    logits: Tensor, targets: Tensor
) -> None:
    """Spec: F6, F2."""
    found = LossManager(LossConfig(loss_type=LossType.CLASSIFICATION)).compute_total_loss(
        logits, targets
    )
    torch.testing.assert_close(found["total_loss"], functional.cross_entropy(logits, targets))


def test_adaptive_weights_favour_what_falls_slowly_and_their_mean_stays_one() -> None:
    """Spec: F15. Planted: the ratio upside down."""
    values = {"fast": 1.0, "slow": 1.0}
    losses = {name: (lambda _p, _t, name=name: torch.tensor(values[name])) for name in values}
    manager, adaptive = LossManager(), AdaptiveLoss(LossConfig(), losses)
    for name, loss in losses.items():
        manager.register_loss(name, loss)
    for _ in range(200):
        values["fast"] *= 0.97
        manager.compute_total_loss(None, None)
        adaptive(None, None)
    weights = adaptive.weights()
    assert weights["slow"] > weights["fast"] > 0
    assert sum(weights.values()) == pytest.approx(2.0)
    statistics = manager.get_loss_statistics()
    assert statistics["slow"]["weight"] == pytest.approx(weights["slow"])
    assert statistics["fast"]["count"] == 200
    assert statistics["fast"]["last"] == pytest.approx(0.97**200)
    fixed = LossManager(LossConfig(adaptive_weighting=False))
    for name, loss in losses.items():
        fixed.register_loss(name, loss, 3.0)
    total = fixed.compute_total_loss(None, None)["total_loss"]
    assert float(total) == pytest.approx(3.0 * (1.0 + 0.97**200))


def test_uncertainty_weights_are_parameters_that_an_optimizer_moves() -> None:
    """Spec: F14. Planted: the logarithms kept out of the module."""
    config = LossConfig(uncertainty_weighting=True, task_weights={"b": 2.0})
    loss = MultiTaskLoss(config, {"a": functional.mse_loss, "b": functional.mse_loss})
    parameters = list(loss.parameters())
    assert len(parameters) == 1
    predictions = {"a": torch.tensor([2.0]), "b": torch.tensor([0.5])}
    targets = torch.tensor([0.0])
    torch.testing.assert_close(loss(predictions, targets), torch.tensor(4.0 + 2.0 * 0.25))
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        loss(predictions, targets).backward()
        optimizer.step()
    # the minimum of exp(-s) L + s / 2 is at s = log 2 L
    torch.testing.assert_close(
        parameters[0].detach(), torch.tensor([8.0, 1.0]).log(), rtol=1e-2, atol=1e-2
    )
    with pytest.raises(ValueError, match="unknown tasks"):
        MultiTaskLoss(config, {"a": functional.mse_loss})
    manager = LossManager(LossConfig(uncertainty_weighting=True))
    manager.register_loss("a", functional.mse_loss)
    assert len(list(manager.parameters())) == 1
