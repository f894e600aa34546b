"""Memory and time of learning from a teacher over a large vocabulary: in pieces, and all at once.

A head of 49,152 classes over 2,048 rows of width 576 (SmolLM2), forward and backward. Memory: the
growth of the process's peak beside both heads' weights and gradients, in logits of 512 rows of both
(2 x 512 x classes x 4 bytes); a fresh process each. Time: CPU time of one thread, as a ratio to the
whole logits' (the median of interleaved rounds, after one that does not count).
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
from torch import Tensor, nn
from torch.nn import functional

from forge_plugins.mathematics.losses.chunked_distillation import (
    LossFactors,
    chunked_distillation,
    top_answers,
)
from forge_plugins.mathematics.losses.distillation import divergences

torch.set_num_threads(1)
CLASSES, WIDTH, ROWS, KEPT = 49_152, 576, 2_048, 64
UNIT = 2 * 512 * CLASSES * 4
FACTORS = LossFactors(target=0.5, teacher=0.5, temperature=2.0)


class Subject:
    """One way to the same gradients."""

    def __init__(self, way: str) -> None:
        torch.manual_seed(0)
        self.way = way
        self.student, self.teacher = (nn.Linear(WIDTH, CLASSES, bias=False) for _ in range(2))
        self.hidden = torch.randn(ROWS, WIDTH, requires_grad=True)
        self.theirs = torch.randn(ROWS, WIDTH)
        self.targets = torch.randint(CLASSES, (ROWS,))
        for parameter in (self.student.weight, self.hidden):
            parameter.grad = torch.zeros_like(parameter)
        if way == "cache":
            with torch.no_grad():
                parts = [top_answers(self.teacher(part), KEPT, 2.0)
                         for part in torch.split(self.theirs, 64)]  # fmt: skip
            self.kept = [torch.cat(each) for each in zip(*parts, strict=True)]

    def answers(self, rows: slice) -> Tensor:
        return self.teacher(self.theirs[rows])  # type: ignore[no-any-return]

    def step(self) -> None:
        if self.way == "whole":
            logits = self.student(self.hidden)
            with torch.no_grad():
                answers = self.teacher(self.theirs)
            entropy = functional.cross_entropy(logits, self.targets)
            loss = 0.5 * entropy + 0.5 * divergences(logits, answers, 2.0).mean()
        elif self.way == "cache":
            top = type(top_answers(torch.zeros(1, 2), 1, 1.0))
            loss = chunked_distillation(
                self.hidden, self.targets, self.student,
                lambda rows: top(*(part[rows] for part in self.kept)), FACTORS,
            ).loss  # fmt: skip
        else:
            loss = chunked_distillation(
                self.hidden, self.targets, self.student, self.answers, FACTORS
            ).loss
        loss.backward()  # type: ignore[no-untyped-call]


def resident(field: str) -> int:
    """A size of this process in bytes, as Linux tells it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def growth(way: str) -> int:
    """Of the peak in a step, beside what was there before it and the head's gradient."""
    subject = Subject(way)
    begin = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    subject.step()
    return resident("VmHWM") - begin - CLASSES * WIDTH * 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(json.dumps(growth(options.memory_of)))
        return
    ways = ("whole", "pieces", "cache")
    subjects = {way: Subject(way) for way in ways}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(options.rounds + 1):
        for way in ways[number % 3 :] + ways[: number % 3]:
            begin = time.process_time()
            subjects[way].step()
            times[way].append(time.process_time() - begin)
    for way in ways:
        command = [sys.executable, __file__, "--memory-of", way]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        pairs = zip(times[way][1:], times["whole"][1:], strict=True)
        ratio = statistics.median(one / two for one, two in pairs)
        print(f"{way:<8} memory {int(done.stdout) / UNIT:.2f}  time {ratio:.2f}")


if __name__ == "__main__":
    main()
