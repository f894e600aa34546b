"""The Grokfast trainer over the caller's model and optimizer."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from torch import nn
from torch.nn import functional

from agent_forge.phases.phase5_training import (
    CapabilityTracker,
    GrokfastConfig,
    GrokfastOptimizer,
    GrokfastPhase,
    GrokfastTrainer,
    KnowledgeConsolidation,
)
from forge_kernel.errors import RunError

SHORT = {
    "warmup_steps": 2,
    "acceleration_steps": 3,
    "consolidation_steps": 2,
    "refinement_steps": 1,
}


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        inputs = torch.randn(8, 5, generator=generator)
        found.append((inputs, (inputs[:, 0] > 0).long()))
    return found


def network(seed: int = 2) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2))


def trainer(model: nn.Module | None = None, **options: Any) -> GrokfastTrainer:
    model = model or network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return GrokfastTrainer(model, optimizer, GrokfastConfig(**{**SHORT, **options}), "cpu")


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([value.detach().flatten().clone() for value in model.parameters()])


def test_two_hundred_steps_are_the_papers_filter_in_front_of_the_optimizer() -> None:
    """Spec: E2, E3, E13. Red when the average starts at zero, or works in one phase only."""
    model, bare = network().double(), network().double()  # so that rounding does not grow
    flat = {"acceleration_multiplier": 1.0, "consolidation_multiplier": 1.0,
            "refinement_multiplier": 1.0, "warmup_steps": 0}  # fmt: skip
    ours = trainer(model, alpha=0.9, lambda_reg=2.0, **flat)
    optimizer = torch.optim.SGD(bare.parameters(), lr=0.1, momentum=0.9)
    slow: list[torch.Tensor] = []
    for single, targets in batches(200):
        inputs = single.double()
        ours.train_step((inputs, targets), functional.cross_entropy)
        optimizer.zero_grad()
        functional.cross_entropy(bare(inputs), targets).backward()
        gradients = [value.grad for value in bare.parameters()]
        slow = [g.clone() for g in gradients] if not slow else [
            0.9 * h + 0.1 * g for h, g in zip(slow, gradients, strict=True)
        ]  # fmt: skip
        for gradient, mean in zip(gradients, slow, strict=True):
            gradient.add_(mean, alpha=2.0)
        optimizer.step()
    assert torch.allclose(weights(model), weights(bare), atol=1e-6)


def test_a_steady_gradient_of_one_tends_to_one_plus_lambda() -> None:
    """Spec: E3. Red with a minus sign anywhere."""

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.zeros(()))

    model = One()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    config = GrokfastConfig(warmup_steps=0, acceleration_multiplier=1.0)
    ours = GrokfastTrainer(model, optimizer, config, "cpu")
    for _ in range(20):
        before = model.value.item()
        ours.train_step(torch.zeros(1), lambda model, batch: model.value * 1.0)
    assert before - model.value.item() == pytest.approx(3.0)


def test_phases_begin_where_they_are_set_and_lead_the_rate() -> None:
    """Spec: E4, E5, E9"""
    ours = trainer(acceleration_multiplier=3.0, consolidation_multiplier=0.5,
                   refinement_multiplier=0.25)  # fmt: skip
    told = [ours.train_step(one, functional.cross_entropy) for one in batches(10)]
    assert [one["grokfast_phase"] for one in told] == (
        ["warmup"] * 2 + ["acceleration"] * 3 + ["consolidation"] * 2 + ["refinement"]
        + ["completed"] * 2
    )  # fmt: skip
    rates = [one["learning_rate"] for one in told]
    assert rates == pytest.approx([0.05, 0.1, 0.3, 0.3, 0.3, 0.05, 0.05, 0.025, 0.025, 0.025])
    assert ours.phase is GrokfastPhase.COMPLETED


def test_a_step_tells_finite_metrics() -> None:
    """Spec: E8"""
    told = trainer().train_step(batches(1)[0], functional.cross_entropy)
    assert told["step"] == 1
    for name in ("loss", "learning_rate", "grad_norm", "grokfast_alpha", "grokfast_lambda"):
        assert told[name] > 0


def test_the_filter_can_be_left_out() -> None:
    """Spec: E6"""
    model, bare = network(), network()
    ours = trainer(model, enable_grokfast=False, warmup_steps=0, acceleration_multiplier=1.0)
    optimizer = torch.optim.SGD(bare.parameters(), lr=0.1, momentum=0.9)
    for inputs, targets in batches(3):
        told = ours.train_step((inputs, targets), functional.cross_entropy)
        optimizer.zero_grad()
        functional.cross_entropy(bare(inputs), targets).backward()
        optimizer.step()
    assert torch.equal(weights(model), weights(bare))
    assert told["grokfast_lambda"] == 0.0


def test_the_optimizers_own_rate_is_the_base_unless_another_is_set() -> None:
    """Spec: E6, I11"""
    batch = batches(1)[0]
    own = trainer(warmup_steps=0, acceleration_multiplier=1.0)
    assert own.train_step(batch, functional.cross_entropy)["learning_rate"] == 0.1
    other = trainer(warmup_steps=0, acceleration_multiplier=1.0, base_learning_rate=0.5)
    assert other.train_step(batch, functional.cross_entropy)["learning_rate"] == 0.5


def test_a_checkpoint_goes_on_to_the_bit_in_another_process(tmp_path: Path) -> None:
    """Spec: E6. Red when the filter's memory or the phase is left out."""
    all_batches = batches(8)
    whole, first = trainer(), trainer()
    for one in all_batches:
        whole.train_step(one, functional.cross_entropy)
    for one in all_batches[:4]:
        first.train_step(one, functional.cross_entropy)
    first.save_checkpoint(tmp_path / "held.pt")
    code = f"import torch; print(torch.load({str(tmp_path / 'held.pt')!r})['step'])"
    done = forked.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=False
    )
    assert done.stdout.strip() == "4", done.stderr
    second = trainer(network(77))
    second.load_checkpoint(tmp_path / "held.pt")
    for one in all_batches[4:]:
        told = second.train_step(one, functional.cross_entropy)
    assert torch.equal(weights(second.model), weights(whole.model))
    assert told["step"] == 8


