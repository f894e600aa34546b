"""Several sessions, trainers and schedulers over one optimizer: the first rate is the base.

Planted for all: the base read from the group's rate as it stands, which is the last scheduled one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from agent_forge.phases.phase5_training import (
    CompositeScheduler,
    GrokfastConfig,
    GrokfastTrainer,
    SchedulerConfig,
    SchedulerFactory,
    TrainingConfig,
    TrainingLoop,
)
from forge_kernel.contract.values import ScheduleFactors
from forge_kernel.training.param_group_schedule import ParamGroupSchedule

RATE = 0.1


def batches(count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(6, 4, generator=generator), torch.randint(3, (6,), generator=generator))
        for _ in range(count)
    ]


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([value.detach().flatten().clone() for value in model.parameters()])


class Heard:
    """What a loop tells of its steps and epochs."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.steps: list[int] = []
        self.epochs: list[int] = []

    def on_step_end(self, step: int, metrics: dict[str, Any]) -> None:
        assert metrics["step"] == step
        self.steps.append(step)
        self.rates.append(metrics["learning_rate"])

    def on_epoch_end(self, epoch: int, metrics: dict[str, Any]) -> None:
        del metrics
        self.epochs.append(epoch)


def loop(**options: Any) -> tuple[TrainingLoop, Heard]:
    chosen = {"epochs": 3, "learning_rate": RATE, "use_amp": False, "warmup_steps": 1, **options}
    found, heard = TrainingLoop(network(), TrainingConfig(**chosen), "cpu"), Heard()
    found.add_callback(heard)
    return found, heard


@pytest.mark.parametrize(
    "options",
    [{}, {"scheduler_type": "linear"}, {"scheduler_type": "constant"},
     {"grokfast_enabled": True}, {"bitnet_enabled": True, "warmup_steps": 1000},
     {"gradient_accumulation_steps": 2}],
    ids=str,
)  # fmt: skip
def test_the_conmetricd_epochs_one_by_one_are_the_training_to_the_bit(
    options: dict[str, Any],
) -> None:
    """Planted: the filter's memory, the blend or the optimizer's state left behind."""
    single, whole = loop(**options), loop(**options)
    for _ in range(3):
        result = single[0].train_epoch(batches(), functional.cross_entropy)
        assert result.outcome == "completed"
    whole[0].train(batches(), functional.cross_entropy)
    assert single[1].rates == whole[1].rates
    assert single[1].steps == whole[1].steps == list(range(1, whole[0].global_step + 1))
    assert single[1].epochs == whole[1].epochs == [1, 2, 3]
    assert (single[0].global_step, single[0].epoch) == (whole[0].global_step, 3)
    assert torch.equal(weights(single[0].model), weights(whole[0].model))


def test_an_epoch_goes_on_from_the_weights_as_they_are_now() -> None:
    """Planted: the weights of the epoch before put back."""
    found, _ = loop()
    found.train_epoch(batches(), functional.cross_entropy)
    with torch.no_grad():
        for value in found.model.parameters():
            value.zero_()
    other, _ = loop(learning_rate=0.0)
    other.train_epoch(batches(), functional.cross_entropy)
    with torch.no_grad():
        for value in other.model.parameters():
            value.fill_(0.5)
    other.train_epoch(batches(), functional.cross_entropy)
    assert torch.equal(weights(other.model), torch.full_like(weights(other.model), 0.5))
    found.train_epoch(batches(), functional.cross_entropy)
    assert float(weights(found.model).abs().max()) < 1.0


def test_each_training_begins_at_the_conmetricd_rate_and_counts_go_on() -> None:
    found, heard = loop()
    for _ in range(3):
        found.train(batches(), functional.cross_entropy)
    size = found.global_step // 3
    parts = [heard.rates[place : place + size] for place in range(0, 3 * size, size)]
    assert parts[0] == parts[1] == parts[2]
    assert max(parts[0]) == RATE
    assert heard.steps == list(range(1, 3 * size + 1))
    assert heard.epochs == list(range(1, 10))


def test_steps_epochs_and_trainings_of_one_loop_are_counted_together() -> None:
    found, heard = loop(scheduler_type="constant", warmup_steps=0)
    some = batches()
    found.train_step(some[0], functional.cross_entropy)
    found.train(some, functional.cross_entropy)
    found.train_step(some[0], functional.cross_entropy)
    found.train_epoch(some, functional.cross_entropy)
    told = found.train_step(some[0], functional.cross_entropy)
    assert told["step"] == found.global_step == 1 + 12 + 1 + 4 + 1
    assert heard.steps == list(range(1, 20))
    assert set(heard.rates) == {RATE}


def test_a_step_after_a_training_is_at_the_base_rate_again() -> None:
    """Planted: the rate that was written last not written again, though another wrote since."""
    found, _ = loop(warmup_steps=0)
    first = found.train_step(batches()[0], functional.cross_entropy)["learning_rate"]
    found.train(batches(), functional.cross_entropy)
    again = found.train_step(batches()[0], functional.cross_entropy)["learning_rate"]
    assert first == again == RATE


