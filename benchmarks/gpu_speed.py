"""Cost of a training step with BitNet layers on a GPU, as a ratio to the same network with nn.Linear.

Llama-like blocks as in `bitnet_speed.py`, wider; sequences of 2048, fp32 latent weights under bf16
autocast, fused AdamW; forward, backward and update. Device time between events, host waits
included; the variants run interleaved in one process, the figure is the median over rounds of the
ratio to that round's nn.Linear. "compiled" compares with the compiled nn.Linear, "graphs" with one
compiled in mode reduce-overhead: CUDA graphs take the launches off the host. Needs an NVIDIA
device; without one it says so and gives no figure.

Spec: K3
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from bitnet_speed import VARIANTS, Block
from torch import nn

from forge_plugins.mathematics.quantization.bit_layer import BitLayer
from forge_plugins.mathematics.quantization.device_kernels import lacks_kernels
from forge_plugins.mathematics.quantization.quantized_linear import lacks_int8

DEVICE = "cuda"
OURS = ("nn.Linear", "exact", "int8", "int8, bf16 backward", "int8, int8 backward")
PEERS = ("transformers", "torchao")
COMPILED_PEERS = ("torchao", "torchao int8 (not ternary)", "torchao float8 (not ternary)")


def of_torchao_int8(model: nn.Module) -> nn.Module:
    from torchao import quantize_
    from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingConfig

    quantize_(model, Int8MixedPrecisionTrainingConfig())
    return model


def of_torchao_float8(model: nn.Module) -> nn.Module:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    return convert_to_float8_training(model, config=Float8LinearConfig.from_recipe_name("rowwise"))


NETWORKS = {
    **VARIANTS,
    "torchao int8 (not ternary)": of_torchao_int8,
    "torchao float8 (not ternary)": of_torchao_float8,
}
STEPS = 4  # between two looks at the clock, so that the host may run ahead as it does in training


class Subject:
    """A network with its optimizer and one step of training."""

    def __init__(self, name: str, width: int, blocks: int, mode: str | None) -> None:
        torch.manual_seed(0)
        hidden = -(-width * 43 // 16 // 128) * 128
        plain = nn.Sequential(*[Block(width, hidden, width // 128) for _ in range(blocks)])
        self.model = NETWORKS[name](plain).to(DEVICE)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.layers = [layer for layer in self.model.modules() if isinstance(layer, BitLayer)]
        self.run: Any = torch.compile(self.model, mode=mode) if mode else self.model

    def step(self, batch: torch.Tensor) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = self.run(batch).float().square().mean()
        loss.backward()
        self.optimizer.step()
        for layer in self.layers:
            layer.invalidate()
        self.optimizer.zero_grad()


def table(
    width: int, blocks: int, tokens: int, rounds: int, names: tuple[str, ...], mode: str | None
) -> dict[str, Any]:
    """Ratios to nn.Linear of one setting, all variants interleaved."""
    batch = torch.randn(max(1, tokens // 2048), 2048, width, device=DEVICE)
    subjects: dict[str, Subject] = {}
    result: dict[str, Any] = {}
    for name in names:
        try:
            subject = Subject(name, width, blocks, mode)
            for _ in range(3):
                subject.step(batch)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            subject.step(batch)
            peak = torch.cuda.max_memory_allocated() - before
            result[name] = {"peak_bytes": peak}
            subjects[name] = subject
        except Exception as error:  # noqa: BLE001  a peer that cannot do this is a finding
            result[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:160]}
    times: dict[str, list[float]] = {name: [] for name in subjects}
    order = list(subjects)
    for number in range(rounds):
        for name in order[number % len(order) :] + order[: number % len(order)]:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            for _ in range(STEPS):
                subjects[name].step(batch)
            end.record()
            torch.cuda.synchronize()
            times[name].append(begin.elapsed_time(end) / 1e3 / STEPS)
    base = times["nn.Linear"]
    for name, values in times.items():
        ratios = [item / other for item, other in zip(values, base, strict=True)]
        result[name] |= {
            "median": statistics.median(ratios),
            "least": min(ratios),
            "most": max(ratios),
            "seconds": statistics.median(values),
            "peak_ratio": result[name]["peak_bytes"] / result["nn.Linear"]["peak_bytes"],
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--widths", type=int, nargs="*", default=[2048, 4096])
    parser.add_argument("--peers", type=int, nargs="*", default=[2048], help="widths")
    parser.add_argument("--compiled", type=int, nargs="*", default=[2048], help="widths")
    parser.add_argument("--graphs", type=int, nargs="*", default=[2048], help="widths")
    parser.add_argument("--names", nargs="*", default=list(OURS), help="which of ours")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA device: nothing is measured")
    warnings.simplefilter("ignore")
    for lacking in (lacks_int8(DEVICE), lacks_kernels(DEVICE)):
        if lacking:
            sys.exit(f"nothing is measured: {lacking}")
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "tokens": options.tokens,
    }
    settings = [(width, "", None) for width in options.widths]
    settings += [(width, " compiled", "default") for width in options.compiled]
    settings += [(width, " graphs", "reduce-overhead") for width in options.graphs]
    for width, label, mode in settings:
        # transformers compiles its quantizers by itself: it is measured as its users run it;
        # torchao's are made to be compiled as a whole
        peers = COMPILED_PEERS if mode else PEERS
        names = (*options.names, *(peers if width in options.peers else ()))
        result = table(width, 2, options.tokens, options.rounds, names, mode)
        results[f"{width}{label}"] = result
        print(f"width {width}{label}")
        for name, row in result.items():
            message = row.get("error") or (
                f"{row['median']:.3f} ({row['least']:.3f} - {row['most']:.3f})  "
                f"{row['seconds'] * 1e3:.2f} ms  peak {row['peak_ratio']:.2f}"
            )
            print(f"  {name:<22} {message}", flush=True)
        torch.cuda.empty_cache()
        torch._dynamo.reset()  # it gives up on code that it has compiled eight times
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
