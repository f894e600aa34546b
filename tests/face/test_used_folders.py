"""A checkpoint folder that was used before: gone on from, refused, or set aside and told."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from phase5_parts import write_samples
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from agent_forge.phases.phase5_training import (
    BitNetConfig,
    DataConfig,
    DataLoaderFactory,
    TrainingConfig,
    TrainingLoop,
    convert_model_to_bitnet,
    create_training_pipeline,
)
from agent_forge.phases.phase5_training.training_identity import TrainingIdentity, data_digest
from forge_kernel.errors import ForgeError, RunError


def batches(seed: int = 1, count: int = 4) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(6, 4, generator=generator), torch.randint(3, (6,), generator=generator))
        for _ in range(count)
    ]


def network(seed: int = 0, width: int = 8) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([value.detach().flatten().clone() for value in model.parameters()])


def loop(folder: Path, model: nn.Module | None = None, **options: Any) -> TrainingLoop:
    chosen = {"epochs": 2, "learning_rate": 0.1, "use_amp": False, "warmup_steps": 0, **options}
    return TrainingLoop(model or network(), TrainingConfig(**chosen), "cpu", folder)


def trained(found: TrainingLoop, data: Any = None, **options: Any) -> Any:
    return found.train(data or batches(), functional.cross_entropy, **options)


class StopsAt:
    def __init__(self, step: int) -> None:
        self.step, self.event = step, threading.Event()

    def on_step_end(self, step: int, metrics: dict[str, Any]) -> None:
        del metrics
        if step == self.step:
            self.event.set()


def stopped(folder: Path, step: int = 3, **options: Any) -> TrainingLoop:
    found, stop = loop(folder, **options), StopsAt(step)
    found.add_callback(stop)
    assert trained(found, cancel=stop.event).outcome == "stopped"
    return found


def warnings_of(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING)


OTHERS: dict[str, Any] = {
    "weights": (lambda: network(7), batches),
    "data": (network, lambda: [(x, (y + 1) % 3) for x, y in batches()]),
    "both": (lambda: network(7), lambda: batches(9)),
    "shorter_data": (network, lambda: batches()[:3]),
    "network": (lambda: network(width=5), batches),
}


@pytest.mark.parametrize("other", OTHERS)
def test_an_ended_training_is_never_somebody_elses(
    other: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Planted: the newest checkpoint taken up whatever it is of."""
    trained(loop(tmp_path))
    make, data = OTHERS[other]
    found, alone = loop(tmp_path, make()), loop(tmp_path / "alone", make())
    torch.manual_seed(3)
    result = trained(found, data())
    torch.manual_seed(3)
    trained(alone, data())
    assert result.steps == found.global_step == 2 * len(data())
    assert torch.equal(weights(found.model), weights(alone.model))
    assert "training begins anew" in warnings_of(caplog)
    assert (tmp_path / "checkpoints-1" / "step-8").is_dir()
    again = loop(tmp_path, make())  # the new training is the folder's now
    assert trained(again, data()).steps == result.steps
    assert torch.equal(weights(again.model), weights(found.model))


def test_the_same_training_once_more_is_not_made_twice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = loop(tmp_path), loop(tmp_path)
    trained(first)
    heard = StopsAt(-1)
    second.add_callback(heard)
    assert trained(second).outcome == "completed"
    assert torch.equal(weights(second.model), weights(first.model))
    assert "has ended: its weights are taken up" in warnings_of(caplog)
    assert not (tmp_path / "checkpoints-1").exists()


def test_more_epochs_go_on_where_the_training_ended(tmp_path: Path) -> None:
    trained(loop(tmp_path))
    longer = loop(tmp_path, epochs=3)
    assert trained(longer).steps == 12
    assert longer.epoch == 3