def test_capability_functions_hear_every_step_and_every_evaluation() -> None:
    """Spec: E7. Red when only a metric of the same name counts."""
    seen: list[dict[str, Any]] = []
    ours = trainer()
    ours.register_capability("watched", lambda metrics: seen.append(metrics) or 0.0)
    for one in batches(3):
        ours.train_step(one, functional.cross_entropy)
    assert [one["step"] for one in seen] == [1, 2, 3]
    metrics = ours.validate(batches(2), functional.cross_entropy)
    assert seen[-1]["accuracy"] == metrics["accuracy"]
    ours.train_step(batches(1)[0], functional.cross_entropy)
    assert seen[-1]["accuracy"] == metrics["accuracy"]  # the latest one, in later steps too
    assert seen[-1]["loss"] != metrics["loss"]


def test_a_capability_is_acquired_after_its_duration_and_lost_below() -> None:
    """Spec: E11, H18"""
    tracker = CapabilityTracker(GrokfastConfig(min_capability_duration=3, capability_threshold=0.9))
    tracker.register_capability("skill", lambda metrics: metrics["score"])
    told = [tracker.update({"score": score}, step) for step, score in
            enumerate([0.95, 0.5, 0.9, 1.0, 0.92, 0.93, 0.4])]  # fmt: skip
    assert told == [{}, {}, {}, {}, {"skill": "acquired"}, {}, {"skill": "lost"}]
    known = tracker.status()["skill"]
    assert (known["acquired"], known["score"], known["best"]) == (False, 0.4, 1.0)
    assert known["retention"] == pytest.approx(0.4)
    silent = CapabilityTracker(GrokfastConfig(capability_tracking=False))
    silent.register_capability("skill", lambda metrics: 1 / 0)
    assert silent.update({}) == {}


