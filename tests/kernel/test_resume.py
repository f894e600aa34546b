"""A resumed run is the uninterrupted run, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_parts import StopAfter, make_plugin, make_session
from torch.utils.data import DataLoader, TensorDataset

from forge_kernel import resume, run
from forge_kernel.config.pipeline import PipelineConfig
from forge_kernel.config.use import (
    UseCallback,
    UseGradients,
    UseObserver,
    UseOptimizer,
    UseQuantizer,
    UseSchedule,
    UseValidator,
)
from forge_kernel.contract.data import DataSpec
from forge_kernel.contract.plugin import Kind
from forge_kernel.contract.run_config import RunConfig
from forge_kernel.contract.values import Batch
from forge_kernel.errors import CheckpointError, ConfigError, RunError
from forge_kernel.storage.checkpoint_store import CheckpointStore
from forge_kernel.testing.compare import differences
from forge_kernel.testing.trial import TrialData, TrialLoss, TrialModel

STEPS = 12  # epochs of 3 windows of 2 micro-batches: steps 3, 6, 9 and 12 end one


def pipeline(**settings: Any) -> PipelineConfig:
    """Dropout, shuffling, accumulation, every plugin with memory."""
    options = {
        "max_steps": STEPS, "accumulate": 2, "validate_every": 4, "log_every": 3,
        "device": "cpu", "keep_checkpoints": 50, **settings,
    }  # fmt: skip
    return PipelineConfig(
        run=RunConfig(**options),
        quantizer=UseQuantizer("bitnet"),
        optimizer=UseOptimizer("adamw", {"lr": 0.02}),
        gradients=(
            UseGradients("grokfast", {"alpha": 0.8}),
            UseGradients("grokfast", {"filter": "ma", "window": 4}),
            UseGradients("clip_norm"),
        ),
        schedule=UseSchedule("warmup_cosine", {"total_steps": STEPS, "warmup_steps": 3}),
        validators=(UseValidator("classification"),),
        callbacks=(
            UseCallback("best_checkpoint", {"metric": "accuracy", "mode": "max"}),
            UseCallback("early_stopping", {"patience": 50}),
        ),
        observers=(UseObserver("metrics_jsonl"),),
    )


def parts() -> list[Any]:
    return [TrialData(tokens=False), TrialModel(), TrialLoss()]


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["time"]
    return lines


def final(folder: Path) -> Path:
    return CheckpointStore(folder / "checkpoints").path(STEPS)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    run(pipeline(), plugins=parts(), output_dir=folder)
    return folder


def run_until(folder: Path, step: int, *, start: bool, **settings: Any) -> None:
    """Run or resume, and be stopped from outside after a step."""
    stop = StopAfter(step)
    if start:
        result = run(pipeline(**settings), plugins=[*parts(), stop], output_dir=folder, cancel=stop)
    else:
        result = resume(folder, plugins=[*parts(), stop], cancel=stop)
    assert result.outcome == "stopped"
    assert result.steps == step


@pytest.mark.spec("C14")
@pytest.mark.parametrize("step", range(1, STEPS))
def test_it_goes_on_exactly_from_every_step(straight: Path, tmp_path: Path, step: int) -> None:
    folder = tmp_path / "run"
    run_until(folder, step, start=True)
    resume(folder, plugins=parts())
    assert differences(final(straight), final(folder)) == []
    assert metrics(straight) == metrics(folder)


@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 7), (4, 5), (3, 6)])
def test_it_goes_on_exactly_after_two_interruptions(
    straight: Path, tmp_path: Path, first: int, second: int
) -> None:
    folder = tmp_path / "run"
    run_until(folder, first, start=True)
    run_until(folder, second, start=False)
    resume(folder, plugins=parts())
    assert differences(final(straight), final(folder)) == []
    assert metrics(straight) == metrics(folder)


def test_a_finished_run_can_be_made_longer(straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(pipeline(max_steps=8), plugins=parts(), output_dir=folder)
    resume(folder, [f"run.max_steps={STEPS}"], plugins=parts())
    assert differences(final(straight), final(folder)) == []
    assert metrics(straight) == metrics(folder)


def test_intervals_between_checkpoints_do_not_matter(straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_until(folder, 7, start=True, save_every=2)
    assert 6 in CheckpointStore(folder / "checkpoints").steps()
    # as after a kill: the newest intact checkpoint is that of step 6
    (CheckpointStore(folder / "checkpoints").path(7) / "manifest.json").unlink()
    resume(folder, plugins=parts())
    assert differences(final(straight), final(folder)) == []


class Loader:
    """A plain DataLoader that shuffles from the process's random stream, two workers or none."""

    def __init__(self, workers: int) -> None:
        inputs = torch.randn(22, 8, generator=torch.Generator().manual_seed(4))
        targets = torch.arange(22) % 5
        data = TensorDataset(inputs, targets)
        training = DataLoader(data, batch_size=4, shuffle=True, num_workers=workers)
        self.loader = training, DataLoader(data, batch_size=11)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [1, 4, 6, 7])
