"""A training step on the grokking task: answer positions only, against all positions.

The loss of modular arithmetic reads one position of four. Told so (`Batch.positions`), the model
computes queries, perceptron, norm and head of its last block for that position alone. Both sides
are the same function of the same weights; gradients are compared. CPU time, one thread, medians of
interleaved rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch.nn.functional import cross_entropy

from forge_plugins.mathematics.networks.modular_arithmetic import operation_table
from forge_plugins.mathematics.networks.transformer import Decoder
from forge_plugins.mathematics.quantization.conversion import convert_linears

torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    tokens, answers = operation_table("mul", 97)
    chosen = torch.randperm(len(answers), generator=torch.Generator().manual_seed(0))[:512]
    inputs, targets = tokens[chosen], answers[chosen]
    results: dict[str, float] = {}
    for name in ("fp32", "ternary"):
        torch.manual_seed(0)
        model = Decoder(vocabulary=99, classes=97, length=4)
        if name == "ternary":
            convert_linears(model, lambda layer: layer != "head")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        gradients = {}

        def step(everywhere: bool) -> float:
            begin = time.process_time()
            logits = model(inputs)[:, -1] if everywhere else model(inputs, slice(-1, None))[:, 0]  # noqa: B023
            cross_entropy(logits, targets).backward()
            spent = time.process_time() - begin
            gradients[everywhere] = [p.grad.clone() for p in model.parameters()]  # noqa: B023
            begin = time.process_time()
            optimizer.step()  # noqa: B023
            optimizer.zero_grad()  # noqa: B023
            return spent + time.process_time() - begin

        state = {key: value.clone() for key, value in model.state_dict().items()}
        for everywhere in (True, False):
            model.load_state_dict(state)
            step(everywhere)
        pairs = zip(gradients[True], gradients[False], strict=True)
        far = max(float((a - b).abs().max()) for a, b in pairs)
        ratios = []
        for number in range(options.rounds):
            order = (True, False) if number % 2 else (False, True)
            spent = {everywhere: step(everywhere) for everywhere in order}
            ratios.append(spent[True] / spent[False])
        results[name] = statistics.median(ratios)
        print(
            f"{name}: all positions cost {results[name]:.2f} x the answer position alone "
            f"(largest difference of a gradient {far:.1e})"
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
