"""The training loop over the caller's model, loader and loss."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from agent_forge.phases.phase5_training import (
    CheckpointManager,
    EarlyStopping,
    GradientAccumulator,
    MemoryMonitor,
    TrainingConfig,
    TrainingLoop,
    TrainingMetrics,
    TrainingState,
)
from forge_kernel.errors import ConfigError, RunError
from forge_kernel.training.precision import LIMITS


def data(count: int = 52, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 6, generator=generator)
    return inputs, (inputs[:, 0] > 0).long()


def loader(size: int = 8, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*data()), batch_size=size, **options)


def network(seed: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def plain(**options: Any) -> TrainingConfig:
    """Nothing that changes a step beside the optimizer."""
    chosen = {"use_amp": False, "warmup_steps": 0, "scheduler_type": "constant",
              "gradient_clipping": False, "learning_rate": 1e-2, "epochs": 2}  # fmt: skip
    return TrainingConfig(**{**chosen, **options})


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([value.detach().flatten().clone() for value in model.parameters()])


def test_the_loss_falls_on_data_that_can_be_told_apart() -> None:
    """Spec: C3"""
    model = network()
    loop = TrainingLoop(model, plain(epochs=30), torch.device("cpu"))
    before = loop.validate(loader(), functional.cross_entropy)
    result = loop.train(loader(), functional.cross_entropy, loader())
    assert result.outcome == "completed"
    assert result.final["validation_loss"] < before["loss"] / 4
    assert result.final["validation_accuracy"] > 0.9
    assert loop.state is TrainingState.STOPPED
    latest = {name: one["latest"] for name, one in loop.metrics.get_summary().items()}
    assert latest["validation_loss"] == result.final["validation_loss"]


def test_training_is_the_bare_loop_to_the_bit() -> None:
    """Spec: C5, C6, C7, C9. Red when the rate, the decay or the number of passes are not as set."""
    model, bare = network(), network()
    loop = TrainingLoop(model, plain(weight_decay=0.1), "cpu")
    loop.train(loader(), functional.cross_entropy)
    optimizer = torch.optim.AdamW(bare.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    for _ in range(2):
        for inputs, targets in loader():
            optimizer.zero_grad()
            functional.cross_entropy(bare(inputs), targets).backward()
            optimizer.step()
    assert torch.equal(weights(model), weights(bare))
    assert loop.epoch == 2
    assert loop.global_step == 14


@pytest.mark.parametrize("keys", ["tuple", "mapping"])
def test_the_three_forms_of_a_loss_give_the_same_bits(keys: str) -> None:
    """Spec: C4. Red when one of them is weighted otherwise."""
    batches = [(i, t) if keys == "tuple" else {"input": i, "target": t} for i, t in loader()]

    def parts(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(batch.values()) if isinstance(batch, dict) else batch

    found = []
    for form in range(3):
        model = network()

        def by_batch(batch: Any, model: nn.Module = model) -> torch.Tensor:
            inputs, targets = parts(batch)
            return functional.cross_entropy(model(inputs), targets)

        def by_model(model: nn.Module, batch: Any) -> torch.Tensor:
            inputs, targets = parts(batch)
            return functional.cross_entropy(model(inputs), targets)

        loss_fn = (nn.CrossEntropyLoss(), by_batch, by_model)[form]
        loop = TrainingLoop(model, plain(), "cpu")
        step = loop.train_step(batches[0], loss_fn)["loss"]
        metrics = loop.validate(batches, loss_fn)
        result = TrainingLoop(network(), plain(), "cpu")
        if form != 1:  # the closure has its own model
            result.train(batches, loss_fn)
            metrics["trained"] = float(weights(result.model).sum())
        found.append((step, metrics))
    assert found[0][0] == found[1][0] == found[2][0]
    assert found[0][1] == found[2][1]
    assert found[1][1] == {k: v for k, v in found[0][1].items() if k != "trained"}


def test_a_loss_whose_form_cannot_be_told_is_asked_about() -> None:
    """Spec: C4"""
    loop = TrainingLoop(network(), plain(), "cpu")
    batch = next(iter(loader()))
    with pytest.raises(RunError, match="loss_form="):
        loop.train_step(batch, lambda *anything: torch.zeros(()))
    given = loop.train_step(
        batch, lambda *pair: functional.cross_entropy(*pair), loss_form="predictions_targets"
    )
    assert given["loss"] > 0
    with pytest.raises(RunError, match="needs targets"):
        loop.train_step(batch[0], functional.cross_entropy)
    with pytest.raises(RunError, match="one number"):
        loop.train_step(batch, nn.CrossEntropyLoss(reduction="none"))


def test_micro_batches_equal_one_batch_and_the_last_window_is_stepped() -> None:
    """Spec: C12. Red when the trailing window is dropped."""
    small, large = network(), network()
    first = TrainingLoop(small, plain(gradient_accumulation_steps=4), "cpu")
    result = first.train(loader(4), functional.cross_entropy)
    TrainingLoop(large, plain(), "cpu").train(loader(16), functional.cross_entropy)
    assert result.steps == 2 * 4  # 13 micro-batches: 4 + 4 + 4 + 1
    assert torch.allclose(weights(small), weights(large), atol=1e-6)


def test_micro_steps_one_by_one_are_the_same_window() -> None:
    """Spec: C12"""
    one, many = network(), network()
    batches = list(loader(4))[:4]
    loop = TrainingLoop(many, plain(gradient_accumulation_steps=4), "cpu")
    told = [loop.train_step(batch, functional.cross_entropy)["updated"] for batch in batches]
    assert told == [False, False, False, True]
    whole = (torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches]))
    TrainingLoop(one, plain(), "cpu").train_step(whole, functional.cross_entropy)
    assert torch.allclose(weights(one), weights(many), atol=1e-6)


def test_a_step_tells_the_gradients_norm_where_it_updates() -> None:
    """Red when it is told between updates, or not at all."""
    config = plain(gradient_clipping=True, gradient_accumulation_steps=2)
    loop = TrainingLoop(network(), config, "cpu")
    found = [loop.train_step(data(), functional.cross_entropy) for _ in range(4)]
    assert [one["updated"] for one in found] == [False, True, False, True]
    assert [one["grad_norm"] is not None for one in found] == [False, True, False, True]
    assert found[1]["grad_norm"] > 0


@pytest.mark.parametrize("clips", [True, False])
def test_gradients_are_clipped_when_asked(clips: bool) -> None:
    """Spec: C8, C9"""
    model = network()
    config = plain(gradient_clipping=clips, max_grad_norm=1e-3, learning_rate=1.0)
    loop = TrainingLoop(model, config, "cpu")
    loop.setup_optimizer(torch.optim.SGD)
    before = weights(model)
    loop.train_step(next(iter(loader())), functional.cross_entropy)
    moved = float((weights(model) - before).norm())
    assert (moved <= 1.0001e-3) is clips


@pytest.mark.parametrize(
    ("sets", "options", "expected"),
    [
        (("avx2", "avx512_bf16"), {}, torch.bfloat16),
        (("avx2",), {}, torch.float32),
        (("avx2",), {"amp_dtype": torch.bfloat16}, torch.bfloat16),
        (("avx2", "avx512_bf16"), {"amp_dtype": torch.float16}, torch.float16),
        (("avx2", "avx512_bf16"), {"use_amp": False}, torch.float32),
    ],
)
def test_mixed_precision_is_what_the_machine_is_fast_in_and_a_dtype_that_is_set_is_obeyed(
    monkeypatch: pytest.MonkeyPatch, sets: tuple[str, ...], options: dict[str, Any],
    expected: torch.dtype,
) -> None:  # fmt: skip
    """Spec: C10. Planted: bf16 on every CPU, fifty times as slow without instructions for it."""
    for limit in LIMITS:
        monkeypatch.delenv(limit, raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(sets, True))
    seen: list[torch.dtype] = []
    model = network()
    model.register_forward_hook(lambda _, __, outputs: seen.append(outputs.dtype))
    loop = TrainingLoop(model, plain(**{"use_amp": True, **options}), "cpu")
    loop.train_step(next(iter(loader())), functional.cross_entropy)
    assert seen == [expected]


def test_the_run_decides_what_is_fast_and_not_the_settings() -> None:
    assert TrainingConfig().precision() == "auto"
    assert TrainingConfig(use_amp=False).precision() == "fp32"
    assert TrainingConfig(amp_dtype=torch.bfloat16).precision() == "bf16"
    assert TrainingConfig(amp_dtype=torch.float16).precision() == "fp16"


def test_callbacks_hear_each_step_and_each_epoch() -> None:
    """Spec: C11"""

    class Listener:
        def __init__(self) -> None:
            self.steps: list[int] = []
            self.epochs: list[int] = []

        def on_step_end(self, step: int, metrics: dict[str, Any]) -> None:
            assert metrics["loss"] > 0
            self.steps.append(step)

        def on_epoch_end(self, epoch: int, metrics: dict[str, Any]) -> None:
            assert "accuracy" in metrics
            self.epochs.append(epoch)

    listener = Listener()
    loop = TrainingLoop(network(), plain(), "cpu")
    loop.add_callback(listener)
    loop.train(loader(), functional.cross_entropy, loader())
    assert listener.steps == list(range(1, 15))
    assert listener.epochs == [1, 2]
    with pytest.raises(RunError, match="has no on_step_end"):
        loop.add_callback(object())


def test_the_state_is_what_the_loop_is_doing() -> None:
    """Red when a whole run, a single step, a validation or a failure is not told."""
    seen: list[TrainingState] = []

    class Listener:
        def on_step_end(self, step: int, metrics: dict[str, Any]) -> None:
            seen.append(loop.state)

    def noted(predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        seen.append(loop.state)
        return functional.cross_entropy(predictions, targets)

    def failing(predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    loop = TrainingLoop(network(), plain(epochs=1), "cpu")
    assert loop.state is TrainingState.INITIALIZED
    loop.validate([data()], noted)
    assert (seen, loop.state) == ([TrainingState.VALIDATING], TrainingState.INITIALIZED)
    loop.train_step(data(), noted)
    assert loop.state is TrainingState.TRAINING

    loop = TrainingLoop(network(), plain(epochs=1), "cpu")
    loop.add_callback(Listener())
    seen.clear()
    loop.train([data(), data()], noted)
    assert (set(seen), loop.state) == ({TrainingState.TRAINING}, TrainingState.STOPPED)
    told = json.loads(json.dumps(loop.get_state()))
    assert (told["state"], told["global_step"], told["epoch"]) == (loop.state.value, 2, 1)
    assert told["metrics"] == loop.metrics.get_summary()
    with pytest.raises(ZeroDivisionError):
        loop.train([data()], failing)
    assert loop.state is TrainingState.ERROR


def test_a_stopped_training_goes_on_to_the_bit(tmp_path: Path) -> None:
    """Spec: C14. Red when the run begins anew."""

    def made(folder: Path) -> TrainingLoop:
        return TrainingLoop(network(), plain(epochs=4), "cpu", folder)

    whole = made(tmp_path / "whole")
    torch.manual_seed(8)
    whole.train(loader(shuffle=True), functional.cross_entropy)

    stop = threading.Event()

    class StopsAt:
        def on_step_end(self, step: int, metrics: dict[str, Any]) -> None:
            if step == 9:
                stop.set()

    first = made(tmp_path / "cut")
    first.add_callback(StopsAt())
    torch.manual_seed(8)
    result = first.train(loader(shuffle=True), functional.cross_entropy, cancel=stop)
    assert (result.outcome, result.steps) == ("stopped", 9)
    second = made(tmp_path / "cut")
    second.train(loader(shuffle=True), functional.cross_entropy)
    assert second.global_step == whole.global_step
    assert torch.equal(weights(second.model), weights(whole.model))


def test_training_stops_when_nothing_gets_better() -> None:
    """Spec: C15"""
    config = plain(epochs=50, learning_rate=0.0, validation_patience=3)
    result = TrainingLoop(network(), config, "cpu").train(
        loader(), functional.cross_entropy, loader()
    )
    assert "not better for 3 validations" in result.stop_reason
    assert result.epochs < 10


def test_the_seed_is_the_callers_generator_and_its_state_is_left_alone() -> None:
    """Spec: C14"""
    found = []
    for _ in range(2):
        model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 2))
        with torch.no_grad():
            for value in model.parameters():
                value.fill_(0.1)
        torch.manual_seed(21)
        TrainingLoop(model, plain(), "cpu").train(loader(shuffle=True), functional.cross_entropy)
        found.append((weights(model), torch.get_rng_state()))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_settings_are_closed_after_the_first_step() -> None:
    """Spec: I8"""
    loop = TrainingLoop(network(), plain(), "cpu")
    loop.train_step(next(iter(loader())), functional.cross_entropy)
    with pytest.raises(ConfigError, match="after the first step"):
        loop.config.learning_rate = 1.0
    with pytest.raises(RunError, match="comes before the first step"):
        loop.setup_optimizer()


@pytest.mark.parametrize(
    ("cls", "chosen", "group"),
    [
        (torch.optim.SGD, {}, {"weight_decay": 0}),
        (torch.optim.SGD, {"weight_decay": 0.5}, {"weight_decay": 0.5}),
        (torch.optim.Adam, {"beta1": 0.5, "eps": 1e-3}, {"betas": (0.5, 0.999), "eps": 1e-3}),
        (torch.optim.RMSprop, {"eps": 1e-3}, {"eps": 1e-3}),
    ],
)
def test_an_optimizer_class_is_told_what_the_program_set(
    cls: Any, chosen: dict[str, Any], group: dict[str, Any]
) -> None:
    """Planted: the rate alone handed on."""
    found = TrainingLoop(network(), plain(**chosen), "cpu").setup_optimizer(cls).param_groups[0]
    assert {name: found[name] for name in group} == group
    assert found["lr"] == 1e-2


def test_what_an_optimizer_class_does_not_take_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"TrainingConfig\.beta1.*\n.*SGD takes no betas"):
        TrainingLoop(network(), plain(beta1=0.5), "cpu").setup_optimizer(torch.optim.SGD)


class Places:
    """Something with `set_epoch`, and what it was told."""

    def __init__(self) -> None:
        self.told: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.told.append(epoch)


class Sampler(Places):
    def __iter__(self) -> Any:
        return iter(range(52))

    def __len__(self) -> int:
        return 52


@pytest.mark.parametrize("place", ["sampler", "batch_sampler", "inner_sampler", "dataset"])
def test_set_epoch_is_called_wherever_it_sits_and_counts_on(place: str) -> None:
    """Planted: only the sampler told; each training's epochs counted from 0."""

    class BatchSampler(torch.utils.data.BatchSampler, Places):
        def __init__(self, sampler: Any) -> None:
            torch.utils.data.BatchSampler.__init__(self, sampler, 8, drop_last=False)
            Places.__init__(self)

    class Data(TensorDataset, Places):
        def __init__(self) -> None:
            TensorDataset.__init__(self, *data())
            Places.__init__(self)

    sampler, rows = Sampler(), Data()
    batch_sampler = BatchSampler(sampler)
    options = {"sampler": sampler, "batch_size": 8} if place in ("sampler", "dataset") else {
        "batch_sampler": batch_sampler
    }  # fmt: skip
    told: Any = {"sampler": sampler, "dataset": rows, "batch_sampler": batch_sampler,
                 "inner_sampler": sampler}[place]  # fmt: skip
    loop = TrainingLoop(network(), plain(), "cpu")
    for _ in range(2):
        loop.train(DataLoader(rows, **options), functional.cross_entropy)
    assert told.told == [0, 1, 2, 3]


