"""What the hashing of a checkpoint costs, beside what `torch.save` of the same tensors costs.

CPU time of this process, interleaved rounds. The tensors' bytes are written a block at a time, as a
checkpoint's are, once with the hash and once without: the difference of each round, of which the
median is given, is the cost; SHA-256 stands beside it. Goal: at most a tenth.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import xxhash

from forge_kernel.storage.hashes import BLOCK

torch.set_num_threads(1)
GOAL = 0.10
FLAGS = ("avx2", "avx512f", "sha_ni")


def cpu_seconds(work: Callable[[], Any]) -> float:
    before = time.process_time()
    work()
    return time.process_time() - before


def processor() -> dict[str, Any]:
    """Its name and those of its instruction sets that hashes use."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {"name": "unknown", "sets": []}
    facts = {key.strip(): value for key, _, value in (line.partition(": ") for line in lines)}
    flags = facts.get("flags", "").split()
    return {"name": facts.get("model name", "unknown"), "sets": [f for f in FLAGS if f in flags]}


def measure(megabytes: int, rounds: int) -> dict[str, float]:
    """The cost of each hash, and of the writing alone, as a share of `torch.save`."""
    count = max(1, megabytes // 4)
    tensors = {f"layer.{n}.weight": torch.randn(1024, 1024) for n in range(count)}
    views = [tensor.view(-1).view(torch.uint8).numpy().data for tensor in tensors.values()]

    def written(file: Path, make: Callable[[], Any] | None) -> None:
        digest = make() if make else None
        with file.open("xb", buffering=0) as stream:
            for view in views:
                for start in range(0, len(view), BLOCK):
                    if digest is not None:
                        digest.update(view[start : start + BLOCK])
                    stream.write(view[start : start + BLOCK])

    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "file"
        subjects: dict[str, Callable[[], Any]] = {
            "torch_save": lambda: torch.save(tensors, file),
            "writing": lambda: written(file, None),
            "xxh3_128": lambda: written(file, xxhash.xxh3_128),
            "sha256": lambda: written(file, hashlib.sha256),
        }
        for number in range(rounds + 1):
            for name, work in subjects.items():
                file.unlink(missing_ok=True)
                spent = cpu_seconds(work)
                if number:  # the first fills caches
                    times.setdefault(name, []).append(spent)
    base = statistics.median(times["torch_save"])
    hashes = {
        name: statistics.median(a - b for a, b in zip(times[name], times["writing"], strict=True))
        for name in ("xxh3_128", "sha256")
    }
    return {
        name: cost / base
        for name, cost in {"writing": statistics.median(times["writing"]), **hashes}.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    result: dict[str, Any] = {"processor": processor(), "shares": {}}
    for megabytes in options.megabytes:
        shares = measure(megabytes, options.rounds)
        result["shares"][str(megabytes)] = shares
        print(
            f"{megabytes:4} MiB: XXH3-128 {shares['xxh3_128']:.1%} of torch.save's CPU time "
            f"(goal: {GOAL:.0%}), SHA-256 {shares['sha256']:.1%}; writing {shares['writing']:.1%}"
        )
    sets = ", ".join(result["processor"]["sets"])
    print(f"{result['processor']['name']} ({sets})")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
