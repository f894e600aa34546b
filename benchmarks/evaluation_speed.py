"""Cost of one evaluated linear layer, as a ratio to nn.Linear.

    python benchmarks/evaluation_speed.py [--rounds 21] [--json FILE]

Without gradients, in evaluation mode, one thread, CPU time; all variants interleaved in one process, the
figure is the median over rounds of the ratio to that round's nn.Linear. `quantized each time` is the layer
as it was before it kept its quantized weight. The goal is 1.3 at one row of width 2048.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

from forge_plugins.mathematics.quantization.bit_linear import BitLinear
from forge_plugins.mathematics.quantization.scheme import Scheme

torch.set_num_threads(1)
GOAL = 1.3
WIDTHS, ROWS = (512, 2048), (1, 64)
INSTRUCTIONS = ("avx2", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16")


def variants(width: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """The layers by name, all with one weight."""
    linear = nn.Linear(width, width, bias=False).eval()
    exact = BitLinear.from_linear(linear).eval()
    int8 = BitLinear.from_linear(linear, Scheme(arithmetic="int8")).eval()
    forgetful = BitLinear.from_linear(linear).eval()

    def each_time(input: Tensor) -> Tensor:
        forgetful.invalidate()
        return forgetful(input)  # type: ignore[no-any-return]

    return {"nn.Linear": linear, "exact": exact, "int8": int8, "quantized each time": each_time}


def seconds(layer: Callable[[Tensor], Tensor], input: Tensor, calls: int) -> float:
    begin = time.process_time()
    for _ in range(calls):
        layer(input)
    return time.process_time() - begin


def measured(width: int, rows: int, rounds: int) -> dict[str, float]:
    """Median ratio to nn.Linear by variant."""
    layers, input = variants(width), torch.randn(rows, width)
    calls = max(4, round(2e8 / (width * width * rows * 2)))
    ratios: dict[str, list[float]] = {name: [] for name in layers}
    with torch.no_grad():
        for layer in layers.values():
            layer(input)
        for _ in range(rounds):
            taken = {name: seconds(layer, input, calls) for name, layer in layers.items()}
            for name, value in taken.items():
                ratios[name].append(value / taken["nn.Linear"])
    return {name: statistics.median(values) for name, values in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    features = torch.cpu.get_capabilities()
    results: dict[str, object] = {
        "processor": {
            "name": features.get("cpu_name"),
            "features": [name for name in INSTRUCTIONS if features.get(name)],
        }
    }
    print(results["processor"])
    for width in WIDTHS:
        for rows in ROWS:
            table = measured(width, rows, options.rounds)
            results[f"{width} x {width}, {rows} rows"] = table
            shown = "  ".join(f"{name} {ratio:.2f}" for name, ratio in table.items())
            print(f"{width} x {width}, {rows:2} rows: {shown}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
