"""Each pass over a data set of the face is an epoch with an order of its own, wherever it is made.

Planted for all: the epoch counted in the data set's own process only, as it was.
"""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from agent_forge.phases.phase5_training import DataConfig, DataLoaderFactory, StreamingDataset
from agent_forge.phases.phase5_training.shared_epochs import SharedEpochs

COUNT = 61
WORKERS = [
    {"num_workers": 0},
    {"num_workers": 1},
    {"num_workers": 2},
    {"num_workers": 2, "persistent_workers": True},
]
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def settings(folder: Path, **chosen: Any) -> DataConfig:
    return DataConfig(
        **{"batch_size": 6, "num_workers": 0, "quality_threshold": 0.0,
           "cache_dir": str(folder / "cache"), **chosen}
    )  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    found = tmp_path / "rows.json"
    found.write_text(json.dumps([{"input": [float(i)], "target": i % 2} for i in range(COUNT)]))
    return found


def one_pass(loader: Any) -> list[int]:
    return [int(value) for batch in loader for value in batch["input"].flatten()]


@pytest.mark.parametrize("options", WORKERS, ids=str)
def test_each_epoch_has_every_sample_once_in_an_order_of_its_own(
    options: dict[str, Any], file: Path
) -> None:
    loader = DataLoader(StreamingDataset(file, settings(file.parent)), batch_size=6, **options)
    passes = []
    for _ in range(4):
        torch.manual_seed(0)  # the order is the data set's, whatever the program seeds
        passes.append(one_pass(loader))
    assert all(sorted(found) == list(range(COUNT)) for found in passes)
    assert len({tuple(found) for found in passes}) == 4


@pytest.mark.parametrize("options", WORKERS, ids=str)
def test_set_epoch_is_heard_and_counted_on_from(options: dict[str, Any], file: Path) -> None:
    data = StreamingDataset(file, settings(file.parent))
    loader = DataLoader(data, batch_size=6, **options)
    first, second, third = (one_pass(loader) for _ in range(3))
    data.set_epoch(1)
    assert [one_pass(loader), one_pass(loader)] == [second, third]
    data.set_epoch(0)
    assert one_pass(loader) == first


@pytest.mark.parametrize("options", WORKERS, ids=str)
def test_a_pass_that_is_left_early_loses_no_sample_of_the_next_one(
    options: dict[str, Any], file: Path
) -> None:
    loader = DataLoader(StreamingDataset(file, settings(file.parent)), batch_size=6, **options)
    for _ in range(3):
        left = iter(loader)
        _ = next(left)
        del left
        assert sorted(one_pass(loader)) == list(range(COUNT))


@pytest.mark.parametrize("workers", [0, 2])
def test_two_passes_at_once_are_two_epochs(workers: int, file: Path) -> None:
    loader = DataLoader(
        StreamingDataset(file, settings(file.parent)), batch_size=6, num_workers=workers
    )
    pairs = list(zip(loader, loader, strict=True))
    first, second = (one_pass(pair[side] for pair in pairs) for side in (0, 1))
    assert sorted(first) == sorted(second) == list(range(COUNT))
    assert first != second


def test_the_order_without_workers_is_a_function_of_seed_and_epoch(file: Path) -> None:
    found = [
        [one_pass(DataLoader(data, batch_size=6)) for _ in range(2)]
        for data in (
            StreamingDataset(file, settings(file.parent)),
            StreamingDataset(file, settings(file.parent)),
            StreamingDataset(file, settings(file.parent, seed=1)),
        )
    ]
    assert found[0] == found[1]
    assert found[0] != found[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_of_the_face_hears_set_epoch(workers: int, file: Path) -> None:
    loader = DataLoaderFactory.create_loader(file, settings(file.parent, num_workers=workers))
    first, second, third = (one_pass(loader) for _ in range(3))
    assert len({tuple(first), tuple(second), tuple(third)}) == 3
    loader.set_epoch(1)
    assert [one_pass(loader), one_pass(loader)] == [second, third]


def test_a_position_taken_up_is_gone_on_from_before_an_epoch_that_is_set(file: Path) -> None:
    loader = DataLoaderFactory.create_loader(file, settings(file.parent))
    whole = one_pass(loader)
    loader.set_epoch(0)
    begun = iter(loader)
    head = [int(value) for _ in range(3) for value in next(begun)["input"].flatten()]
    again = DataLoaderFactory.create_loader(file, settings(file.parent))
    again.load_state_dict(loader.state_dict())
    again.set_epoch(0)
    assert head + one_pass(again) == whole


class Told(IterableDataset[tuple[int, int]]):
    """Gives the epoch and the worker of its pass."""

    def __init__(self) -> None:
        self.epochs = SharedEpochs(3)

    def __iter__(self) -> Any:
        worker = get_worker_info()
        return iter([(self.epochs.begin(), 0 if worker is None else worker.id)])


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_all_workers_of_a_pass_are_of_one_epoch(context: str) -> None:
    data = Told()
    loader: Any = DataLoader(data, batch_size=None, num_workers=2, persistent_workers=True,
                             multiprocessing_context=context)  # fmt: skip
    for epoch in (3, 4):
        assert sorted(tuple(map(int, one)) for one in loader) == [(epoch, 0), (epoch, 1)]
    assert data.epochs.epoch == 5


def test_a_copy_counts_on_by_itself() -> None:
    epochs = SharedEpochs()
    assert [epochs.begin(), epochs.begin()] == [0, 1]
    for again in (copy.deepcopy(epochs), pickle.loads(pickle.dumps(epochs))):
        assert [again.begin(), again.begin()] == [2, 3]
    assert epochs.epoch == 2
