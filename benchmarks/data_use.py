"""First use, memory, shuffling and resumption of `data.file`, each beside what it is judged by.

Ratios of CPU time are medians over interleaved rounds. Memory is anonymous memory of the process
and its children over what they began with, looked at every few milliseconds.

Spec: B7, B17, K5
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import h5py
import numpy as np
import psutil
import torch

from forge_kernel.contract.run_config import RunConfig
from forge_kernel.training.one_process import OneProcess
from forge_plugins.data.file import File
from forge_plugins.data.file_batches import FileData
from forge_plugins.data.file_config import FileConfig
from forge_plugins.data.resumable_epochs import Epochs
from forge_plugins.formats.columns.table import Table
from forge_plugins.formats.format import Reading
from forge_plugins.formats.inspection.quality import assess
from forge_plugins.formats.inspection.quality_scan import ScanResult
from forge_plugins.formats.open_table import open_table
from forge_plugins.formats.readers.fixed_records import write_records

torch.set_num_threads(1)
RECORDS, WIDTH, SIZE = 200_000, 128, 256


class Run:
    seed, strategy, settings = 0, OneProcess(), RunConfig()

    def emit_event(self, *_: Any, **__: Any) -> None: ...


def opened(path: Path, cache: Path, **chosen: Any) -> FileData:
    settings: dict[str, Any] = {
        "batch_size": SIZE,
        "classes": 10,
        "validation_split": 0.0,
        **chosen,
    }
    config = FileConfig(path=str(path), cache_dir=str(cache), **settings)
    data: Any = File(config).make_data(Run())  # type: ignore[arg-type]
    return data


def columns_of(count: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "input": generator.standard_normal((count, WIDTH), dtype=np.float32),
        "target": np.arange(count) * 10 // count,  # in the order of their labels
    }


def write(folder: Path, form: str, columns: dict[str, np.ndarray]) -> Path:
    file = folder / f"x.{form}"
    if form == "frec":
        write_records(file, columns)
    elif form == "pkl":
        file.write_bytes(pickle.dumps(columns))
    elif form == "npz":
        np.savez(file, **columns)
    elif form in ("json", "jsonl"):
        rows = zip(columns["input"].tolist(), columns["target"].tolist(), strict=True)
        lines = [json.dumps({"input": row, "target": target}) for row, target in rows]
        file.write_text(f"[{','.join(lines)}]" if form == "json" else "\n".join(lines))
    else:
        how = {
            "h5": {},
            "chunks.h5": {"chunks": True},
            "gzip.h5": {"compression": "gzip", "compression_opts": 1},
        }[form]
        with h5py.File(file, "w") as made:
            for name, column in columns.items():
                shape = {"chunks": (256, *column.shape[1:])} if how else {}
                made.create_dataset(name, data=column, **{**how, **shape})
    return file


FORMS = ("frec", "h5", "chunks.h5", "gzip.h5", "npz", "pkl", "json", "jsonl")


def first_use(folder: Path, rounds: int) -> dict[str, Any]:
    """A first pass from opening on, beside one over a file that numpy has mapped; opening again."""
    columns = columns_of(RECORDS)
    plain = folder / "plain.bin"
    columns["input"].tofile(plain)
    files = {form: write(folder, form, columns) for form in ("frec", "h5", "chunks.h5")}

    def mapped() -> Iterator[Any]:
        rows = np.asarray(np.memmap(plain, np.float32, "r")).reshape(-1, WIDTH)
        targets = columns["target"]
        order = np.random.default_rng(0).permutation(RECORDS)
        for begin in range(0, RECORDS, SIZE):
            index = order[begin : begin + SIZE]
            yield torch.from_numpy(rows.take(index, 0)), torch.from_numpy(targets.take(index, 0))

    passes: dict[str, list[float]] = {"numpy": []}
    opening: dict[str, list[float]] = {}
    once: dict[str, float] = {}
    for form, file in files.items():
        os.utime(file, (time.time() - 99, time.time() - 99))
        time.sleep(2.1)  # the change of its time must have settled too
        begin = time.perf_counter()
        opened(file, folder / "cache")
        once[form] = time.perf_counter() - begin
    for _ in range(rounds):
        begin = time.process_time()
        for _ in mapped():
            pass
        passes["numpy"].append(time.process_time() - begin)
        for form, file in files.items():
            begin = time.perf_counter()
            data = opened(file, folder / "cache")
            opening.setdefault(form, []).append(time.perf_counter() - begin)
            begin = time.process_time()
            for _ in data.batches(0, 0):
                pass
            passes.setdefault(form, []).append(time.process_time() - begin)
            del data
    return {
        "first_pass_beside_numpy": {
            form: statistics.median(a / b for a, b in zip(passes["numpy"], own, strict=True))
            for form, own in passes.items()
            if form != "numpy"
        },
        "milliseconds_to_open_first": {form: 1000 * value for form, value in once.items()},
        "milliseconds_to_open_again": {
            form: 1000 * statistics.median(own) for form, own in opening.items()
        },
    }


def timed(subjects: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds, of children too."""
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for number in range(rounds + 1):
        for name, subject in subjects.items():
            before = sum(os.times()[:4])
            subject()
            if number:
                seconds[name].append(sum(os.times()[:4]) - before)
    return seconds


