"""Supervised contrastive loss over a model's embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from forge_kernel.api import (
    Batch,
    Kind,
    LazyModule,
    LossTerm,
    PluginError,
    PluginInfo,
    Run,
    Step,
    hookimpl,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from forge_plugins.mathematics.losses import contrastive
    from forge_plugins.mathematics.metrics import label_positions
else:
    torch = LazyModule("torch")
    label_positions = LazyModule("forge_plugins.mathematics.metrics.label_positions")
    contrastive = LazyModule("forge_plugins.mathematics.losses.contrastive")


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """How sharply neighbours are told apart."""

    temperature: Annotated[float, Meta(gt=0, le=100, description="divisor of the similarities")] = (
        0.1
    )


class Contrastive:
    """Supervised contrastive loss over a model's embeddings.

    The mean over the anchors that have a positive in the (micro-)batch.
    """

    info = PluginInfo(
        name="contrastive",
        kind=Kind.LOSS,
        config=ContrastiveConfig,
        requires=("data:classes",),
        couples_samples=True,
    )

    def __init__(self, config: ContrastiveConfig) -> None:
        self.config = config

    @hookimpl
    def compute_loss(self, run: Run, step: Step, batch: Batch, outputs: Any) -> LossTerm:
        """Outputs are embeddings of shape (n, width), targets labels of n entries.

        A sample that counts for nothing is in no pair; the loss of an anchor counts as its sample.
        """
        del run, step
        embeddings = label_positions.main_output(outputs).flatten(1)
        labels = batch.targets.reshape(-1)
        if len(embeddings) != len(labels):
            raise PluginError(f"contrastive: {len(embeddings)} embeddings, {len(labels)} labels")
        weights = batch.counted.weights
        losses, has = contrastive.contrastive_losses(
            embeddings, labels, self.config.temperature, None if weights is None else weights > 0
        )
        return LossTerm(losses, has.to(losses))

    @hookimpl
    def compute_loss_weights(self, run: Run, batch: Batch) -> Sequence[float | Tensor]:
        """What the anchors count that have a positive."""
        del run
        labels, weights = batch.targets.reshape(-1), batch.counted.weights
        counts = torch.ones(len(labels), device=labels.device) if weights is None else weights
        alike = (labels.view(-1, 1) == labels.view(1, -1)) & (counts > 0).view(1, -1)
        return [(counts * (alike.sum(1) > 1)).sum()]
