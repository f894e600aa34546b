"""Shuffled batches of 256 from 200,000 x 128 float32: `data.file` beside its limits and its peers.

The limit is one numpy `take` a batch from memory into memory that is used again. CPU time of a
batch; rounds are interleaved, figures are medians of the ratios within a round. Tokens: 32 random
windows of 1024 of 50 million uint16.

Spec: B17, K5
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import h5py
import numpy as np
import torch
from data_peers import Batches, peers
from safetensors.numpy import save_file

from forge_kernel.contract.run_config import RunConfig
from forge_kernel.training.one_process import OneProcess
from forge_plugins.data.file import File
from forge_plugins.data.file_batches import FileData
from forge_plugins.data.file_config import FileConfig
from forge_plugins.data.text_batches import TokenSequences
from forge_plugins.data.text_config import TextConfig
from forge_plugins.formats.readers.fixed_records import write_records
from forge_plugins.mathematics.text.tokenizers import ByteTokenizer

torch.set_num_threads(1)
RECORDS, WIDTH, SIZE = 200_000, 128, 256
TOKENS, LENGTH, WINDOWS = 50_000_000, 1024, 32
LIMIT, FRESH, LOADER = "limit", "take into fresh memory", "DataLoader, sample by sample"


class Run:
    seed, strategy, settings, folder = 0, OneProcess(), RunConfig(), None

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


def limit(columns: dict[str, np.ndarray]) -> Batches:
    held = {name: np.empty((SIZE, *c.shape[1:]), c.dtype) for name, c in columns.items()}

    def batches(epoch: int) -> Iterator[Any]:
        order = np.random.default_rng(epoch).permutation(RECORDS)
        for begin in range(0, RECORDS - SIZE, SIZE):
            for name, column in columns.items():
                np.take(column, order[begin : begin + SIZE], 0, held[name], "clip")
            yield held

    return batches


def take_fresh(file: Path, kind: np.dtype[Any]) -> Batches:
    mapped = np.asarray(np.memmap(file, kind, "r"))
    plain = np.asarray(np.memmap(file.with_suffix(".inputs"), np.float32, "r")).reshape(-1, WIDTH)

    def batches(epoch: int) -> Iterator[Any]:
        order = np.random.default_rng(epoch).permutation(RECORDS)
        targets = np.ascontiguousarray(mapped["target"])
        for begin in range(0, RECORDS, SIZE):
            index = order[begin : begin + SIZE]
            yield torch.from_numpy(plain.take(index, 0)), torch.from_numpy(targets.take(index, 0))

    return batches


def hdf5(file: Path, columns: dict[str, np.ndarray], **how: Any) -> None:
    with h5py.File(file, "w") as opened_file:
        for name, column in columns.items():
            chunks = {"chunks": (256, *column.shape[1:])} if how else {}
            opened_file.create_dataset(name, data=column, **{**how, **chunks})


def files(folder: Path, columns: dict[str, np.ndarray]) -> dict[str, Path]:
    """One file of each format, from all of which the same batches come."""
    result = {
        "binary": folder / "x.frec", "safetensors": folder / "x.safetensors",
        "npz": folder / "x.npz", "HDF5": folder / "x.h5", "HDF5, chunks in place": folder / "y.h5",
        "HDF5, gzip": folder / "z.h5", "pickle": folder / "x.pkl", "JSON": folder / "x.json",
        "JSON Lines": folder / "x.jsonl",
    }  # fmt: skip
    write_records(result["binary"], columns)
    save_file(columns, result["safetensors"])
    np.savez(result["npz"], **columns)
    hdf5(result["HDF5"], columns)
    hdf5(result["HDF5, chunks in place"], columns, shuffle=False, compression=None)
    hdf5(result["HDF5, gzip"], columns, compression="gzip", compression_opts=1, shuffle=True)
    result["pickle"].write_bytes(pickle.dumps(columns))
    rows = zip(columns["input"].tolist(), columns["target"].tolist(), strict=True)
    lines = [json.dumps({"input": row, "target": target}) for row, target in rows]
    result["JSON"].write_text(f"[{','.join(lines)}]")
    result["JSON Lines"].write_text("\n".join(lines))
    try:
        import pyarrow
        import pyarrow.csv
        import pyarrow.parquet
    except ImportError:
        return result
    flat = pyarrow.FixedSizeListArray.from_arrays(columns["input"].reshape(-1), WIDTH)
    table = pyarrow.table({"input": flat, "target": columns["target"]})
    pyarrow.parquet.write_table(table, folder / "x.parquet")
    wide = {f"x{at}": columns["input"][:, at] for at in range(WIDTH)}
    named = pyarrow.table({**wide, "target": columns["target"]})
    pyarrow.csv.write_csv(named, folder / "x.csv")
    return {**result, "Parquet": folder / "x.parquet", "CSV": folder / "x.csv"}


def sequential(file: Path) -> Batches:
    """HDF5's own way: slices in the file's order into memory that is used again."""

    def batches(_: int) -> Iterator[Any]:
        held = np.empty((SIZE, WIDTH), np.float32)
        with h5py.File(file) as opened_file:
            inputs, targets = opened_file["input"], opened_file["target"][:]
            for begin in range(0, RECORDS - SIZE, SIZE):
                inputs.read_direct(held, np.s_[begin : begin + SIZE])
                yield held, targets[begin : begin + SIZE]

    return batches


def timed(
    subjects: dict[str, Batches], count: Callable[[str], int], rounds: int
) -> dict[str, list[float]]:
    """CPU seconds of a batch, by subject and round; whole epochs follow each other."""
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    endless = {
        name: chain.from_iterable(map(make, range(10**6))) for name, make in subjects.items()
    }
    for number in range(rounds + 1):
        for name, batches in endless.items():
            wanted = count(name)
            begin = time.process_time()
            result = sum(1 for _ in islice(batches, wanted))
            if number:  # the first round warms the page cache
                seconds[name].append((time.process_time() - begin) / result)
    return seconds


def ratios(seconds: dict[str, list[float]], to: str) -> dict[str, float]:
    """How many times as fast as another subject, each round by itself."""
    return {
        name: statistics.median(a / b for a, b in zip(seconds[to], own, strict=True))
        for name, own in seconds.items()
    }


def samples(options: argparse.Namespace) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    columns = {
        "input": generator.standard_normal((RECORDS, WIDTH), dtype=np.float32),
        "target": generator.integers(0, 10, RECORDS),
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        columns["input"].tofile(folder / "x.inputs")
        mixed = np.zeros(RECORDS, [("target", "<i8")])
        mixed["target"] = columns["target"]
        mixed.tofile(folder / "x.raw")
        subjects = {LIMIT: limit(columns), FRESH: take_fresh(folder / "x.raw", mixed.dtype)}
        result, cache = files(folder, columns), folder / "cache"
        ours = {name: opened(path, cache) for name, path in result.items()}
        for name in ("binary", "HDF5", "HDF5, chunks in place", "HDF5, gzip"):
            ours[f"{name}, streaming"] = opened(result[name], cache, streaming=True)
        for name, part in ours.items():
            subjects[name] = lambda epoch, part=part: part.batches(epoch, 0)
        subjects["HDF5, gzip, sequential slices of h5py"] = sequential(result["HDF5, gzip"])
        other = peers(columns, SIZE, folder)

        def count(name: str) -> int:
            return min(options.batches, 12) if name in other else options.batches

        seconds = timed({**subjects, **other}, count, options.rounds)
    return {
        "peers": sorted(other),
        "share_of_limit": ratios(seconds, LIMIT),
        "share_of_fresh": ratios(seconds, FRESH)["binary"],
        "shares_of_fresh": ratios(seconds, FRESH),
        "times_loader": ratios(seconds, LOADER),
        "gzip_beside_slices": ratios(seconds, "HDF5, gzip, sequential slices of h5py")[
            "HDF5, gzip, streaming"
        ],
    }


def tokens(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "tokens.bin"
        np.random.default_rng(0).integers(0, 50_000, TOKENS, dtype=np.uint16).tofile(file)
        row = np.memmap(file, np.uint16, "r")
        held = np.empty((WINDOWS, LENGTH + 1), np.uint16)
        views = np.lib.stride_tricks.sliding_window_view(np.asarray(row), LENGTH + 1)

        def starts(epoch: int) -> Iterator[np.ndarray]:
            generator = np.random.default_rng(epoch)
            for _ in range(1000):
                yield generator.integers(0, TOKENS - LENGTH - 1, WINDOWS)

        def reused(epoch: int) -> Iterator[Any]:
            for begins in starts(epoch):
                for at, begin in enumerate(begins.tolist()):
                    held[at] = views[begin]
                yield held

        def common(epoch: int) -> Iterator[Any]:
            for begins in starts(epoch):
                x = torch.stack(
                    [torch.from_numpy(row[i : i + LENGTH].astype(np.int64)) for i in begins]
                )
                y = torch.stack(
                    [torch.from_numpy(row[i + 1 : i + 1 + LENGTH].astype(np.int64)) for i in begins]
                )
                yield x, y

        config = TextConfig(sequence_length=LENGTH, batch_size=WINDOWS)
        made = TokenSequences(row, row[: 2 * LENGTH], config, 0, ByteTokenizer())

        def unwidened(epoch: int) -> Iterator[Any]:
            for begin in range(0, made.spec.samples or 0, WINDOWS):
                yield made._training.rows(made.starts(epoch, begin, begin + WINDOWS))

        raw = opened(
            file, Path(scratch) / "cache", format="tokens", length=LENGTH, batch_size=WINDOWS,
            input="tokens", target="next", vocabulary=50_000, classes=None,
        )  # fmt: skip
        subjects: dict[str, Batches] = {
            LIMIT: reused, "the common loop": common,
            "data.text, int64": lambda epoch: made.batches(epoch, 0),
            "data.text, rows of uint16": unwidened,
            "data.file, int64": lambda epoch: raw.batches(epoch, 0),
        }  # fmt: skip
        seconds = timed(subjects, lambda _: options.batches, options.rounds)
    return {
        "share_of_limit": ratios(seconds, LIMIT),
        "times_common": ratios(seconds, "the common loop"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=400)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    results = {
        "rounds": options.rounds,
        "batches": options.batches,
        "samples": samples(options),
        "tokens": tokens(options),
    }
    print(json.dumps(results, indent=1))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
