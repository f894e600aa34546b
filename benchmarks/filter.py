"""Cost of the Grokfast filter on 25 million fp32 parameters, beside the memory floor.

The filter must read gradient and average and write both: four passes over the parameters' size.
The floor is measured in place (`mul_`, two passes) in the same rounds. One thread, CPU time,
medians of interleaved rounds; the extra memory is the growth of the peak resident size.

Then the filter and AdamW as one update (`optimizer: {use: grokfast_adamw}`) beside the two apart.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from forge_plugins.mathematics.grokfast.filters import SlowGradient, Window, filter_ema, filter_ma
from forge_plugins.mathematics.optimizers.grokfast_adamw import GrokfastAdamW

torch.set_num_threads(1)


def parameters() -> list[torch.Size]:
    """Shapes of a decoder of 25,205,760 parameters (width 512, 8 blocks)."""
    width, shapes = 512, []
    for _ in range(8):
        shapes += [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
        shapes += [(width,)] * 3
    count = sum(torch.Size(shape).numel() for shape in shapes)
    shapes.append((25_205_760 - count,))
    return [torch.Size(shape) for shape in shapes]


def published(gradients: list[torch.Tensor], means: list[torch.Tensor]) -> None:
    """The published code: all out of place."""
    for index, gradient in enumerate(gradients):
        means[index] = means[index] * 0.98 + gradient * 0.02
        gradient.data = gradient + means[index] * 2.0


def fused_updates(shapes: list[torch.Size], rounds: int) -> dict[str, float]:
    """Filter and AdamW (fused kernel) as one, as a ratio to the two apart; interleaved."""
    options: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.98)}

    def side() -> list[torch.nn.Parameter]:
        torch.manual_seed(0)
        result = [torch.nn.Parameter(torch.randn(shape) * 0.02) for shape in shapes]
        for parameter in result:
            parameter.grad = torch.randn(parameter.shape) * 0.01
        return result

    ours, pieces, theirs = side(), side(), side()
    slow = [SlowGradient(torch.zeros_like(parameter)) for parameter in theirs]
    adamw = torch.optim.AdamW(theirs, fused=True, **options)
    compiled = GrokfastAdamW(ours, compiled=True, **options)
    plain = GrokfastAdamW(pieces, **options)

    def apart() -> None:
        gradients = [p.grad for p in theirs if p.grad is not None]
        filter_ema(gradients, slow, alpha=0.98, lambda_reg=2.0)
        adamw.step()

    subjects = {"apart": apart, "compiled": compiled.step, "not compiled": plain.step}
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for number in range(rounds + 2):
        for name, call in subjects.items():
            for side_ in (ours, pieces, theirs):
                for parameter in side_:
                    assert parameter.grad is not None
                    parameter.grad.fill_(0.01)
            spent = timed(call)
            if number > 1:
                times[name].append(spent)
    return {
        f"filter and AdamW as one, {name}": statistics.median(
            a / b for a, b in zip(times[name], times["apart"], strict=True)
        )
        for name in ("compiled", "not compiled")
    }


def timed(call: object) -> float:
    begin = time.process_time()
    call()  # type: ignore[operator]
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    shapes = parameters()
    gradients = [torch.randn(shape) for shape in shapes]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    slow = [SlowGradient(torch.zeros(shape)) for shape in shapes]
    ours = lambda: filter_ema(gradients, slow, alpha=0.98, lambda_reg=2.0)  # noqa: E731
    for _ in range(3):
        ours()
        for gradient in gradients:
            gradient.normal_()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    means = [torch.zeros(shape) for shape in shapes]
    short = [Window(gradient, 4) for gradient in gradients]
    long = [Window(gradient, 16) for gradient in gradients]
    subjects = {
        "floor: four passes in place": lambda: [
            tensor.mul_(1.0) for tensor in (*gradients, *(memory.mean for memory in slow))
        ],
        "EMA filter": ours,
        "EMA filter, published code": lambda: published(gradients, means),
        "MA filter, window 4": lambda: filter_ma(gradients, short, lambda_reg=5.0),
        "MA filter, window 16": lambda: filter_ma(gradients, long, lambda_reg=5.0),
    }
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for number in range(options.rounds + 1):
        for name, call in subjects.items():
            for gradient in gradients:
                gradient.fill_(0.5)
            spent = timed(call)
            if number:
                times[name].append(spent)
    floor = times["floor: four passes in place"]
    results = {
        name: statistics.median(a / b for a, b in zip(values, floor, strict=True))
        for name, values in times.items()
    }
    size = sum(shape.numel() for shape in shapes) * 4 / 1024
    results["extra memory of the EMA filter, parameter sizes"] = grown / size
    results.update(fused_updates(shapes, options.rounds))
    print("ratio to the four-pass floor (median); filter and AdamW: to the two apart\n")
    for name, value in results.items():
        print(f"  {name:<50} {value:5.2f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
