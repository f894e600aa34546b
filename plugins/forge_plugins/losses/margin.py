"""Right answers that lead over the wrong ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forge_kernel.api import Batch, Kind, LazyModule, PluginError, PluginInfo, Run, Step, hookimpl

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from forge_plugins.mathematics.metrics import label_positions
    from forge_plugins.mathematics.metrics import lacking_margin as mathematics
else:
    torch = LazyModule("torch")
    label_positions = LazyModule("forge_plugins.mathematics.metrics.label_positions")
    mathematics = LazyModule("forge_plugins.mathematics.metrics.lacking_margin")


@dataclass(frozen=True, kw_only=True)
class MarginConfig:
    """There is nothing to set: a factor is `multi_task`'s matter."""


class Margin:
    """Right answers that lead over the wrong ones.

    Mean of `max(0, 1 - (right logit - best wrong logit))` (Crammer and Singer 2001): unlike
    cross-entropy it asks nothing more of an answer that leads by 1. Beside another loss it is a
    task of `multi_task`.
    """

    info = PluginInfo(
        name="margin", kind=Kind.LOSS, config=MarginConfig, requires=("data:classes",)
    )

    def __init__(self, config: MarginConfig) -> None:
        self.config = config

    @hookimpl
    def compute_loss(self, run: Run, step: Step, batch: Batch, outputs: Any) -> Tensor:
        """Outputs of shape (..., classes) against integer targets of shape (...)."""
        del run, step
        try:
            logits, targets = label_positions.answer_rows(outputs, batch.targets, batch.positions)
        except ValueError as error:
            raise PluginError(f"margin: {error}") from error
        if logits.shape[-1] < 2:
            raise PluginError("margin: one class has no wrong answers; two or more are needed")
        known = torch.where(targets != batch.ignore_index, targets, 0).long()
        return mathematics.lacking_margin(logits, known)

    @hookimpl
    def compute_loss_weights(self, run: Run, batch: Batch) -> Sequence[float | Tensor]:
        """What the targets count."""
        del run
        return [batch.counted.total]
