"""Cost of a training step with BitNet layers, as a ratio to the same network with nn.Linear.

Llama-like blocks (width 512, feed-forward 1376, 8 heads, RMSNorm), sequences of 256, AdamW; forward,
backward and update. One thread, CPU time; all variants of a table run interleaved in one process, the figure is
the median over rounds of the ratio to that round's nn.Linear (beside it the ratio of the minima).
Memory: a fresh process each.

Spec: K3
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn
from torch.nn import functional

from forge_plugins.mathematics.quantization.bit_layer import BitLayer, QuantizationState
from forge_plugins.mathematics.quantization.conversion import convert_model_to_bitnet
from forge_plugins.mathematics.quantization.scheme import Scheme

torch.set_num_threads(1)
WIDTH, HIDDEN, HEADS = 512, 1376, 8


class Block(nn.Module):
    """Attention and gated feed-forward, pre-norm, as in Llama without rotary embeddings."""

    def __init__(self, width: int = WIDTH, hidden: int = HIDDEN, heads: int = HEADS) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = nn.ModuleDict(
            {name: nn.Linear(width, width, bias=False) for name in ("q", "k", "v", "o")}
        )
        self.feed = nn.ModuleDict(
            {
                "gate": nn.Linear(width, hidden, bias=False),
                "up": nn.Linear(width, hidden, bias=False),
                "down": nn.Linear(hidden, width, bias=False),
            }
        )

    def forward(self, stream: Tensor) -> Tensor:
        batch, length, _ = stream.shape
        normed = self.first(stream)
        q, k, v = (
            self.attention[name](normed).view(batch, length, self.heads, -1).transpose(1, 2)
            for name in ("q", "k", "v")
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        stream = stream + self.attention["o"](mixed.transpose(1, 2).reshape(stream.shape))
        normed = self.second(stream)
        gated = functional.silu(self.feed["gate"](normed)) * self.feed["up"](normed)
        return stream + self.feed["down"](gated)  # type: ignore[no-any-return]


class Textbook(nn.Linear):
    """The estimator as everybody writes it: two detached differences."""

    def forward(self, input: Tensor) -> Tensor:
        w = self.weight
        scale = 1.0 / w.abs().mean().clamp(min=1e-5)
        w = w + ((w * scale).round().clamp(-1, 1) / scale - w).detach()
        scale = 127.0 / input.abs().max(dim=-1, keepdim=True).values.clamp(min=1e-5)
        x = input + ((input * scale).round().clamp(-128, 127) / scale - input).detach()
        return functional.linear(x, w, self.bias)


def replaced(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            layer = make(module)
            layer.weight = module.weight  # type: ignore[assignment]
            holder = model.get_submodule(parent)
            holder[child] = layer  # type: ignore[index]
    return model


def of_transformers(model: nn.Module) -> nn.Module:
    from transformers.integrations.bitnet import AutoBitLinear

    return replaced(
        model,
        lambda old: AutoBitLinear(old.in_features, old.out_features, False, online_quant=True),
    )


def of_torchao(model: nn.Module) -> nn.Module:
    from torchao import quantize_
    from torchao.prototype.quantized_training import bitnet_training

    quantize_(model, bitnet_training())
    return model


def ours(arithmetic: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda model: convert_model_to_bitnet(model, Scheme(arithmetic=arithmetic))[0]


def before_levels(model: nn.Module) -> nn.Module:
    """As before `warmup_start`: the layers are there, and nothing is blended in yet."""
    return convert_model_to_bitnet(model, quantization=QuantizationState(warmup_lambda=0.0))[0]


VARIANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nn.Linear": lambda model: model,
    "before the levels": before_levels,
    "exact": ours("exact"),
    "int8": ours("int8"),
    "int8, bf16 backward": ours("int8_bf16_backward"),
    "int8, int8 backward": ours("int8_backward"),
    "textbook": lambda model: replaced(
        model, lambda old: Textbook(old.in_features, old.out_features, bias=False)
    ),
    "transformers": of_transformers,
    "torchao": of_torchao,
}


def network(name: str, blocks: int) -> nn.Module:
    torch.manual_seed(0)
    return VARIANTS[name](nn.Sequential(*[Block() for _ in range(blocks)]))


class Subject:
    """A network with its optimizer and one step of training."""

    def __init__(self, name: str, blocks: int, *, micro: int = 1, autocast: bool = False) -> None:
        self.model = network(name, blocks)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.layers = [layer for layer in self.model.modules() if isinstance(layer, BitLayer)]
        for layer in self.layers:
            layer.weight_cache.enabled = micro > 1  # as the quantizer plugin does
        self.micro, self.autocast = micro, autocast

    def step(self, batches: list[Tensor]) -> None:
        for batch in batches:
            context = torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext()
            with context:
                loss = self.model(batch).float().square().mean()
            loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        for layer in self.layers:
            layer.invalidate()
        self.optimizer.zero_grad()


def table(
    blocks: int, shape: tuple[int, int], rounds: int, names: list[str], **options: Any
) -> Any:
    """Ratios to nn.Linear of one setting, all variants interleaved."""
    torch.manual_seed(1)
    batches = [torch.randn(*shape, WIDTH) for _ in range(options.get("micro", 1))]
    subjects, failed = {}, {}
    for name in names:
        try:
            subjects[name] = Subject(name, blocks, **options)
            subjects[name].step(batches)
        except Exception as error:  # noqa: BLE001  a peer that cannot do this at all is a finding
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
            subjects.pop(name, None)
    times: dict[str, list[float]] = {name: [] for name in subjects}
    order = list(subjects)
    for number in range(rounds):
        for name in order[number % len(order) :] + order[: number % len(order)]:
            begin = time.process_time()
            subjects[name].step(batches)
            times[name].append(time.process_time() - begin)
    base = times["nn.Linear"]
    result: dict[str, Any] = {
        name: {
            "median": statistics.median(a / b for a, b in zip(values, base, strict=True)),
            "minimum": min(values) / min(base),
            "seconds": statistics.median(values),
        }
        for name, values in times.items()
    }
    return result | {name: {"error": text} for name, text in failed.items()}


def resident(field: str) -> int:
    """A size of this process in KiB, as Linux tells it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def saved_bytes(name: str) -> dict[str, int]:
    """Bytes that autograd holds at the end of forward, without parameters; growth of the peak."""
    subject = Subject(name, 4)
    torch.manual_seed(1)
    batch = torch.randn(4, 256, WIDTH)
    for parameter in subject.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    whole = [getattr(p, "_data", p) for p in subject.model.parameters()]  # torchao wraps its own
    known = {tensor.untyped_storage().data_ptr() for tensor in whole}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        inner = getattr(tensor, "_data", None)
        storage = (inner if isinstance(inner, Tensor) else tensor).untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    begin = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    subject.step([batch])
    peak = resident("VmHWM") - begin
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = subject.model(batch).square().mean()
    del loss
    return {"saved": sum(seen.values()), "peak": peak * 1024}