@pytest.mark.parametrize("other", [name for name in OTHERS if name != "weights"])
def test_a_training_that_has_not_ended_is_not_gone_on_from_with_another_model_or_other_data(
    other: str, tmp_path: Path
) -> None:
    stopped(tmp_path)
    make, data = OTHERS[other]
    found = loop(tmp_path, make())
    before = weights(found.model)
    files = sorted(tmp_path.rglob("*"))
    with pytest.raises(RunError, match="resume_from_checkpoint=False") as caught:
        trained(found, data())
    assert ("another model" in str(caught.value)) is (other == "network")
    assert torch.equal(weights(found.model), before)
    assert sorted(tmp_path.rglob("*")) == files
    assert trained(found, data(), resume_from_checkpoint=False).outcome == "completed"
    assert (tmp_path / "checkpoints-1").is_dir()


def test_a_program_that_draws_its_weights_anew_goes_on_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(5)
    stopped(tmp_path)
    caplog.clear()
    found = loop(tmp_path, network(7))
    assert trained(found).steps == 8
    assert "with its weights in the place of the model's" in warnings_of(caplog)


@pytest.mark.parametrize("bitnet", [False, True])
def test_a_loop_that_was_stopped_goes_on_by_itself(
    bitnet: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Planted: its own weights, changed since, taken for another model's."""
    torch.manual_seed(5)
    whole = loop(tmp_path / "whole", bitnet_enabled=bitnet)
    trained(whole)
    torch.manual_seed(5)
    found = stopped(tmp_path / "cut", bitnet_enabled=bitnet)
    caplog.clear()
    assert trained(found).steps == 8
    assert (found.global_step, found.epoch) == (8, 2)
    assert not warnings_of(caplog)
    assert torch.equal(weights(found.model), weights(whole.model))


def test_checkpoints_that_are_not_resumed_are_set_aside_not_mixed(tmp_path: Path) -> None:
    """Planted: the old, later checkpoints kept, so that the next resume takes them."""
    trained(loop(tmp_path, epochs=5))
    short = loop(tmp_path, network(7))
    trained(short, resume_from_checkpoint=False)
    assert sorted(one.name for one in (tmp_path / "checkpoints").glob("step-*")) == ["step-8"]
    again = loop(tmp_path, network(7))
    trained(again)
    assert torch.equal(weights(again.model), weights(short.model))


def test_epochs_one_by_one_begin_a_used_folder_anew(tmp_path: Path) -> None:
    trained(loop(tmp_path, epochs=4))
    found = loop(tmp_path)
    for _ in range(2):
        found.train_epoch(batches(), functional.cross_entropy)
    assert (tmp_path / "checkpoints-1" / "step-16").is_dir()
    assert not (tmp_path / "checkpoints-2").exists()
    assert (tmp_path / "checkpoints" / "step-8").is_dir()


# -- what is looked at -------------------------------------------------------------------------


def loaders(folder: Path) -> dict[str, Any]:
    inputs, targets = torch.arange(24.0).reshape(12, 2), torch.arange(12) % 3
    file, other = folder / "a.json", folder / "b.json"
    rows = [{"input": [float(i), 1.0], "target": i % 2} for i in range(12)]
    file.write_text(json.dumps(rows))
    other.write_text(json.dumps([*rows[:-1], {"input": [99.0, 1.0], "target": 0}]))
    options = DataConfig(num_workers=0, quality_threshold=0.0, cache_dir=str(folder / "cache"))
    return {
        "list": [(inputs, targets)],
        "list_of_other_targets": [(inputs, targets + 1)],
        "dictionaries": [{"input": inputs, "target": targets}],
        "arrays": [(inputs.numpy(), targets.numpy())],
        "loader": DataLoader(TensorDataset(inputs, targets), batch_size=4),
        "loader_of_others": DataLoader(TensorDataset(inputs + 1, targets), batch_size=4),
        "loader_of_other_batches": DataLoader(TensorDataset(inputs, targets), batch_size=3),
        "file": DataLoaderFactory.create_loader(file, options),
        "other_file": DataLoaderFactory.create_loader(other, options),
    }


def test_each_of_the_usual_loaders_is_told_apart_and_none_is_drawn_from(tmp_path: Path) -> None:
    found = {name: data_digest(one) for name, one in loaders(tmp_path).items()}
    assert len(set(found.values())) == len(found)
    assert found == {name: data_digest(one) for name, one in loaders(tmp_path).items()}
    once = iter([1, 2, 3])
    _ = data_digest(once)
    assert list(once) == [1, 2, 3]


def test_a_model_is_known_by_names_shapes_types_and_values() -> None:
    first, second = TrainingIdentity.of(network()), TrainingIdentity.of(network(7))
    assert first == TrainingIdentity.of(network())
    assert first.network == second.network
    assert first.weights != second.weights
    assert TrainingIdentity.of(network().bfloat16()).network != first.network
    assert TrainingIdentity.from_data(first.to_data()) == first
    assert TrainingIdentity.from_data({"network": "x"}) is None


# -- pipelines ---------------------------------------------------------------------------------


def wide(seed: int = 5, width: int = 32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(128, width), nn.ReLU(), nn.Linear(width, 10))


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    write_samples(tmp_path / "train.json", 120, 1)
    write_samples(tmp_path / "val.json", 41, 2)

    def made(model: nn.Module) -> Any:
        return create_training_pipeline(
            model, "train.json", "again", "val.json", output_dir="out",
            training_config={"epochs": 4, "use_amp": False},
        )  # fmt: skip

    return made


def stop(pipeline: Any) -> None:
    pipeline.validator.record = lambda *a: pipeline.cancel()
    assert pipeline.train().outcome == "stopped"


def runs() -> list[Path]:
    return sorted(Path("out/runs").iterdir())


def test_a_pipeline_leaves_an_unfinished_run_of_another_network_alone(
    make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Planted: the run taken up, ended by an error, and marked as failed."""
    stop(make(wide()))
    before = (runs()[0] / "status.json").read_text()
    other = make(wide(width=16))
    assert other.train().outcome == "completed"
    assert len(runs()) == 2
    assert "an unfinished run of another model" in warnings_of(caplog)
    kept = next(one for one in runs() if (one / "status.json").read_text() == before)
    again = make(wide())
    assert again.train().folder.resolve() == kept.resolve()


def test_a_pipeline_that_goes_on_with_a_run_of_other_weights_says_so(
    make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    stop(make(wide()))
    caplog.clear()
    assert make(wide(9)).train().outcome == "completed"
    assert "with its weights in the place of the model's" in warnings_of(caplog)
    assert len(runs()) == 1


def test_a_pipeline_whose_data_changed_since_is_refused(make: Any) -> None:
    stop(make(wide()))
    write_samples(Path("train.json"), 120, 3)
    with pytest.raises(ForgeError, match="is not what this run was trained on"):
        make(wide()).train()


def test_a_pipeline_that_ended_is_followed_by_a_run_of_its_own(make: Any) -> None:
    first = make(wide())
    first.train()
    second = make(wide(9))
    second.train()
    assert len(runs()) == 2
    assert not torch.equal(weights(first.model), weights(second.model))


def test_a_converted_model_goes_on_in_its_folder(tmp_path: Path) -> None:
    """The identity is of the model as it was handed in."""

    def made() -> nn.Module:
        return convert_model_to_bitnet(network(), BitNetConfig(weight_bits=1.58))

    torch.manual_seed(5)
    whole = loop(tmp_path / "whole", made())
    trained(whole)
    torch.manual_seed(5)
    cut, end = loop(tmp_path / "cut", made()), StopsAt(3)
    cut.add_callback(end)
    trained(cut, cancel=end.event)
    second = loop(tmp_path / "cut", made())
    trained(second)
    assert torch.equal(weights(second.model), weights(whole.model))
