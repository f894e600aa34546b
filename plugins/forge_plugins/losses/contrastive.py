"""Supervised contrastive loss over a model's embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from forge_kernel.api import Batch, Kind, LazyModule, PluginError, PluginInfo, Run, Step, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from forge_plugins.mathematics import contrastive
else:
    contrastive = LazyModule("forge_plugins.mathematics.contrastive")


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """How sharply neighbours are told apart."""

    temperature: Annotated[float, Meta(gt=0, le=100, description="divisor of the similarities")] = (
        0.1
    )


class Contrastive:
    """Supervised contrastive loss over a model's embeddings.

    Its weight is the number of anchors that have a positive in the batch.
    """

    info = PluginInfo(
        name="contrastive", kind=Kind.LOSS, config=ContrastiveConfig, requires=("data:classes",)
    )

    def __init__(self, config: ContrastiveConfig) -> None:
        self.config = config

    @hookimpl
    def compute_loss(
        self, run: Run, step: Step, batch: Batch, outputs: Any
    ) -> tuple[Tensor, float | Tensor]:
        """Outputs are embeddings of shape (n, width), targets labels of n entries."""
        del run, step
        if batch.weights is not None:
            raise PluginError("contrastive: sample weights have no meaning for pairs; remove them")
        embeddings = outputs.flatten(1)
        labels = batch.targets.reshape(-1)
        if len(embeddings) != len(labels):
            raise PluginError(f"contrastive: {len(embeddings)} embeddings, {len(labels)} labels")
        return contrastive.supervised_contrastive(embeddings, labels, self.config.temperature)