def memory(names: list[str]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name in names:
        command = [sys.executable, __file__, "--memory-of", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            result[name] = json.loads(done.stdout.splitlines()[-1])
    base = result["nn.Linear"]
    return {
        name: {
            **row,
            "saved_ratio": row["saved"] / base["saved"],
            "peak_ratio": row["peak"] / base["peak"],
        }
        for name, row in result.items()
    }


def gradient_errors() -> dict[str, Any]:
    """Distance of the gradients from those of the exact mode, as a share of their norm."""
    torch.manual_seed(1)
    batch = torch.randn(2, 256, WIDTH)
    result: dict[str, list[Tensor]] = {}
    outputs: dict[str, Tensor] = {}
    for name in ("exact", "int8", "int8, bf16 backward"):
        model = network(name, 1)
        outputs[name] = model(batch)
        outputs[name].square().mean().backward()  # type: ignore[no-untyped-call]
        result[name] = [p.grad for p in model.parameters() if p.grad is not None]
    exact = result["exact"]
    return {
        name: {
            "output": float((outputs[name] - outputs["exact"]).norm() / outputs["exact"].norm()),
            "worst_gradient": max(
                float((a - b).norm() / b.norm()) for a, b in zip(values, exact, strict=True)
            ),
        }
        for name, values in result.items()
        if name != "exact"
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), help="times of these alone")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.compiler.set_stance("force_eager")  # transformers compiles its quantizers: minutes
    if options.memory_of:
        print(json.dumps(saved_bytes(options.memory_of)))
        return
    if options.only:
        names = list(dict.fromkeys(["nn.Linear", *options.only]))
        for title, shape, more in (
            ("fp32", (2, 256), {}),
            ("autocast", (1, 256), {"autocast": True}),
        ):
            for name, row in table(1, shape, options.rounds, names, **more).items():
                print(f"{title} {name:<22} {row.get('error') or round(row['median'], 3)}")
        return
    names = list(VARIANTS)
    features = torch.cpu.get_capabilities()
    wanted = ("avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16")
    results = {
        "processor": {
            "name": features.get("cpu_name"),
            "features": [name for name in wanted if features.get(name)],
        },
        "memory": memory(names),
        "errors": gradient_errors(),
        "fp32": table(4, (8, 256), options.rounds, names),
        "autocast": table(1, (8, 256), 2 * options.rounds, names, autocast=True),
        "micro": table(1, (1, 256), 2 * options.rounds, names, micro=8),
    }
    for section in ("fp32", "autocast", "micro"):
        print(f"\n{section}: median ratio to nn.Linear (ratio of the minima)")
        for name, row in results[section].items():
            message = row.get("error") or f"{row['median']:.3f} ({row['minimum']:.3f})"
            print(f"  {name:<22} {message}")
    print("\nmemory: saved for backward, growth of the peak")
    for name, row in results["memory"].items():
        print(f"  {name:<22} {row['saved_ratio']:.2f} {row['peak_ratio']:.2f}")
    print(results["processor"], results["errors"])
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
