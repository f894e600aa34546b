"""Right answers that lead over the wrong ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forge_kernel.api import Batch, Kind, LazyModule, PluginError, PluginInfo, Run, Step, hookimpl

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from forge_plugins.mathematics import lacking_margin as mathematics
else:
    torch = LazyModule("torch")
    mathematics = LazyModule("forge_plugins.mathematics.lacking_margin")


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
    def compute_loss(
        self, run: Run, step: Step, batch: Batch, outputs: Any
    ) -> tuple[Tensor, float | Tensor]:
        """Outputs of shape (..., classes) against integer targets of shape (...)."""
        del step
        chosen = outputs.ndim == 3 and batch.positions is not None
        if chosen and outputs.shape[1] != batch.targets.shape[1]:
            outputs = outputs[:, batch.positions]  # a model that answers everywhere
        flat, rows = batch.targets.reshape(-1), outputs.flatten(0, -2)
        if len(rows) != len(flat):
            raise PluginError(
                f"margin: {len(rows)} outputs for {len(flat)} targets; the model must give one row "
                "of logits for each target"
            )
        if rows.shape[-1] < 2:
            raise PluginError("margin: one class has no wrong answers; two or more are needed")
        weights = (flat != run.settings.ignore_index).to(rows.dtype)
        if batch.weights is not None:
            given = batch.weights.reshape(len(batch.weights), -1).to(weights)
            weights = weights * given.expand(-1, len(flat) // len(given)).reshape(-1)
        known = torch.where(flat != run.settings.ignore_index, flat, 0).long()
        total = weights.sum()
        losses = mathematics.lacking_margin(rows, known) * weights
        return losses.sum() / torch.where(total > 0, total, 1.0), total.detach()
