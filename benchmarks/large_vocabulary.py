"""Cross-entropy over 32,000 tokens: all logits at once, and in pieces (loss: language_model).

Forward and backward of head and loss for 2,048 tokens of width 256. CPU time as a ratio, both
interleaved in one process, one thread, median of the rounds; peak memory by a process of its own
for each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn
from torch.nn import functional

from forge_plugins.mathematics.losses.chunked_cross_entropy import chunked_cross_entropy

TOKENS, WIDTH, VOCABULARY, PIECE = 2048, 256, 32_000, 512
NAMES = ("all at once", "in pieces")


def step_of(name: str) -> object:
    """A closure that computes loss and gradients once."""
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=False)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    targets = torch.randint(VOCABULARY, (TOKENS,))

    def step() -> float:
        hidden.grad = head.weight.grad = None
        begin = time.process_time()
        if name == "all at once":
            loss = functional.cross_entropy(head(hidden), targets)
        else:
            loss = chunked_cross_entropy(hidden, targets, head, piece=PIECE)
        loss.backward()
        return time.process_time() - begin

    return step


def peak_resident() -> float:
    """The process's largest resident size so far, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return float(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmHWM: this part needs Linux")


def peak_of(name: str) -> float:
    """MiB that steps add, at their peak, to what stands before the first."""
    command = [sys.executable, __file__, "--peak", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        step = step_of(options.peak)
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins anew
        before = peak_resident()
        for _ in range(2):
            step()  # type: ignore[operator]
        print(peak_resident() - before)
        return
    steps = {name: step_of(name) for name in NAMES}
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    for number in range(options.rounds + 1):
        for name, step in steps.items():
            spent = step()  # type: ignore[operator]
            if number:
                times[name].append(spent)
    ratio = statistics.median(
        ours / theirs for ours, theirs in zip(times[NAMES[1]], times[NAMES[0]], strict=True)
    )
    peaks = {name: peak_of(name) for name in NAMES}
    result = {"time_ratio": ratio, "peak_mib": peaks, "logits_mib": TOKENS * VOCABULARY * 4 / 2**20}
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
