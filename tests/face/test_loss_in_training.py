"""Losses with weights and averages of their own, in a training: trained, saved, and left alone."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from agent_forge.phases.phase5_training import (
    AdaptiveLoss,
    BitNetConfig,
    GrokfastConfig,
    GrokfastTrainer,
    LossConfig,
    LossManager,
    MultiTaskLoss,
    TrainingConfig,
    TrainingLoop,
    convert_model_to_bitnet,
    create_loss_function,
)
from forge_kernel.errors import NonFiniteError, RunError

LEARNED = LossConfig(uncertainty_weighting=True)


def batches(count: int = 4) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(6, 4, generator=generator), torch.randint(3, (6,), generator=generator))
        for _ in range(count)
    ]


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def size_of(predictions: Tensor, targets: Tensor) -> Tensor:
    del targets
    return predictions.square().mean()


TASKS = {"kind": functional.cross_entropy, "size": size_of}


def tasks() -> MultiTaskLoss:
    return MultiTaskLoss(LEARNED, TASKS)


def manager() -> LossManager:
    found = LossManager(LEARNED)
    for name, loss in TASKS.items():
        found.register_loss(name, loss)
    return found


class Own(nn.Module):
    """A loss of the caller's with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(predictions * self.scale, targets)


def by_batch(loss: Any, model: nn.Module) -> Callable[[Any], Tensor]:
    return lambda batch: loss(model(batch[0]), batch[1])


def by_partial(loss: Any, model: nn.Module) -> Any:
    def call(loss: Any, model: nn.Module, batch: Any) -> Tensor:
        return loss(model(batch[0]), batch[1])

    return functools.partial(call, loss, model)


FORMS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, nn.Module], Any]]] = {
    "tasks": (tasks, lambda loss, model: loss),
    "manager": (manager, lambda loss, model: loss),
    "method": (manager, lambda loss, model: loss.compute_total_loss),
    "closure": (tasks, by_batch),
    "partial": (tasks, by_partial),
    "callers_own": (Own, lambda loss, model: loss),
}


def config(**options: Any) -> TrainingConfig:
    return TrainingConfig(
        **{"epochs": 2, "learning_rate": 0.05, "use_amp": False, "warmup_steps": 0, **options}
    )


def learned(loss: nn.Module) -> Tensor:
    return torch.cat([value.detach().flatten().clone() for value in loss.parameters()])


def weights(model: nn.Module) -> Tensor:
    return torch.cat([value.detach().flatten().clone() for value in model.parameters()])


# -- what a loss has to learn ------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", ["train", "train_epoch", "train_step", "grokfast"])
def test_what_a_loss_has_to_learn_is_learned(form: str, way: str) -> None:
    """Spec: F14. Planted: the loss kept out of the run's modules; its parameters in no group."""
    make, called = FORMS[form]
    loss, model = make(), network()
    before, fn = learned(loss), called(loss, model)
    loop = TrainingLoop(model, config(), "cpu")
    form_of = "batch" if form == "partial" else None
    if way == "train":
        loop.train(batches(), fn, loss_form=form_of)
    elif way == "train_epoch":
        loop.train_epoch(batches(), fn, loss_form=form_of)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer: Any = loop if way == "train_step" else GrokfastTrainer(
            model, optimizer, GrokfastConfig(warmup_steps=0), "cpu"
        )  # fmt: skip
        for batch in batches():
            trainer.train_step(batch, fn, loss_form=form_of)
    assert not torch.equal(learned(loss), before)


def test_by_hand_and_by_the_loop_are_the_same_to_the_bit() -> None:
    """Planted: a tensor that both groups have, stepped twice."""
    found = []
    for by_hand in (True, False):
        loss, model = tasks(), network()
        loop = TrainingLoop(model, config(weight_decay=0.0), "cpu")
        if by_hand:
            loop.optimizer = torch.optim.AdamW(
                [*model.parameters(), *loss.parameters()], lr=0.05, weight_decay=0.0, fused=True
            )
        loop.train(batches(), loss)
        found.append((weights(model), learned(loss)))
        assert loop.optimizer is not None
        held = [value for group in loop.optimizer.param_groups for value in group["params"]]
        assert len(held) == len({id(value) for value in held}) == 5
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_learned_weights_are_not_decayed_and_joined_once() -> None:
    loss, model = tasks(), network()
    loop = TrainingLoop(model, config(weight_decay=0.5), "cpu")
    optimizer = loop.setup_optimizer()
    for _ in range(2):
        loop.train(batches(), loss)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]


def test_tensors_that_neither_the_model_nor_the_loss_has_are_refused() -> None:
    loss, model = tasks(), network()
    loop = TrainingLoop(model, config(), "cpu")
    loop.optimizer = torch.optim.SGD([*model.parameters(), *tasks().parameters()], lr=0.1)
    with pytest.raises(RunError, match="tensors that the model does not have"):
        loop.train(batches(), loss)


