"""Does training with gradients in whole numbers end where exact training ends? On a GPU.

A ternary Llama-like network reads bytes of this repository's own texts; the same batches and rows,
once in exact arithmetic, once in `int8_backward`, under bf16 autocast. Told: the validation loss of
both, and at the end, layer by layer, how far the weights' gradients of one batch are off (fp32, of
their norm; cosine), as they are and with planted outliers of 100 sigma: single numbers of the
incoming gradient, and a whole token. Needs an NVIDIA device; without one it says so.

Spec: K3
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from bitnet_speed import VARIANTS, Block
from torch import Tensor, nn
from torch.nn import functional

from forge_plugins.mathematics.quantization.bit_linear import BitLinear
from forge_plugins.mathematics.quantization.device_kernels import lacks_kernels
from forge_plugins.mathematics.quantization.quantized_linear import lacks_int8
from forge_plugins.mathematics.quantization.scheme import Scheme

ROOT = Path(__file__).resolve().parents[1]
WIDTH, LAYERS, LENGTH, BATCH = 256, 4, 256, 32
ARMS = {"exact": "exact", "int8 backward": "int8, int8 backward"}


def text() -> Tensor:
    """All of the repository's Python and Markdown, as bytes, in the order of the names."""
    files = sorted(path for kind in ("py", "md") for path in ROOT.glob(f"[!.]*/**/*.{kind}"))
    return torch.frombuffer(bytearray(b"\n".join(p.read_bytes() for p in files)), dtype=torch.uint8)


class Network(nn.Module):
    """Bytes to logits of the next byte."""

    def __init__(self, arm: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        blocks = nn.Sequential(*[Block(WIDTH, WIDTH * 11 // 4, 4) for _ in range(LAYERS)])
        self.blocks = VARIANTS[ARMS[arm]](blocks)
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(inputs))))  # type: ignore[no-any-return]


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(batch[:, :-1]).float()
    return functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def batches(data: Tensor, seed: int, count: int) -> list[Tensor]:
    source = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(data) - LENGTH - 1, (count, BATCH), generator=source)
    places = starts[..., None] + torch.arange(LENGTH + 1)
    return list(data[places].long().cuda())


def trained(arm: str, seed: int, steps: int) -> dict[str, Any]:
    """One run: its validation loss, and of `int8 backward` the gradients' errors at its end."""
    data = text()
    border = len(data) * 19 // 20
    torch.manual_seed(seed)
    model = Network(arm).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01, fused=True)
    course = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.05)
    for batch in batches(data[:border], 1000 + seed, steps):
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        course.step()
        optimizer.zero_grad()
    with torch.no_grad():
        held = [float(loss_of(model, batch)) for batch in batches(data[border:], 7, 40)]
    result: dict[str, Any] = {"arm": arm, "seed": seed, "loss": statistics.fmean(held)}
    if arm != "exact":
        batch = batches(data[:border], 8, 1)[0]
        result["errors"] = {how: errors(model, batch, how) for how in ("none", "numbers", "token")}
    return result


def errors(model: nn.Module, batch: Tensor, outliers: str) -> dict[str, float]:
    """Of the weights' gradients, each layer fed the same incoming gradient in both arithmetics."""
    layers = [item for item in model.modules() if isinstance(item, BitLinear)]
    seen: dict[BitLinear, tuple[Tensor, Tensor]] = {}
    handles = []
    for layer in layers:

        def note(module: Any, given: Any, output: Tensor) -> None:
            output.register_hook(
                lambda gradient: seen.__setitem__(module, (given[0].detach(), gradient.detach()))
            )

        handles.append(layer.register_forward_hook(note))
    loss_of(model, batch).backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    off, cosines = [], []
    for layer, (inputs, gradient) in seen.items():
        if outliers == "numbers":
            spots = torch.randperm(gradient.numel(), device="cuda")[:20]
            gradient.view(-1)[spots] = 100 * gradient.std()
        elif outliers == "token":
            gradient.view(-1, gradient.shape[-1])[17] = 100 * gradient.std()
        pair = []
        scheme = layer.scheme
        for item in (Scheme(), scheme):
            layer.scheme = item
            outputs = layer(inputs)
            pair.append(torch.autograd.grad(outputs, layer.weight, gradient)[0].double())
        wanted, result = pair
        off.append(float((result - wanted).norm() / wanted.norm()))
        cosines.append(float((result * wanted).sum() / result.norm() / wanted.norm()))
    return {"worst": max(off), "mean": statistics.fmean(off), "least_cosine": min(cosines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("ARM", "SEED"), help="one run, as JSON")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA device: nothing is measured")
    for lacking in (lacks_int8("cuda"), lacks_kernels("cuda")):
        if lacking:
            sys.exit(f"nothing is measured: {lacking}")
    if options.one:
        print(json.dumps(trained(options.one[0], int(options.one[1]), options.steps)))
        return
    command = [sys.executable, __file__, "--steps", str(options.steps), "--one"]
    jobs = [
        subprocess.Popen([*command, arm, str(seed)], stdout=subprocess.PIPE, text=True)
        for seed in range(options.seeds)
        for arm in ARMS
    ]
    runs = [json.loads(job.communicate()[0]) for job in jobs]
    losses = {arm: [run["loss"] for run in runs if run["arm"] == arm] for arm in ARMS}
    for arm, values in losses.items():
        message = ", ".join(f"{value:.4f}" for value in values)
        print(f"{arm:<14} validation loss {message}; mean {statistics.fmean(values):.4f}")
    means = [statistics.fmean(values) for values in losses.values()]
    print(f"int8 backward / exact: {means[1] / means[0]:.4f}")
    for run in runs:
        for how, row in run.get("errors", {}).items():
            print(
                f"seed {run['seed']}, outliers {how:<8} gradients off by {row['worst']:.4f} at "
                f"worst, {row['mean']:.4f} in the mean; least cosine {row['least_cosine']:.6f}"
            )
    if options.json:
        about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        options.json.write_text(json.dumps({**about, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
