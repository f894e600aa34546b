"""Metrics as a reader calls them, and what belongs together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, TypeVar

from forge_kernel.api import MetricInfos

Value = TypeVar("Value")

MAIN: Final = ("loss", "accuracy", "learning_rate", "grad_norm")
"""Metrics with large charts, which come first."""

SECTIONS: Final = ("Quantized weights", "Grokking", "Throughput", "Machine")
"""Headings of small charts that come first; others follow by name."""

FURTHER: Final = "Further metrics"


def metric_title(metric: str, infos: MetricInfos) -> str:
    """A metric's name as a heading; what follows a slash is a part of it."""
    whole, _, part = metric.partition("/")
    text = whole.replace("_", " ")
    title = infos.of(whole).title or text[:1].upper() + text[1:]
    return f"{title}: {part}" if part else title


def section_of(metric: str, infos: MetricInfos) -> str:
    """The heading that a small chart stands under."""
    return infos.of(metric).section or FURTHER


def main_first(metrics: Mapping[str, Value]) -> list[tuple[str, Value]]:
    """Metrics with what belongs to them, main ones first, the others in their order."""
    names = [name for name in MAIN if name in metrics]
    names += [name for name in metrics if name not in MAIN]
    return [(name, metrics[name]) for name in names]


def in_order(metrics: Iterable[str], infos: MetricInfos) -> list[str]:
    """Names of charts: main ones, then by section, then by name."""

    def place(metric: str) -> tuple[int, str, str]:
        section = section_of(metric, infos)
        last = len(SECTIONS) + (section == FURTHER)
        return SECTIONS.index(section) if section in SECTIONS else last, section, metric

    result = set(metrics)
    return [name for name in MAIN if name in result] + sorted(result.difference(MAIN), key=place)
