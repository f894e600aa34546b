"""Where a run stands in its data: a count of samples, whatever cuts them into batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kernel_parts import make_plugin
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from forge_kernel import resume, run
from forge_kernel.api import Batch, TensorData
from forge_kernel.contract.plugin import Kind
from forge_kernel.errors import RunError
from forge_kernel.storage.atomic_files import manifest_of, write_json
from forge_kernel.training.loaders.data_loaders import LoaderData

COUNT = 60
NUMBERS = torch.arange(COUNT, dtype=torch.float32).reshape(COUNT, 1)
CLASSES = torch.arange(COUNT) % 3
HEAD = """forge: 1
run: {name: t, seed: 0, device: cpu, max_epochs: 2, log_every: 1, save_every: 1}
model: {use: mlp, with: {hidden: [4]}}
optimizer: {use: sgd, with: {lr: 0.001}}
loss: {use: cross_entropy}
"""
FILE = """data:
  use: file
  with: {path: x.npz, batch_size: 6, target: class, classes: 3, validation_split: 0.0}
"""
TEXT = """data: {use: text, with: {path: t.txt, batch_size: 6, sequence_length: 4}}
"""


class Loaded(TensorData):
    """Samples in a drawn order, six at a time."""

    def __init__(self, size: int = 6) -> None:
        super().__init__(NUMBERS, CLASSES, batch_size=size, seed=3)


def shuffled(size: int = 6) -> DataLoader[Any]:
    return DataLoader(TensorDataset(NUMBERS, CLASSES), batch_size=size, shuffle=True)


def listed(size: int = 6) -> list[Any]:
    return list(zip(NUMBERS.split(size), CLASSES.split(size), strict=True))


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 3))


class Seen:
    """The first input of each sample that was trained on, epoch by epoch."""

    def __init__(self) -> None:
        epochs: list[list[int]] = [[], []]
        self.epochs = epochs

        def on_batch(self: Any, run: Any, step: Any, batch: Batch) -> None:
            first = batch.inputs.reshape(len(batch.inputs), -1)[:, 0]
            epochs[run.progress.epoch] += [int(value) for value in first]

        self.plugin = make_plugin("seen", Kind.OBSERVERS, on_batch=on_batch)


def prepared(tmp_path: Path, data: str) -> Path:
    np.savez(tmp_path / "x.npz", input=NUMBERS.numpy(), target=CLASSES.numpy())
    (tmp_path / "t.txt").write_bytes(bytes(range(32, 127)) * 5)
    file = tmp_path / "p.yaml"
    data = data.replace("path: ", f"path: {tmp_path}/")
    model = HEAD
    if "use: text" in data:
        model = HEAD.replace(
            "use: mlp, with: {hidden: [4]}",
            "use: decoder_transformer, with: {layers: 1, width: 8, heads: 1}",
        )
    file.write_text(model + data)
    return file


def stopped(tmp_path: Path, file: Path, seen: Seen, steps: int, **live: Any) -> Path:
    """A run that has ended after some steps, in the middle of its first epoch."""
    text = file.read_text().replace("max_epochs: 2", f"max_epochs: 2, max_steps: {steps}")
    file.with_name("short.yaml").write_text(text)
    folder = tmp_path / "run"
    run(
        file.with_name("short.yaml"),
        output_dir=folder, plugins=[seen.plugin], quiet=True, **live,
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("size", [4, 10, 60])
@pytest.mark.parametrize("steps", [1, 3, 7])
@pytest.mark.parametrize("data", [FILE, TEXT], ids=["file", "text"])
def test_a_run_resumed_with_another_batch_size_trains_each_sample_once_an_epoch(
    tmp_path: Path, data: str, steps: int, size: int
) -> None:
    """Red when the place counts batches: samples are trained on twice or never."""
    whole, seen = Seen(), Seen()
    file = prepared(tmp_path, data)
    run(file, output_dir=tmp_path / "whole", plugins=[whole.plugin], quiet=True)
    folder = stopped(tmp_path, file, seen, steps)
    resume(
        folder,
        [f"data.with.batch_size={size}", "run.max_steps=null"],
        plugins=[seen.plugin], quiet=True,
    )  # fmt: skip
    assert seen.epochs == whole.epochs
    assert len(seen.epochs[0]) > size or size == COUNT


@pytest.mark.parametrize("size", [4, 7, 60])
@pytest.mark.parametrize("make", [Loaded, listed])
def test_live_data_cut_otherwise_go_on_at_the_same_sample(
    tmp_path: Path, make: Any, size: int
) -> None:
    """Red when a batch that spans the place is left out or handed over whole."""
    seen = Seen()
    file = prepared(tmp_path, "")
    file.write_text(file.read_text().replace("model: {use: mlp, with: {hidden: [4]}}\n", ""))
    folder = stopped(tmp_path, file, seen, 3, model=network(), data=make())
    resume(
        folder, ["run.max_steps=null"],
        model=network(), data=make(size), plugins=[seen.plugin], quiet=True,
    )  # fmt: skip
    assert [sorted(epoch) for epoch in seen.epochs] == [list(range(COUNT))] * 2


def counted_in_batches(folder: Path) -> None:
    """Make a run's newest checkpoint one of before: its progress counts batches of six."""
    checkpoint = max((folder / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    state = json.loads((checkpoint / "state.json").read_text())
    progress = state["progress"]
    place = progress.pop("place")
    progress["batch"] = -(-place // 6)
    write_json(checkpoint / "state.json", state)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["sha256"]  # which those had not
    (checkpoint / "manifest.json").unlink()
    write_json(
        checkpoint / "manifest.json", {**manifest, "format": 1, "files": manifest_of(checkpoint)}
    )


@pytest.mark.parametrize("make", [FILE, TEXT, Loaded, shuffled, listed])
def test_an_older_checkpoint_that_counted_batches_goes_on_to_the_bit(
    tmp_path: Path, make: Any
) -> None:
    """Red when the count is taken for samples, or a loader's replay is not counted."""
    live = not isinstance(make, str)
    file = prepared(tmp_path, "" if live else make)

    def parts() -> dict[str, Any]:
        return {"model": network(), "data": make()} if live else {}

    if live:
        file.write_text(file.read_text().replace("model: {use: mlp, with: {hidden: [4]}}\n", ""))
    whole = run(file, output_dir=tmp_path / "whole", quiet=True, **parts())
    seen = Seen()
    folder = stopped(tmp_path, file, seen, 4, **parts())
    counted_in_batches(folder)
    again = resume(
        folder, ["run.max_steps=null"], plugins=[seen.plugin], quiet=True, **parts()
    )  # fmt: skip
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_loader_that_cuts_and_draws_otherwise_is_refused(tmp_path: Path) -> None:
    seen = Seen()
    file = prepared(tmp_path, "")
    file.write_text(file.read_text().replace("model: {use: mlp, with: {hidden: [4]}}\n", ""))
    folder = stopped(tmp_path, file, seen, 3, model=network(), data=shuffled())
    with pytest.raises(RunError, match="another batch than it did"):
        resume(
            folder, ["run.max_steps=null"],
            model=network(), data=shuffled(5), plugins=[seen.plugin], quiet=True,
        )  # fmt: skip


@pytest.mark.parametrize("make", [Loaded])
def test_samples_by_place_are_those_of_the_batches(make: Any) -> None:
    data = make()
    batches = list(data.batches(2, 0))
    taken = data.take(2, range(6, 18))
    assert torch.equal(taken.inputs, torch.cat([batches[1].inputs, batches[2].inputs]))
    assert torch.equal(taken.targets, torch.cat([batches[1].targets, batches[2].targets]))
    assert torch.equal(data.take(2, range(1, 12, 5)).inputs[0], batches[0].inputs[1])


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (Batch(torch.zeros(5, 2), torch.zeros(5)), 5),
        (Batch({"a": torch.zeros(4, 2), "b": torch.zeros(4)}), 4),
        (Batch((torch.zeros(3, 2), torch.zeros(3))), 3),
        (Batch(torch.zeros(2, 2), torch.tensor(1.0)), 2),
        (Batch(torch.zeros(0, 2), torch.zeros(0)), 1),
    ],
)
def test_a_batch_tells_its_samples(batch: Batch, samples: int) -> None:
    assert batch.samples == samples


def test_rows_of_a_batch_are_cut_in_all_its_parts() -> None:
    inputs = {"x": torch.arange(5.0), "scale": torch.tensor(2.0)}
    batch = Batch(inputs, torch.arange(5), torch.ones(5), slice(0, 1), ignore_index=3)
    cut = batch.rows(slice(2, None))
    assert torch.equal(cut.inputs["x"], torch.tensor([2.0, 3.0, 4.0]))
    assert cut.inputs["scale"] is inputs["scale"]
    assert cut.targets.tolist() == [2, 3, 4]
    assert len(cut.weights) == 3  # type: ignore[arg-type]
    assert (cut.positions, cut.ignore_index) == (slice(0, 1), 3)


def test_a_place_moves_on_with_batches_that_are_empty() -> None:
    empty = (torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64))
    data = LoaderData([*listed()[:2], empty, *listed()[2:]])
    whole: list[Tensor] = [batch.inputs for batch in data.batches(0, 0)]
    assert [len(inputs) for inputs in whole[:4]] == [6, 6, 0, 6]
    assert torch.equal(next(iter(data.batches(0, 13))).inputs, whole[3])
