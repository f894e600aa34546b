"""Metrics as a reader calls them, and what belongs together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final, TypeVar

Value = TypeVar("Value")

MAIN: Final = ("loss", "accuracy", "learning_rate", "grad_norm")
"""Metrics with large charts, which come first."""

_TITLES: Final = {
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "slow_gradient_norm": "Slow gradient norm",
    "mfu": "MFU, share of the device's peak",
    "mse": "Mean squared error",
    "mae": "Mean absolute error",
    "r2": "R²",
    "f1": "F1",
    "bleu": "BLEU",
    "cpu_percent": "Processor, this process, %",
    "system_cpu_percent": "Processor, whole machine, %",
    "device_percent": "Device busy, %",
    "memory_bytes": "Memory, this process",
    "memory_share": "Memory, whole machine, share",
    "device_memory_bytes": "Device memory, tensors",
    "device_memory_peak_bytes": "Device memory, peak",
    "device_memory_share": "Device memory, all programs, share",
    "validation_time_share": "Time for validation, share",
    "latent_mean": "Latent weights, mean",
    "latent_std": "Latent weights, deviation",
    "latent_kurtosis": "Latent weights, kurtosis",
    "weight_flips": "Weights that changed level, share",
    "weight_sparsity": "Weights that are zero, share",
}

SECTIONS: Final[tuple[tuple[str, re.Pattern[str]], ...]] = (
    ("Quantized weights", re.compile(r"quantization_|weight_(sparsity|flips)|latent_|level_")),
    ("Grokking", re.compile(r"slow_gradient|grokfast_|retention/|capability/|smallest_gradient")),
    ("Throughput", re.compile(r"(samples|tokens|steps)_per_second|mfu$|validation_time")),
    ("Machine", re.compile(r"(system_)?cpu_percent|(device_)?memory_|device_percent")),
)
"""Headings of small charts with the beginnings of the names that stand below them."""

FURTHER: Final = "Further metrics"


def metric_title(metric: str) -> str:
    """A metric's name as a heading; what follows a slash is a part of it."""
    whole, _, part = metric.partition("/")
    text = whole.replace("_", " ")
    title = _TITLES.get(whole, text[:1].upper() + text[1:])
    return f"{title}: {part}" if part else title


def section_of(metric: str) -> str:
    """The heading that a small chart stands under."""
    return next((name for name, pattern in SECTIONS if pattern.match(metric)), FURTHER)


def main_first(metrics: Mapping[str, Value]) -> list[tuple[str, Value]]:
    """Metrics with what belongs to them, main ones first, the others in their order."""
    names = [name for name in MAIN if name in metrics]
    names += [name for name in metrics if name not in MAIN]
    return [(name, metrics[name]) for name in names]


def in_order(metrics: Iterable[str]) -> list[str]:
    """Names of charts: main ones, then by section, then by name."""
    result = set(metrics)
    headings = [name for name, _ in SECTIONS] + [FURTHER]
    others = sorted(result.difference(MAIN), key=lambda one: (headings.index(section_of(one)), one))
    return [name for name in MAIN if name in result] + others
