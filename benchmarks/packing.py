"""Packing of ternary levels: fp32-equivalent gigabytes in a second of CPU time, one thread.

A matrix of 4096 x 4096 levels; medians of interleaved rounds. The blocks of llama.cpp are also
compared, bytes and time, with the package `gguf`, which starts from dequantised fp32 weights.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gguf
import numpy
import torch

from forge_plugins.interchange.ternary_blocks import pack_blocks, unpack_blocks
from forge_plugins.mathematics.quantization import packing

torch.set_num_threads(1)
SIZE, SCALE = 4096, 0.0371


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    levels = torch.randint(-1, 2, (SIZE, SIZE), dtype=torch.int8)
    weights = levels.numpy().astype(numpy.float32) * numpy.float32(SCALE)
    two, three = packing.pack_two_bits(levels), packing.pack_base_three(levels)
    blocks = {kind: pack_blocks(levels, SCALE, kind) for kind in ("tq2_0", "tq1_0")}
    types = {kind: gguf.GGMLQuantizationType[kind.upper()] for kind in blocks}
    subjects: dict[str, Callable[[], Any]] = {
        "2 bits, pack": lambda: packing.pack_two_bits(levels),
        "2 bits, unpack": lambda: packing.unpack_two_bits(two, (SIZE, SIZE)),
        "base 3, pack": lambda: packing.pack_base_three(levels),
        "base 3, unpack": lambda: packing.unpack_base_three(three, (SIZE, SIZE)),
        "TQ2_0, pack": lambda: pack_blocks(levels, SCALE, "tq2_0"),
        "TQ2_0, unpack": lambda: unpack_blocks(blocks["tq2_0"], SIZE, "tq2_0"),
        "TQ2_0, pack, package gguf": lambda: gguf.quants.quantize(weights, types["tq2_0"]),
        "TQ1_0, pack": lambda: pack_blocks(levels, SCALE, "tq1_0"),
        "TQ1_0, unpack": lambda: unpack_blocks(blocks["tq1_0"], SIZE, "tq1_0"),
        "TQ1_0, pack, package gguf": lambda: gguf.quants.quantize(weights, types["tq1_0"]),
    }
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for number in range(options.rounds + 1):
        for name, call in subjects.items():
            begin = time.process_time()
            call()
            if number:
                times[name].append(time.process_time() - begin)
    results: dict[str, Any] = {
        "gigabytes": {
            name: SIZE * SIZE * 4 / statistics.median(result) / 1e9
            for name, result in times.items()
        },
        "times_the_package": {
            kind: statistics.median(
                b / a
                for a, b in zip(
                    times[f"{kind}, pack"], times[f"{kind}, pack, package gguf"], strict=True
                )
            )
            for kind in ("TQ2_0", "TQ1_0")
        },
        "bytes_equal": all(
            numpy.array_equal(gguf.quants.quantize(weights, types[kind]), blocks[kind].numpy())
            for kind in blocks
        ),
    }
    print("fp32-equivalent GB/s (median):\n")
    for name, value in results["gigabytes"].items():
        print(f"  {name:<30} {value:6.1f}")
    print(f"\ntimes as fast as the package gguf: {results['times_the_package']}")
    print(f"the same bytes: {results['bytes_equal']}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