def test_consolidation_is_kept_when_it_helps_and_taken_back_when_not() -> None:
    """Spec: E10. Red when the score afterwards is not looked at."""
    model = network()
    knowledge = KnowledgeConsolidation(GrokfastConfig(knowledge_retention_weight=0.5))
    with pytest.raises(RunError, match="no snapshot"):
        knowledge.get_knowledge_distance(model)
    knowledge.capture_knowledge_state(model)
    best = weights(model)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(1.0)
    worse = weights(model)

    def near(target: torch.Tensor) -> Any:
        return lambda one: -float((weights(one) - target).norm())

    assert not knowledge.consolidate_knowledge(model, near(worse))
    assert torch.equal(weights(model), worse)
    assert knowledge.get_knowledge_distance(model) > 0
    assert knowledge.consolidate_knowledge(model, near(best))
    assert torch.allclose(weights(model), best + 0.5, atol=1e-6)
    other = network(50)
    assert len(knowledge.transfer_to(other)) == 4
    assert torch.equal(weights(other), best)


def test_the_optimizer_in_front_of_any_other_keeps_its_memory() -> None:
    """Spec: E2, E6"""
    model, again = network(), network()

    def wrapped(one: nn.Module) -> GrokfastOptimizer:
        return GrokfastOptimizer(torch.optim.AdamW(one.parameters()), GrokfastConfig(alpha=0.5))

    def step(one: nn.Module, optimizer: GrokfastOptimizer, batch: Any) -> None:
        optimizer.zero_grad()
        functional.cross_entropy(one(batch[0]), batch[1]).backward()
        optimizer.step()

    first, some = wrapped(model), batches(4)
    for batch in some[:2]:
        step(model, first, batch)
    again.load_state_dict(model.state_dict())
    second = wrapped(again)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for batch in some[2:]:
        step(model, first, batch)
        step(again, second, batch)
    assert torch.equal(weights(model), weights(again))


def test_a_pipelines_trainer_says_why_it_cannot_step_yet() -> None:
    """Spec: E15"""
    ours = GrokfastTrainer(network(), None)
    with pytest.raises(RunError, match=r"train\(\) makes one"):
        ours.train_step(batches(1)[0], functional.cross_entropy)
    assert ours.get_training_summary()["global_step"] == 0


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({}, set()),
        ({"adaptive_lambda": True}, {"grokfast_lambda"}),
        ({"adaptive_alpha": True}, {"grokfast_alpha"}),
        ({"adaptive_alpha": True, "adaptive_lambda": True}, {"grokfast_alpha", "grokfast_lambda"}),
    ],
)
def test_adaptive_parameters_move_by_the_recorded_loss_and_are_off_by_default(
    options: dict[str, Any], changed: set[str]
) -> None:
    """Spec: E12. Red when the loss is not handed to the rule."""
    ours = trainer(performance_window=2, alpha=0.9, lambda_reg=1.0, **options)
    assert GrokfastConfig().adaptive_alpha is GrokfastConfig().adaptive_lambda is False
    for group in ours.optimizer.param_groups:  # type: ignore[union-attr]
        group["lr"] = 0.0  # nothing is learned: the loss stalls or scatters
    told = [ours.train_step(one, functional.cross_entropy) for one in batches(1) * 12]
    first, last = told[0], told[-1]
    assert (first["grokfast_alpha"], first["grokfast_lambda"]) == (0.9, 1.0)
    moved = {name for name in ("grokfast_alpha", "grokfast_lambda") if last[name] > first[name]}
    assert moved == changed
    info = ours.get_training_summary()["grokfast_info"]
    assert info["lambda_reg"] == last["grokfast_lambda"]
    assert info["alpha"] == last["grokfast_alpha"]


def test_gradient_checkpointing_keeps_less_and_trains_the_same() -> None:
    """Spec: K6. Red when the setting is not handed on."""
    kept: dict[bool, int] = {}
    found = {}
    for checkpointing in (False, True):
        sizes: list[int] = []
        model = nn.Sequential(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Tanh()), nn.Linear(6, 2))
        torch.manual_seed(0)
        for value in model.parameters():
            nn.init.normal_(value)
        ours = trainer(model, gradient_checkpointing=checkpointing)

        def pack(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held):
            for one in batches(3):
                ours.train_step(one, functional.cross_entropy)
        kept[checkpointing], found[checkpointing] = sum(sizes), weights(model)
    assert kept[True] < kept[False]
    assert torch.equal(found[True], found[False])
