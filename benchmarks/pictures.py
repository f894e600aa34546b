"""`data.image_folder` beside a bare Pillow loop (first pass) and the gather limits (after it).

4,000 JPEG pictures of 64 x 64 in colours, read into batches of 64. The first pass reads, keeps and
hashes them: CPU time of this process and its children, the page cache warm. After it, batches come
from the kept bytes; the limits are one numpy `take` a batch of the same bytes into memory that is
used again, that followed by torch's conversion to float32, scaled in place, which any loader of bytes
has to do, and a `take` of the same pictures kept as float32. Rounds are interleaved, figures are medians of the ratios within a round.

Spec: B17
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from PIL import Image

from forge_kernel.contract.run_config import RunConfig
from forge_kernel.training.one_process import OneProcess
from forge_plugins.data.image_folder import ImageFolder
from forge_plugins.data.image_folder_config import ImageFolderConfig

torch.set_num_threads(1)
COUNT, SIDE, SIZE = 4000, 64, 64


class Run:
    seed, strategy, settings, folder = 0, OneProcess(), RunConfig(), None

    def emit_event(self, *_: Any, **__: Any) -> None: ...


def write(folder: Path) -> list[Path]:
    draws = np.random.default_rng(0)
    files = []
    for at in range(COUNT):
        file = folder / str(at % 4) / f"{at:05}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(draws.integers(0, 256, (8, 8, 3)).astype(np.uint8))
        coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file, quality=90)
        files.append(file)
    return files


def opened(folder: Path, cache: Path) -> Any:
    config = ImageFolderConfig(
        path=str(folder), cache_dir=str(cache), validation_split=0.0, batch_size=SIZE
    )
    return ImageFolder(config).make_data(Run())  # type: ignore[arg-type]


def cpu(work: Callable[[], Any]) -> float:
    begin = os.times()
    work()
    end = os.times()
    return sum(end[:4]) - sum(begin[:4])


def bare(files: list[Path]) -> np.ndarray:
    pictures = []
    for file in files:
        with Image.open(file) as picture:
            pictures.append(np.asarray(picture.convert("RGB")))
    return np.stack(pictures)


def first_pass(folder: Path, files: list[Path], rounds: int) -> float:
    shares = []
    for _ in range(rounds):
        cache = folder.parent / "fresh"
        shutil.rmtree(cache, ignore_errors=True)
        limit = cpu(lambda: bare(files))
        shares.append(limit / cpu(lambda cache=cache: opened(folder, cache)))
    return statistics.median(shares)


def later(folder: Path, rounds: int) -> dict[str, float]:
    data = opened(folder, folder.parent / "cache")
    column = np.asarray(data.table.columns["input"])
    held = np.empty((SIZE, *column.shape[1:]), np.uint8)
    floats = torch.empty((SIZE, *column.shape[1:]))
    wide = column.astype(np.float32)

    def take(*, widen: bool) -> None:
        order = np.random.default_rng(0).permutation(COUNT)
        for begin in range(0, COUNT - SIZE, SIZE):
            np.take(column, order[begin : begin + SIZE], 0, held, "clip")
            if widen:
                floats.copy_(torch.from_numpy(held)).mul_(0.01).add_(-1.0)

    def take_floats() -> None:
        order = np.random.default_rng(0).permutation(COUNT)
        for begin in range(0, COUNT - SIZE, SIZE):
            np.take(wide, order[begin : begin + SIZE], 0, floats.numpy(), "clip")

    def timed(work: Callable[[], Any]) -> float:
        begin = time.process_time()
        work()
        return time.process_time() - begin

    names = ("of a take of bytes", "of bytes made floats", "of a take of floats")
    shares: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        own = timed(lambda number=number: [None for _ in data.batches(number, 0)])
        limits = (
            timed(lambda: take(widen=False)), timed(lambda: take(widen=True)), timed(take_floats)
        )  # fmt: skip
        if number:
            for name, limit in zip(shares, limits, strict=True):
                shares[name].append(limit / own)
    return {name: statistics.median(values) for name, values in shares.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "pictures"
        files = write(folder)
        results = {
            "rounds": options.rounds,
            "first_pass_share_of_bare_pillow": first_pass(folder, files, options.rounds),
            "later_share_of_limit": later(folder, options.rounds),
        }
    print(json.dumps(results, indent=1))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