def conversion(folder: Path, rounds: int) -> dict[str, Any]:
    """Packed HDF5 into the cache beside slices in the file's order; what quality adds to JSON."""
    columns = columns_of(60_000)
    packed, lines = write(folder, "gzip.h5", columns), write(folder, "jsonl", columns)
    counter = iter(range(10**6))

    def slices() -> None:
        held = np.empty((SIZE, WIDTH), np.float32)
        with h5py.File(packed) as file:
            for begin in range(0, 60_000 - SIZE, SIZE):
                file["input"].read_direct(held, np.s_[begin : begin + SIZE])

    def converted() -> None:
        open_table(packed, cache_dir=folder / f"c{next(counter)}")

    def read() -> Table:
        return open_table(
            lines, "auto", Reading(lenient=True), cache_dir=folder / f"c{next(counter)}"
        )

    def judged() -> None:
        assess(read(), target="class", classes=10)

    seconds = timed({"slices": slices, "gzip": converted, "read": read, "judged": judged}, rounds)  # type: ignore[dict-item]
    ratio = {
        "gzip_beside_slices": ("slices", "gzip"),
        "quality_adds": ("judged", "read"),
    }
    result = {
        name: statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))
        for name, (a, b) in ratio.items()
    }
    return {**result, "quality_adds": result["quality_adds"] - 1}


class Watch:
    """The most anonymous memory of this process and its children while it is open, in megabytes."""

    def __enter__(self) -> Watch:
        self._most, self._stop = 0.0, threading.Event()
        self._base = self._now()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _now(self) -> float:
        total = 0
        for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
            try:  # what a child shares with this process counts once
                text = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii")
            except OSError:
                continue
            total += sum(int(x.split()[1]) for x in text.splitlines() if x.startswith("Pss_Anon"))
        return total / 1024

    def _look(self) -> None:
        while not self._stop.wait(0.01):
            self._most = max(self._most, self._now())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.most = max(0.0, self._most - self._base)


def memory_of(file: Path, cache: Path, small: Path) -> dict[str, float]:
    """In a process of its own: the first opening with its conversion, then an epoch in streaming."""
    for _ in opened(small, cache, streaming=True).batches(0, 0):
        pass  # imports and first buffers
    result = {}
    with Watch() as watch:
        data = opened(file, cache, streaming=True)
    result["opening"] = watch.most
    with Watch() as watch:
        for _ in data.batches(0, 0):
            pass
    result["epoch"] = watch.most
    return result


