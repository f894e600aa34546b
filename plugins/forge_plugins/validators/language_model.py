"""Perplexity over a whole validation set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forge_kernel.api import Batch, Goal, Kind, LazyModule, Meter, PluginInfo, Run, hookimpl

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import functional
else:
    torch = LazyModule("torch")
    functional = LazyModule("torch.nn.functional")

LONGEST = 700.0  # nats: exp of more is no finite number


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """No settings: both figures are of all targets."""


class PerplexityMeter:
    """Sums the plain cross-entropy, whatever the training loss adds to it (smoothing, terms)."""

    goals: Mapping[str, Goal] = {"perplexity": "min", "bits_per_token": "min"}

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def reset(self) -> None:
        """Begin a pass."""
        self._sums = None

    def update(self, batch: Batch, outputs: Any, loss: Tensor, weight: float | Tensor) -> None:
        """Take in outputs (..., classes) and integer targets (...)."""
        del loss, weight
        targets = batch.targets.reshape(-1)
        answers_everywhere = outputs.ndim == 3 and outputs.shape[1] != batch.targets.shape[1]
        if answers_everywhere and batch.positions is not None:
            outputs = outputs[:, batch.positions]
        logits = outputs.reshape(-1, outputs.shape[-1]).float()
        total = functional.cross_entropy(logits, targets, reduction="sum").double()
        found = torch.stack([total, torch.full_like(total, targets.numel())])
        self._sums = found if self._sums is None else self._sums + found

    def compute(self, add: Callable[[Tensor], Tensor]) -> Mapping[str, float]:
        """`exp` of the mean cross-entropy, and the mean in bits; nothing without a target."""
        if self._sums is None:
            return {}
        total, count = add(self._sums).tolist()
        if not count:
            return {}
        mean = torch.tensor(total / count, dtype=torch.float64)
        return {
            "perplexity": float(mean.clamp(max=LONGEST).exp()),
            "bits_per_token": float(mean / torch.log(torch.tensor(2.0, dtype=torch.float64))),
        }


class LanguageModel:
    """Gives the perplexity meter to each validation pass."""

    info = PluginInfo(
        name="language_model",
        kind=Kind.VALIDATORS,
        config=LanguageModelConfig,
        provides=("figure:perplexity", "figure:bits_per_token"),
        requires=("data:classes",),
    )

    def __init__(self, config: LanguageModelConfig) -> None:
        self.config = config

    @hookimpl
    def make_meters(self, run: Run) -> Sequence[Meter]:
        """One meter."""
        del run
        return [PerplexityMeter()]
