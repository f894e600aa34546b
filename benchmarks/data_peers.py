"""The peers of `data.py`: shuffled batches of the same samples by other loaders, if installed.

Each function writes what its library needs into a folder and returns, by name, what gives an
epoch's batches. `pip install -c constraints.txt -e '.[bench]'` installs them all.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

Batches = Callable[[int], Iterator[Any]]
FEW = 20_000  # samples for those that take long to write; the time of a batch hardly depends on it


class Rows(Dataset[Any]):
    """Whole index arrays at a time: the fast way to use torch's loader, which few know."""

    def __init__(self, columns: dict[str, np.ndarray]) -> None:
        self._columns = columns

    def __getitem__(self, index: np.ndarray) -> list[torch.Tensor]:
        return [torch.from_numpy(column[index]) for column in self._columns.values()]


class Indices(Sampler[Any]):
    def __init__(self, count: int, size: int) -> None:
        self._count, self._size = count, size

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(self._count).numpy()
        return iter(
            order[begin : begin + self._size] for begin in range(0, self._count, self._size)
        )


def torch_loaders(columns: dict[str, np.ndarray], size: int, folder: Path) -> dict[str, Batches]:
    del folder
    tensors = TensorDataset(*map(torch.from_numpy, columns.values()))
    rows, indices = Rows(columns), Indices(len(columns["input"]), size)
    return {
        "DataLoader, sample by sample": lambda _: iter(DataLoader(tensors, size, shuffle=True)),
        "DataLoader, index arrays": lambda _: iter(DataLoader(rows, None, sampler=indices)),
    }


def hugging_face(columns: dict[str, np.ndarray], size: int, folder: Path) -> dict[str, Batches]:
    import datasets

    datasets.disable_progress_bars()
    made = datasets.Dataset.from_dict({name: list(c) for name, c in columns.items()})
    made.save_to_disk(str(folder / "hf"))
    mapped = datasets.load_from_disk(str(folder / "hf"))
    torched, plain = mapped.with_format("torch"), mapped.with_format("numpy")
    streamed = mapped.to_iterable_dataset(num_shards=16).with_format("numpy")

    def lists(epoch: int) -> Iterator[Any]:
        order = np.random.default_rng(epoch).permutation(len(plain))
        for begin in range(0, len(order), size):
            yield plain[order[begin : begin + size].tolist()]

    return {
        "HF datasets, DataLoader": lambda _: iter(DataLoader(torched, size, shuffle=True)),
        "HF datasets, index lists": lists,
        "HF datasets, iterable, buffer 10,000": lambda epoch: iter(
            streamed.shuffle(seed=epoch, buffer_size=10_000).iter(size)
        ),
    }


def grain_loader(columns: dict[str, np.ndarray], size: int, folder: Path) -> dict[str, Batches]:
    import grain

    del folder

    class Source:
        def __len__(self) -> int:
            return len(columns["input"])

        def __getitem__(self, at: int) -> dict[str, Any]:
            return {name: column[at] for name, column in columns.items()}

    def batches(epoch: int) -> Iterator[Any]:
        made = grain.MapDataset.source(Source()).seed(epoch).shuffle().batch(size)
        # by number: its threads would work on while the others are timed
        return (made[at] for at in range(len(made)))

    return {"grain, MapDataset": batches}


def lit_sample(at: int) -> dict[str, Any]:
    """A sample of the arrays in the folder that the environment names: workers are spawned."""
    folder = Path(os.environ["LIT_FOLDER"])
    inputs = np.load(folder / "input.npy", mmap_mode="r")
    return {"input": torch.from_numpy(inputs[at].copy()), "target": at % 10}


def litdata_loader(columns: dict[str, np.ndarray], size: int, folder: Path) -> dict[str, Batches]:
    import litdata

    os.environ["LIT_FOLDER"] = str(folder)
    np.save(folder / "input.npy", columns["input"][:FEW])
    litdata.optimize(
        lit_sample, list(range(FEW)), str(folder / "lit"), num_workers=1, chunk_bytes="16MB",
        verbose=False,
    )  # fmt: skip

    def batches(epoch: int) -> Iterator[Any]:
        made = litdata.StreamingDataset(str(folder / "lit"), shuffle=True, seed=epoch)
        return iter(litdata.StreamingDataLoader(made, batch_size=size, num_workers=0))

    return {"litdata, local": batches}


def webdataset_loader(
    columns: dict[str, np.ndarray], size: int, folder: Path
) -> dict[str, Batches]:
    import webdataset

    file = folder / "x.tar"
    with webdataset.TarWriter(str(file)) as writer:
        for at in range(FEW):
            row, label = columns["input"][at], columns["target"][at]
            writer.write({"__key__": f"{at:07d}", "input.npy": row, "target.cls": int(label)})

    def batches(epoch: int) -> Iterator[Any]:
        made = webdataset.WebDataset(str(file), shardshuffle=False, seed=epoch).shuffle(1000)
        return iter(made.decode().to_tuple("input.npy", "target.cls").batched(size))

    return {"webdataset, local tar, buffer 1,000": batches}


PEERS = {
    "torch": torch_loaders, "datasets": hugging_face, "grain": grain_loader,
    "litdata": litdata_loader, "webdataset": webdataset_loader,
}  # fmt: skip


def peers(columns: dict[str, np.ndarray], size: int, folder: Path) -> dict[str, Batches]:
    """All that are installed; what a library says while it sets up is not of interest."""
    warnings.simplefilter("ignore")
    result: dict[str, Batches] = {}
    for name, make in PEERS.items():
        if importlib.util.find_spec(name) is not None:
            result |= make(columns, size, folder)
    return result