def test_a_plain_shuffling_loader_resumes_in_mid_epoch(
    tmp_path: Path, step: int, workers: int
) -> None:
    settings = {"accumulate": 1, "max_steps": STEPS}
    model = [TrialModel(), TrialLoss()]
    run(
        pipeline(**settings), data=Loader(workers).loader, plugins=model,
        output_dir=tmp_path / "a", model=None,
    )  # fmt: skip
    stop = StopAfter(step)
    folder = tmp_path / "b"
    run(
        pipeline(**settings), data=Loader(workers).loader,
        plugins=[TrialModel(), TrialLoss(), stop], output_dir=folder, cancel=stop,
    )  # fmt: skip
    resume(folder, data=Loader(workers).loader, plugins=[TrialModel(), TrialLoss()])
    assert differences(final(tmp_path / "a"), final(folder)) == []


def test_overrides_change_the_optimizers_settings_and_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_until(folder, 4, start=True)
    result = resume(folder, ["optimizer.with.lr=0.5", "schedule=null"], plugins=parts())
    assert result.final["learning_rate"] == 0.5
    assert "lr: 0.5" in (folder / "config.yaml").read_text()


def test_the_saved_configuration_alone_repeats_the_run(tmp_path: Path) -> None:
    text = {
        "forge": 1,
        "run": {"name": "again", "max_steps": 4, "device": "cpu", "seed": None},
        "data": {"use": "modular_arithmetic", "with": {"modulus": 7, "batch_size": 8}},
        "model": {"use": "mlp"},
        "optimizer": {"use": "adamw"},
        "loss": {"use": "cross_entropy"},
    }
    file = tmp_path / "again.yaml"
    from forge_kernel.config.yaml_file import write_yaml

    file.write_text(write_yaml(text))
    run(file, output_dir=tmp_path / "a")
    run(tmp_path / "a" / "config.yaml", output_dir=tmp_path / "b")
    first, second = (
        CheckpointStore(tmp_path / name / "checkpoints").path(4) for name in ("a", "b")
    )
    assert differences(first, second) == []  # also the seed that was drawn