def test_a_loader_without_a_length_is_told_that_its_rate_stays(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Endless:
        def __iter__(self) -> Any:
            return iter(loader())

    TrainingLoop(network(), plain(scheduler_type="cosine"), "cpu").train(
        Endless(), functional.cross_entropy
    )
    assert "does not say how many batches" in caplog.text


def test_an_optimizer_of_another_model_is_refused() -> None:
    """Spec: C2"""
    loop = TrainingLoop(network(), plain(), "cpu")
    loop.setup_optimizer()
    loop.optimizer = torch.optim.SGD(network().parameters(), lr=0.1)
    with pytest.raises(RunError, match="tensors that the model does not have"):
        loop.train_step(next(iter(loader())), functional.cross_entropy)


def test_memory_is_read_and_what_is_not_there_is_none() -> None:
    """Spec: C13, H9"""
    import psutil

    found = MemoryMonitor(0.9).read()
    assert abs(found["memory_bytes"] / psutil.Process().memory_info().rss - 1) < 0.2
    assert found["device_memory_bytes"] is None
    assert MemoryMonitor(1e-9).over()
    assert not MemoryMonitor(1.0).over()


def test_checkpoint_files_are_plain_rotate_and_load_by_default(tmp_path: Path) -> None:
    """Spec: C14. Red when metrics are saved as NumPy scalars."""
    import numpy as np

    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    manager = CheckpointManager(tmp_path, max_checkpoints=2)
    for step in (1, 20, 3):
        manager.save_checkpoint(model, optimizer, None, {"loss": np.float64(0.5)}, step, 1)
    assert [file.name for file in manager.checkpoints()] == [
        "checkpoint_step_3.pt", "checkpoint_step_20.pt",
    ]  # fmt: skip
    held = torch.load(manager.get_latest_checkpoint())
    assert set(held) == {
        "model_state_dict", "optimizer_state_dict", "scheduler_state_dict", "metrics", "step",
        "epoch",
    }  # fmt: skip
    other = network(9)
    assert manager.load_checkpoint(other, optimizer)["metrics"] == {"loss": 0.5}
    assert torch.equal(weights(other), weights(model))
    fresh = torch.optim.SGD(other.parameters(), lr=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    manager.save_checkpoint(model, optimizer, None, {}, 30, 1)
    assert manager.load_checkpoint(other)["step"] == 30  # the weights alone
    assert fresh.param_groups[0]["lr"] == 0.5
    manager.load_checkpoint(other, fresh)
    assert fresh.param_groups[0]["lr"] == 0.25
    with pytest.raises(RunError, match="no checkpoint"):
        CheckpointManager(tmp_path / "none").load_checkpoint(model)


def test_the_small_parts_count_as_they_say() -> None:
    """Spec: C12, C15"""
    accumulator = GradientAccumulator(3)
    assert [accumulator.add() for _ in range(7)] == [False, False, True, False, False, True, False]
    stopping = EarlyStopping(patience=2, min_delta=0.1)
    values = [1.0, 0.95, 0.8, 0.79, 0.78]
    assert [stopping({"val_loss": one}) for one in values] == [False, False, False, False, True]
    metrics = TrainingMetrics(window_size=2)
    for one in (1.0, 2.0, 4.0):
        metrics.update(loss=one, absent=None)
    assert metrics.get_recent_average("loss") == 3.0
    assert metrics.get_summary() == {"loss": {"latest": 4.0, "mean": 3.0, "count": 3}}
    assert metrics.get_recent_average("absent") is None
