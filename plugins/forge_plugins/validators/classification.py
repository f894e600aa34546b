"""Accuracy over a whole validation set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
    by_class: Annotated[
        tuple[Literal["f1", "precision", "recall", "f1_micro"], ...],
        Meta(
            description="also these: means over the classes that occur in targets or answers "
            "(macro), or over all answers alike (micro)"
        ),
    ] = ()


def figures(config: ClassificationConfig) -> tuple[str, ...]:
    """Names of the figures that a configuration gives."""
    return ("accuracy", *(f"top_{k}_accuracy" for k in config.top_k), *config.by_class)


def rows_of(batch: Batch, outputs: Any) -> tuple[Tensor, Tensor]:
    """Logits of shape (n, classes) and targets of shape (n,), whatever the model answers."""
    answers_everywhere = outputs.ndim == 3 and outputs.shape[1] != batch.targets.shape[1]
    if answers_everywhere and batch.positions is not None:
        outputs = outputs[:, batch.positions]
    return outputs.reshape(-1, outputs.shape[-1]), batch.targets.reshape(-1)


class ClassMeter:
    """Counts hits, answers and targets of each class over the whole set.

    Precision and recall of a class without an answer or a target are 0, as in scikit-learn.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self.goals: Mapping[str, Goal] = dict.fromkeys(self._names, "max")
        self._counts: Tensor | None = None

    def reset(self) -> None:
        """Begin a pass."""
        self._counts = None

    def update(self, batch: Batch, outputs: Any, loss: Tensor, weight: float | Tensor) -> None:
        """Count."""
        del loss, weight
        logits, targets = rows_of(batch, outputs)
        answers, classes = logits.argmax(-1), logits.shape[-1]
        hits = torch.where(answers == targets, targets, classes)
        found = torch.stack(
            [
                torch.bincount(hits, minlength=classes + 1)[:classes],
                torch.bincount(answers, minlength=classes),
                torch.bincount(targets, minlength=classes),
            ]
        )
        self._counts = found if self._counts is None else self._counts + found

    def compute(self, add: Callable[[Tensor], Tensor]) -> Mapping[str, float]:
        """Shares in [0, 1]; nothing when no target was seen."""
        if self._counts is None:
            return {}
        hits, answers, targets = add(self._counts).double()
        if not float(targets.sum()):
            return {}
        occurs = (answers + targets) > 0
        all_figures = {
            "f1": (2 * hits / (answers + targets).clamp_min(1))[occurs].mean(),
            "precision": (hits / answers.clamp_min(1))[occurs].mean(),
            "recall": (hits / targets.clamp_min(1))[occurs].mean(),
            "f1_micro": 2 * hits.sum() / (answers + targets).sum(),
        }
        return {name: float(all_figures[name]) for name in self._names}


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
        logits, targets = rows_of(batch, outputs)
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
        """One meter for shares of hits, one for figures by class."""
        del run
        config = self.config
        meters: list[Meter] = [AccuracyMeter(config.top_k)]
        return [*meters, ClassMeter(config.by_class)] if config.by_class else meters