def test_a_run_with_live_parts_says_so_and_asks_for_them(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_until(folder, 2, start=True)
    assert "x-live" in (folder / "config.yaml").read_text()
    with pytest.raises(ConfigError, match="'data' is missing|hand in"):
        resume(folder)


def test_another_model_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_until(folder, 2, start=True)
    model = torch.nn.Linear(8, 5)
    data = TrialData(tokens=False)
    with pytest.raises(RunError, match="another model"):
        resume(folder, model=model, plugins=[data, TrialLoss()])


def test_a_new_plugin_with_memory_is_refused_on_resume(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_until(folder, 2, start=True)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(
        config.replace("callbacks:\n", "callbacks:\n- {use: early_stopping}\n")
    )
    with pytest.raises(RunError, match="no state of"):
        resume(folder, plugins=parts())


def test_progress_of_which_a_part_is_not_known_is_refused(tmp_path: Path) -> None:
    """Red when what a newer kernel counts is dropped without a word."""
    folder = tmp_path / "run"
    run_until(folder, 2, start=True)
    store = CheckpointStore(folder / "checkpoints")
    snapshot = store.newest()[0]
    snapshot.trees["progress"]["tides"] = 3
    store.save(snapshot)
    with pytest.raises(CheckpointError, match="unknown part 'tides'"):
        resume(folder, plugins=parts())


def test_a_pinned_checkpoint_gives_back_its_weights_and_what_they_are_judged_by(
    tmp_path: Path,
) -> None:
    """And nothing else: the run goes on from where it is."""

    def told(self: Any, run: Any) -> None:
        self.told = getattr(self, "told", 0) + 1

    memory = {
        "state_dict": lambda self: {"count": getattr(self, "count", 0)},
        "load_state_dict": lambda self, state: setattr(self, "count", state["count"]),
    }
    model, average = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    other = make_plugin("other", Kind.CALLBACKS, on_weights_changed=told)
    namer = make_plugin("namer", Kind.CALLBACKS, compute_evaluation_model=lambda self, run: average)
    for plugin in (other, namer):
        for name, function in memory.items():
            setattr(type(plugin), name, function)
    batch = Batch(torch.ones(2, 3), torch.zeros(2, dtype=torch.int64))
    session = make_session(model, [batch] * 9, plugins=[other, namer], folder=tmp_path)
    session.step(batch)
    other.count = namer.count = 1
    session.save(tags=("best",))
    kept = model.weight.detach().clone()
    session.step(batch)
    other.count = namer.count = 2
    session.validate()
    before = other.told
    with pytest.raises(RunError, match="pinned as 'worst'"):
        session.restore_weights("worst")
    assert not torch.equal(model.weight, kept)
    session.restore_weights("best")
    assert torch.equal(model.weight, kept)
    assert (other.count, namer.count) == (2, 1)
    assert (session.run.progress.step, other.told) == (2, before + 1)
    assert session.validation.at == -1, "the weights are others than those that were validated"
    other.told = 0
    session.take_up(CheckpointStore(tmp_path / "checkpoints").newest()[0])
    assert (session.run.progress.step, other.count, other.told) == (1, 1, 1)
    assert session.run.progress.seconds > 0, "also those of before the save"


def test_data_that_remember_and_data_that_do_not_take_each_others_places(tmp_path: Path) -> None:
    """What the checkpoint has for data that remember nothing is passed over, and the reverse."""

    class Plain:
        spec = DataSpec(classes=2)
        batches_per_epoch = 9

        def batches(self, epoch: int, place: int) -> Any:
            for _ in range(9):
                yield Batch(torch.ones(2, 3), torch.zeros(2, dtype=torch.int64))

        def validation(self) -> list[Batch]:
            return []

    class Remembering(Plain):
        taken_up: Any = None

        def state_dict(self) -> dict[str, Any]:
            return {"read": 4}

        def load_state_dict(self, state: Any) -> None:
            self.taken_up = state

    def saved(folder: Path, data: Any) -> None:
        session = make_session(torch.nn.Linear(3, 2), data, folder=folder, max_steps=1)
        session.train()
        session.save()

    def taken_up(folder: Path, data: Any) -> Any:
        session = make_session(torch.nn.Linear(3, 2), data, folder=folder)
        session.take_up(CheckpointStore(folder / "checkpoints").newest()[0])
        assert session.run.progress.step == 1
        return session.run.data

    saved(tmp_path / "plain", Plain())
    saved(tmp_path / "remembering", Remembering())
    assert taken_up(tmp_path / "plain", Remembering()).taken_up is None
    assert taken_up(tmp_path / "remembering", Remembering()).taken_up == {"read": 4}
    taken_up(tmp_path / "remembering", Plain())


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run folder"):
        resume(tmp_path)


def test_a_run_without_an_intact_checkpoint_cannot_be_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_until(folder, 2, start=True)
    for file in (folder / "checkpoints").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"no intact checkpoint in .*step-2 is damaged"):
        resume(folder, plugins=parts())
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(CheckpointError, match=r"no intact checkpoint in .*: there is none"):
        resume(folder, plugins=parts())


def test_a_run_folder_is_never_used_by_a_second_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_until(folder, 2, start=True)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(ConfigError, match="not empty"):
        run(pipeline(), plugins=parts(), output_dir=folder)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