def memory(folder: Path) -> dict[str, dict[str, float]]:
    columns, few = columns_of(RECORDS), columns_of(600)
    result = {}
    for form in FORMS:
        (folder / "small").mkdir(exist_ok=True)
        words = [str(write(folder, form, columns)), str(folder / f"cache-{form}")]
        words.append(str(write(folder / "small", form, few)))
        done = subprocess.run(
            [sys.executable, __file__, "--memory", *words],
            check=True,
            capture_output=True,
            text=True,
        )
        result[form] = json.loads(done.stdout.splitlines()[-1])
    return result


def chi_squared(order: np.ndarray) -> float:
    """Of the labels in batches, for each degree of freedom; 1 is a perfect shuffle."""
    labels = order * 10 // RECORDS
    lots = labels[: len(labels) // SIZE * SIZE].reshape(-1, SIZE)
    counts = np.stack([(lots == label).sum(1) for label in range(10)], 1)
    return float(((counts - SIZE / 10) ** 2 / (SIZE / 10)).sum() / (len(lots) * 9))


def shuffling(folder: Path) -> dict[str, float]:
    files = {form: write(folder, form, columns_of(RECORDS)) for form in ("frec", "gzip.h5")}
    subjects = {
        "full": opened(files["frec"], folder / "cache"),
        "streaming": opened(files["frec"], folder / "cache", streaming=True),
        "streaming, packed in chunks of 256": opened(
            files["gzip.h5"], folder / "cache", streaming=True
        ),
    }
    return {
        name: chi_squared(np.asarray(data.sampler.training_samples(0, 0, RECORDS)))
        for name, data in subjects.items()
    }


def resumption() -> dict[str, float]:
    """Milliseconds to the next batch from a position amid 10 million samples; bytes of the position."""
    count = 10_000_000
    inputs = np.broadcast_to(np.float32(1), (count, 1))
    config = FileConfig(streaming=True, target="none", batch_size=SIZE)
    seconds = []
    for number in range(9):
        table = Table(Path("memory"), "npy", {"input": inputs}, content="0" * 64)
        data = FileData(table, ScanResult(0.0, count, None, {}, None, None, None), config, 0)
        epochs = Epochs(data)
        state = {**epochs.state_dict(), "epoch": 3, "place": 1_000_000 * number}
        begin = time.perf_counter()
        epochs.load_state_dict(state)
        next(iter(epochs))
        seconds.append(time.perf_counter() - begin)
    return {
        "milliseconds": 1000 * statistics.median(seconds[1:]),
        "bytes": len(json.dumps(state)),
    }


def start() -> float:
    """CPU seconds that the data part takes to import beside torch and numpy."""
    programs = {
        "torch": "import torch",
        "data": "import torch\nimport forge_plugins.data.file_batches, forge_plugins.formats.open_table, "
        "forge_plugins.formats.inspection.quality_scan, forge_plugins.data.file",
    }
    result: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(7):
        for name, program in programs.items():
            before = os.times()
            subprocess.run([sys.executable, "-c", program], check=True)
            after = os.times()
            result[name].append(after[2] + after[3] - before[2] - before[3])
    return statistics.median(
        data - torch_only for data, torch_only in zip(result["data"], result["torch"], strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--memory", type=Path, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        print(json.dumps(memory_of(*options.memory)))
        return
    results: dict[str, Any] = {"rounds": options.rounds}
    parts: dict[str, Callable[[Path], Any]] = {
        "first_use": lambda folder: first_use(folder, options.rounds),
        "conversion": lambda folder: conversion(folder, options.rounds),
        "megabytes": memory,
        "chi_squared": shuffling,
    }
    for name, part in parts.items():
        with tempfile.TemporaryDirectory() as scratch:
            results[name] = part(Path(scratch))
    results["resumption_in_10_million"] = resumption()
    results["seconds_to_import_over_torch"] = start()
    print(json.dumps(results, indent=1))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
