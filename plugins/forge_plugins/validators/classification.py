"""Accuracy over a whole validation set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from forge_kernel.api import Batch, Goal, Kind, LazyModule, Meter, PluginInfo, Run, hookimpl

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig:
    """Which further figures."""

    top_k: Annotated[
        tuple[Annotated[int, Meta(ge=2)], ...],
        Meta(description="also the share of targets among the k likeliest classes, for these k"),
    ] = ()


def figures(config: ClassificationConfig) -> tuple[str, ...]:
    """Names of the figures that a configuration gives."""
    return ("accuracy", *(f"top_{k}_accuracy" for k in config.top_k))


class AccuracyMeter:
    """Counts over the whole set, never a mean of batch means.

    Args:
        top_k: numbers of classes among which the target may be.
    """

    def __init__(self, top_k: Sequence[int] = ()) -> None:
        self._ranks = (1, *top_k)
        self.goals: Mapping[str, Goal] = dict.fromkeys(self._names(), "max")
        self._counts: Tensor | None = None

    def _names(self) -> list[str]:
        return ["accuracy" if k == 1 else f"top_{k}_accuracy" for k in self._ranks]

    def reset(self) -> None:
        """Begin a pass."""
        self._counts = None

    def update(self, batch: Batch, outputs: Any, loss: Tensor, weight: float | Tensor) -> None:
        """Count targets found; outputs (..., classes) against integer targets (...)."""
        del loss, weight
        targets = batch.targets.reshape(-1)
        answers_everywhere = outputs.ndim == 3 and outputs.shape[1] != batch.targets.shape[1]
        if answers_everywhere and batch.positions is not None:
            outputs = outputs[:, batch.positions]
        logits = outputs.reshape(-1, outputs.shape[-1])
        hits = [(logits.argmax(-1) == targets).sum()]
        for k in self._ranks[1:]:
            likely = logits.topk(min(k, logits.shape[-1])).indices
            hits.append((likely == targets.unsqueeze(1)).any(1).sum())
        found = torch.stack([*hits, torch.full_like(hits[0], targets.numel())])
        self._counts = found if self._counts is None else self._counts + found

    def compute(self, add: Callable[[Tensor], Tensor]) -> Mapping[str, float]:
        """Shares in [0, 1]; nothing when no target was seen."""
        if self._counts is None:
            return {}
        *hits, total = add(self._counts).tolist()
        if not total:
            return {}
        return {name: hit / total for name, hit in zip(self._names(), hits, strict=True)}


class Classification:
    """Gives the accuracy meter to each validation pass."""

    info = PluginInfo(
        name="classification",
        kind=Kind.VALIDATORS,
        config=ClassificationConfig,
        provides=lambda config: tuple(f"figure:{name}" for name in figures(config)),
        requires=("data:classes",),
    )

    def __init__(self, config: ClassificationConfig) -> None:
        self.config = config

    @hookimpl
    def make_meters(self, run: Run) -> Sequence[Meter]:
        """One meter."""
        del run
        return [AccuracyMeter(self.config.top_k)]
