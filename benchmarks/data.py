"""Shuffled batches of 256 from 200,000 x 128 float32: CPU time of `data.file` beside its limits.

The limit is one numpy `take` a batch into fresh memory from arrays in memory. Each subject reads as
many batches in a round; rounds are interleaved, figures are medians of the ratios within a round.

Spec: B17, K5
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import h5py
import numpy as np
import torch
from safetensors.numpy import save_file
from torch.utils.data import DataLoader, TensorDataset

from forge_kernel.strategy import OneProcess
from forge_plugins.data.epochs import Epochs
from forge_plugins.data.file import File, FileConfig
from forge_plugins.data.samples import FileData
from forge_plugins.formats.record_file import write_records
from forge_plugins.formats.survey import Survey
from forge_plugins.formats.table import Table

torch.set_num_threads(1)
RECORDS, WIDTH, SIZE = 200_000, 128, 256


class Seeded:
    seed = 0
    strategy = OneProcess()


def opened(path: Path, cache: Path, *, streaming: bool = False) -> FileData:
    config = FileConfig(
        path=str(path), batch_size=SIZE, validation_split=0.0, cache_dir=str(cache), classes=10,
        streaming=streaming,
    )  # fmt: skip
    data: Any = File(config).make_data(Seeded())  # type: ignore[arg-type]
    return data


def take_fresh(inputs: np.ndarray, targets: np.ndarray) -> Iterator[Any]:
    order = torch.randperm(len(inputs)).numpy()
    for begin in range(0, len(order), SIZE):
        index = order[begin : begin + SIZE]
        yield torch.from_numpy(inputs.take(index, 0)), torch.from_numpy(targets.take(index, 0))


def files(folder: Path, columns: dict[str, np.ndarray]) -> dict[str, Path]:
    found = {
        "binary": folder / "x.frec",
        "safetensors": folder / "x.safetensors",
        "HDF5, contiguous": folder / "x.h5",
        "HDF5, gzip (from the cache)": folder / "z.h5",
        "npz (from the cache)": folder / "x.npz",
    }
    write_records(found["binary"], columns)
    save_file(columns, found["safetensors"])
    for name, how in (("x.h5", {}), ("z.h5", {"chunks": True, "compression": "gzip"})):
        with h5py.File(folder / name, "w") as file:
            for key, column in columns.items():
                file.create_dataset(key, data=column, **how)
    np.savez(folder / "x.npz", **columns)
    return found


def resumption() -> dict[str, float]:
    """Seconds to the next batch from a position amid 10 million samples; bytes of the position."""
    count = 10_000_000
    inputs = np.broadcast_to(np.float32(1), (count, 1))
    config = FileConfig(streaming=True, target="none", batch_size=SIZE)
    seconds = []
    for number in range(9):
        table = Table(Path("memory"), "npy", {"input": inputs}, content="0" * 64)
        data = FileData(table, Survey(0.0, count, None, {}, None, None, None), config, 0)
        epochs = Epochs(data)
        state = {**epochs.state_dict(), "epoch": 3, "place": 1_000_000 * number}
        begin = time.perf_counter()
        epochs.load_state_dict(state)
        next(iter(epochs))
        seconds.append(time.perf_counter() - begin)
    return {"seconds": statistics.median(seconds[1:]), "bytes": len(json.dumps(state))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=400)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    columns = {
        "input": generator.standard_normal((RECORDS, WIDTH), dtype=np.float32),
        "target": generator.integers(0, 10, RECORDS),
    }
    tensors = TensorDataset(*map(torch.from_numpy, columns.values()))
    with tempfile.TemporaryDirectory() as scratch:
        data = {n: opened(p, Path(scratch) / "c") for n, p in files(Path(scratch), columns).items()}
        subjects: dict[str, Callable[[int], Any]] = {
            "take": lambda _: take_fresh(columns["input"], columns["target"]),
            "DataLoader": lambda _: iter(DataLoader(tensors, SIZE, shuffle=True)),
        }
        for name, part in data.items():
            subjects[name] = lambda epoch, part=part: part.batches(epoch, 0)
        streamed = opened(Path(scratch) / "x.frec", Path(scratch) / "c", streaming=True)
        subjects["binary, streaming"] = lambda epoch: streamed.batches(epoch, 0)
        seconds: dict[str, list[float]] = {name: [] for name in subjects}
        for number in range(options.rounds + 1):
            for name, batches in subjects.items():
                begin = time.process_time()
                for _ in islice(batches(number), options.batches):
                    pass
                if number:  # the first round warms the page cache
                    seconds[name].append(time.process_time() - begin)
    limit, loader = seconds["take"], seconds["DataLoader"]
    results = {
        "rounds": options.rounds,
        "batches": options.batches,
        "resumption_in_10_million": resumption(),
        "share_of_limit": {
            name: statistics.median(a / b for a, b in zip(limit, own, strict=True))
            for name, own in seconds.items()
        },
        "times_loader": {
            name: statistics.median(a / b for a, b in zip(loader, own, strict=True))
            for name, own in seconds.items()
        },
    }
    print(json.dumps(results, indent=1))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
