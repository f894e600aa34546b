"""Names of before: refused in users' files, read on in run folders and checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final, TypeVar

_Tensor = TypeVar("_Tensor")

KINDS: Final[Mapping[str, str]] = {"penalties": "regularizers", "policies": "callbacks"}
"""Sections of a pipeline file. The names of settings stand in the plugins' configurations."""

PLUGINS: Final[Mapping[str, Mapping[str, str]]] = {"data": {"two_sources": "train_validation"}}
"""By kind (today's): a plugin's name before, and today."""

RECORDS: Final[Mapping[str, str]] = {"figures": "metrics", "figures_step": "metrics_step"}
"""Keys of `status.json` and of the lines of `forge.log`."""

TENSORS: Final[Mapping[str, str]] = {"anchor": "reference_scale"}
"""The last part of a tensor's name in a checkpoint."""


def label_today(label: str) -> str:
    """What a plan calls an entry today: `policies[0] stop_at` is `callbacks[0] stop_at`."""
    place, space, name = label.partition(" ")
    kind, bracket, index = place.partition("[")
    kind = KINDS.get(kind, kind)
    return kind + bracket + index + space + PLUGINS.get(kind, {}).get(name, name)


def record_today(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with today's keys."""
    return {RECORDS.get(name, name): value for name, value in record.items()}


def tensors_today(state: Mapping[str, _Tensor], wanted: Collection[str]) -> dict[str, _Tensor]:
    """Tensors by today's names, where `wanted` has those and lacks the ones of before."""
    result: dict[str, _Tensor] = {}
    for name, tensor in state.items():
        owner, dot, last = name.rpartition(".")
        today = owner + dot + TENSORS.get(last, last)
        result[today if name not in wanted and today in wanted else name] = tensor
    return result