def test_a_loss_that_holds_the_model_leaves_the_model_to_the_model() -> None:
    """Planted: the model's tensors twice in the run, filtered and clipped twice."""

    class Holds(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model, self.inner = model, tasks()

        def forward(self, batch: Any) -> Tensor:
            return self.inner(self.model(batch[0]), batch[1])

    plain, held = network(), network()
    inner = tasks()
    TrainingLoop(plain, config(grokfast_enabled=True), "cpu").train(batches(), inner)
    holds = Holds(held)
    TrainingLoop(held, config(grokfast_enabled=True), "cpu").train(batches(), holds)
    assert torch.equal(weights(plain), weights(held))
    assert torch.equal(learned(inner), learned(holds.inner))

    class Mixed(Holds):
        def __init__(self, model: nn.Module) -> None:
            super().__init__(model)
            self.scale = nn.Parameter(torch.ones(()))

    other = network()
    with pytest.raises(RunError, match="a module of their own"):
        TrainingLoop(other, config(), "cpu").train(batches(), Mixed(other))


def test_another_loss_with_weights_in_the_middle_of_steps_is_refused() -> None:
    loop = TrainingLoop(network(), config(), "cpu")
    loop.train_step(batches()[0], functional.cross_entropy)
    loop.train_step(batches()[0], nn.CrossEntropyLoss())
    with pytest.raises(RunError, match="give it from the first step on"):
        loop.train_step(batches()[0], tasks())


# -- what a loss remembers ---------------------------------------------------------------------


def adaptive() -> AdaptiveLoss:
    return AdaptiveLoss(LossConfig(), {"kind": functional.cross_entropy, "size": size_of})


def managed() -> LossManager:
    found = LossManager(LossConfig())
    for name, loss in TASKS.items():
        found.register_loss(name, loss)
    return found


def state(loss: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in loss.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("make", [adaptive, managed, lambda: adaptive()])
def test_averages_go_into_the_state_and_come_back(make: Callable[[], Any]) -> None:
    """Planted: the averages a plain attribute."""
    first, batch = make(), batches()[0]
    for scale in (1.0, 0.5, 0.25):
        first(scale * batch[0][:, :3], batch[1])
    again = make()
    assert not same(state(again), state(first))
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    assert same(state(again), state(first))
    assert torch.equal(first(batch[0][:, :3], batch[1]), again(batch[0][:, :3], batch[1]))


@pytest.mark.parametrize("make", [adaptive, managed])
def test_a_validation_leaves_averages_and_statistics_alone(make: Callable[[], Any]) -> None:
    """Planted: statistics counted whatever the mode of gradients."""
    loss, loop = make(), TrainingLoop(network(), config(), "cpu")
    loop.train_step(batches()[0], loss)
    before = state(loss)
    loop.validate(batches(), loss)
    assert same(state(loss), before)
    with torch.no_grad():
        loss(torch.randn(6, 3), batches()[0][1])
    assert same(state(loss), before)


@pytest.mark.parametrize("make", [adaptive, managed])
def test_a_step_that_is_not_finite_leaves_averages_alone(make: Callable[[], Any]) -> None:
    """Planted: NaN taken into the averages, where it stays."""
    loss, loop = make(), TrainingLoop(network(), config(), "cpu")
    loop.train_step(batches()[0], loss)
    before = state(loss)
    inputs, targets = batches()[1]
    with pytest.raises(NonFiniteError):
        loop.train_step((inputs * torch.nan, targets), loss)
    assert same(state(loss), before)


@pytest.mark.parametrize("make", [tasks, adaptive, manager, managed])
def test_a_stopped_training_goes_on_with_what_the_loss_knew(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    """Planted: the loss left out of the checkpoint."""

    def made(folder: str) -> TrainingLoop:
        return TrainingLoop(network(), config(epochs=3), "cpu", tmp_path / folder)

    straight, whole = made("whole"), make()
    straight.train(batches(), whole)
    stop = threading.Event()

    class StopsAt:
        def on_step_end(self, step: int, metrics: dict[str, Any]) -> None:
            if step == 5:
                stop.set()

    first = made("cut")
    first.add_callback(StopsAt())
    assert first.train(batches(), make(), cancel=stop).steps == 5
    second, again = made("cut"), make()
    second.train(batches(), again)
    assert torch.equal(weights(second.model), weights(straight.model))
    assert same(state(again), state(whole))


@pytest.mark.parametrize("make", [tasks, adaptive])
@pytest.mark.parametrize("stepped", [False, True])
def test_a_trainers_checkpoint_has_the_loss_too(
    make: Callable[[], nn.Module], stepped: bool, tmp_path: Path
) -> None:
    """Planted: the loss of a fresh trainer not known when the file is loaded."""

    def made() -> tuple[GrokfastTrainer, nn.Module]:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return GrokfastTrainer(model, optimizer, GrokfastConfig(warmup_steps=2), "cpu"), make()

    (straight, whole), some = made(), batches(6)
    for batch in some[:3]:
        straight.train_step(batch, whole)
    file = straight.save_checkpoint(tmp_path / "kept.pt")
    second, again = made()
    if stepped:
        second.train_step(some[5], again)
    second.load_checkpoint(file)
    assert second.global_step == 3
    assert torch.equal(weights(second.model), weights(straight.model))
    for batch in some[3:]:
        straight.train_step(batch, whole)
        second.train_step(batch, again)
    assert torch.equal(weights(second.model), weights(straight.model))
    assert same(state(again), state(whole))
    assert second.global_step == 6


@pytest.mark.parametrize("make", [tasks, lambda: functional.cross_entropy])
def test_a_trainers_checkpoint_of_another_model_is_refused_and_changes_nothing(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    model = network()
    first = GrokfastTrainer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    first.train_step(batches()[0], make())
    file = first.save_checkpoint(tmp_path / "kept.pt")
    other = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    before = weights(other)
    second = GrokfastTrainer(other, torch.optim.SGD(other.parameters(), lr=0.1))
    with pytest.raises(RunError, match="of another model"):
        second.load_checkpoint(file)
    assert torch.equal(weights(other), before)


# -- what a loss is handed ---------------------------------------------------------------------


def penalized(**weights_of: float) -> tuple[nn.Module, Any]:
    model = convert_model_to_bitnet(network(), BitNetConfig(weight_bits=1.58))
    chosen = {"quantization_loss_weight": 0.0, **weights_of}
    return model, create_loss_function("bitnet_classification", LossConfig(**chosen))


@pytest.mark.parametrize(
    "name", ["quantization_loss_weight", "sparsity_loss_weight", "consistency_loss_weight"]
)
def test_a_bitnet_loss_sees_the_model_that_is_trained(name: str) -> None:
    """Planted: the model not handed on, so that the weights of the terms change nothing."""
    found = []
    for weight in (0.0, 5.0):
        model, loss = penalized(**{name: weight})
        loop = TrainingLoop(model, config(), "cpu")
        loop.train(batches(), loss)
        found.append((weights(model), loop.validate(batches(), loss)["loss"]))
    assert not torch.equal(found[0][0], found[1][0])


def test_a_validation_has_the_loss_of_the_targets_alone() -> None:
    model, loss = penalized(sparsity_loss_weight=5.0)
    loop = TrainingLoop(model, config(), "cpu")
    plain = loop.validate(batches(), functional.cross_entropy)["loss"]
    assert loop.validate(batches(), loss)["loss"] == pytest.approx(plain, rel=1e-6)


def test_a_term_of_quantized_layers_that_are_not_there_is_refused_when_it_was_set() -> None:
    loss = create_loss_function("bitnet_classification", LossConfig(sparsity_loss_weight=0.1))
    with pytest.raises(ValueError, match="sparsity_loss_weight is of quantized layers"):
        TrainingLoop(network(), config(), "cpu").train(batches(), loss)
    unset = create_loss_function("bitnet_classification")
    result = TrainingLoop(network(), config(), "cpu").train(batches(), unset)
    assert result.outcome == "completed"


def test_a_teachers_answers_come_with_the_batch() -> None:
    """Planted: what a batch holds beside inputs and targets dropped."""
    loss = create_loss_function(
        "grokfast_classification", LossConfig(knowledge_distillation_weight=2.0)
    )
    taught = [
        {"input": inputs, "target": targets, "teacher_logits": torch.randn(6, 3)}
        for inputs, targets in batches()
    ]
    plain, told = network(), network()
    TrainingLoop(plain, config(), "cpu").train(taught, functional.cross_entropy)
    TrainingLoop(told, config(), "cpu").train(taught, loss)
    assert not torch.equal(weights(plain), weights(told))
    with pytest.raises(RunError, match="knowledge_distillation_weight needs teacher_logits"):
        TrainingLoop(network(), config(), "cpu").train(batches(), loss)


@pytest.mark.parametrize("name", ["capability_acquisition_weight", "regularization_weight"])
@pytest.mark.parametrize("nested", ["alone", "tasks", "adaptive", "manager"])
def test_a_grokfast_loss_within_another_one_is_handed_the_model(name: str, nested: str) -> None:
    found = []
    for weight in (0.0, 3.0):
        inner = create_loss_function("grokfast_classification", LossConfig(**{name: weight}))
        loss: Any = inner
        if nested == "tasks":
            loss = MultiTaskLoss(LossConfig(), {"main": inner})
        elif nested == "adaptive":
            loss = AdaptiveLoss(LossConfig(), inner)
        elif nested == "manager":
            loss = LossManager()
            loss.register_loss("main", inner)
        model = network()
        TrainingLoop(model, config(), "cpu").train(batches(), loss)
        found.append(weights(model))
    assert not torch.equal(*found)


def test_a_margin_leaves_padding_out_and_refuses_numbers() -> None:
    """Planted: padding gathered as a class."""
    loss = create_loss_function(
        "grokfast_classification", LossConfig(capability_acquisition_weight=1.0)
    )
    logits, targets, model = torch.randn(6, 3), batches()[0][1].clone(), network()
    targets[:2] = -100
    kept = loss(logits[2:], targets[2:], model=model)
    torch.testing.assert_close(loss(logits, targets, model=model), kept)
    wrong = create_loss_function(
        "grokfast_regression", LossConfig(capability_acquisition_weight=1.0)
    )
    with pytest.raises(ValueError, match="numbers, not classes"):
        wrong(logits, torch.randn(6, 3), model=model)
