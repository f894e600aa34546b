"""A run of a live model whose exports are looked at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from forge_kernel import RunResult, load_pipeline, run


def batches(dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    """Four batches of ten samples: four numbers, one of three classes."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(40, 4, generator=generator).to(dtype)
    targets = torch.randint(3, (40,), generator=generator)
    return [(inputs[at : at + 10], targets[at : at + 10]) for at in range(0, 40, 10)]


def live_run(
    model: nn.Module | None, data: Any, folder: Path, exporters: str, *settings: str, **options: Any
) -> RunResult:
    """Four steps with the bitnet quantizer unless the settings say otherwise."""
    chosen = [
        "run={name: live, seed: 0, device: cpu, max_steps: 4, log_every: 1}",
        "quantizer={use: bitnet}", "optimizer={use: sgd, with: {lr: 0.1}}",
        "loss={use: cross_entropy}", f"exporters=[{exporters}]",
        *(f"{section}=null" for section in ("schedule", "gradients", "validators", "callbacks",
                                            "observers")),
        *settings,
    ]  # fmt: skip
    live = {name: value for name, value in (("model", model), ("data", data)) if value is not None}
    return run(load_pipeline("smoke", chosen), output_dir=folder, quiet=True, **live, **options)


def manifest(folder: Path, exporter: str) -> dict[str, Any]:
    """What an exporter said of its files."""
    found: dict[str, Any] = json.loads((folder / f"exports/{exporter}/manifest.json").read_text())
    return found