def grokfast(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> GrokfastTrainer:
    lengths = {"warmup_steps": 2, "acceleration_steps": 2, "consolidation_steps": 2}
    return GrokfastTrainer(model, optimizer, GrokfastConfig(**{**lengths, **options}), "cpu")


def rates_of(trainer: GrokfastTrainer, steps: int = 7) -> list[float]:
    batch = batches()[0]
    return [
        trainer.train_step(batch, functional.cross_entropy)["learning_rate"] for _ in range(steps)
    ]


def test_each_trainer_over_one_optimizer_multiplies_the_same_base() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    first, second = (rates_of(grokfast(model, optimizer)) for _ in range(2))
    assert first == second
    config = TrainingConfig(epochs=1, use_amp=False, warmup_steps=0, scheduler_type="constant")
    third, heard = TrainingLoop(model, config, "cpu"), Heard()
    third.add_callback(heard)
    third.optimizer = optimizer
    third.train(batches(), functional.cross_entropy)
    assert set(heard.rates) == {RATE}
    assert rates_of(grokfast(model, optimizer, base_learning_rate=0.5)) == [
        pytest.approx(rate / RATE * 0.5) for rate in first
    ]


def made() -> torch.optim.Optimizer:
    groups = [{"params": [nn.Parameter(torch.zeros(2))], "lr": rate} for rate in (RATE, RATE / 5)]
    return torch.optim.SGD(groups, lr=RATE, momentum=0.9)


def scheduler(optimizer: torch.optim.Optimizer, kind: str, **options: Any) -> Any:
    short = {"warmup_steps": 2, "total_steps": 12, "decay_steps": 6, "cycle_length": 4}
    config = SchedulerConfig(**{"scheduler_type": kind, **short, **options})
    return SchedulerFactory.create_scheduler(optimizer, config)


def trace(found: Any, steps: int = 9) -> list[tuple[float, ...]]:
    told = []
    for _ in range(steps):
        told.append(tuple(
            float(value) for group in found.optimizer.param_groups
            for value in (group["lr"], group["momentum"])
        ))  # fmt: skip
        found.step()
    return told


KINDS = ["linear", "cosine", "one_cycle", "cyclic", "grokfast", "bitnet", "exponential"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_scheduler_made_anew_begins_as_the_first_one_did(kind: str) -> None:
    """Planted: the momentum of a cycle left where it was."""
    optimizer, alone = made(), made()
    first = trace(scheduler(optimizer, kind))
    trace(scheduler(optimizer, "one_cycle"), 5)  # another one between
    assert trace(scheduler(optimizer, kind)) == first == trace(scheduler(alone, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_schedulers_state_taken_up_has_rate_and_momentum_of_where_it_was(kind: str) -> None:
    """Planted: the momentum left out of the state."""
    straight = scheduler(made(), kind)
    trace(straight, 5)
    fresh = scheduler(made(), kind)
    fresh.load_state_dict(straight.state_dict())
    assert trace(fresh, 4) == trace(straight, 4)


def test_a_schedule_without_momentum_puts_the_first_one_back() -> None:
    optimizer = made()
    trace(scheduler(optimizer, "one_cycle"), 3)
    assert {group["momentum"] for group in optimizer.param_groups} != {0.9}
    scheduler(optimizer, "cosine")
    assert {group["momentum"] for group in optimizer.param_groups} == {0.9}


def test_torchs_own_schedulers_and_ours_share_the_base() -> None:
    optimizer = made()
    theirs = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    for _ in range(3):
        optimizer.step()
        theirs.step()
    ours = scheduler(optimizer, "constant", base_lr=RATE, warmup_type="none")
    assert ours.get_last_lr() == pytest.approx([RATE, RATE / 5])
    rates = ParamGroupSchedule(optimizer)
    rates.write(ScheduleFactors(0.5))
    assert [group["lr"] for group in optimizer.param_groups] == [RATE / 2, RATE / 10]


def test_a_session_without_a_schedule_takes_back_what_a_schedule_wrote() -> None:
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=RATE, betas=(0.8, 0.9))
    ParamGroupSchedule(optimizer).write(ScheduleFactors(0.01, 0.5))
    assert optimizer.param_groups[0]["betas"] == (0.4, 0.9)
    ParamGroupSchedule(optimizer)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"]) == (RATE, (0.8, 0.9))


def parts(names: str, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    kinds = {"a": "linear", "b": "constant", "c": "cosine"}
    return {name: scheduler(optimizer, kinds[name], warmup_type="none") for name in names}


def test_a_composite_of_three_passes_through_each() -> None:
    """Planted: the last one in the place of the next one."""
    optimizer = made()
    found = CompositeScheduler(
        optimizer, parts("abc", optimizer), until={"a": 2, "b": 4}, join="jump"
    )
    seen = []
    for _ in range(6):
        seen.append(found.active)
        found.step()
    assert seen == ["a", "a", "b", "b", "c", "c"]


def test_a_schedule_that_ends_at_zero_hands_over_to_the_next_ones_own_rate() -> None:
    """Planted: the next one scaled to 0, for ever."""
    optimizer = made()
    named = {
        "down": scheduler(optimizer, "linear", final_lr=0.0, total_steps=4, warmup_type="none"),
        "on": scheduler(optimizer, "constant", base_lr=1e-3, warmup_type="none"),
    }
    found = CompositeScheduler(optimizer, named, until={"down": 4})
    for _ in range(5):
        found.step()
    assert found.active == "on"
    assert found.get_last_lr()[0] == pytest.approx(1e-3)
