"""Focal loss: cross-entropy that looks away from what is learned already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from forge_kernel.api import Batch, Kind, LazyModule, PluginInfo, hookimpl

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import functional
else:
    torch = LazyModule("torch")
    functional = LazyModule("torch.nn.functional")


@dataclass(frozen=True, kw_only=True)
class AcmeFocalConfig:
    """How strongly easy samples are turned down."""

    gamma: Annotated[
        float, Meta(ge=0, description="exponent of (1 - p); 0 is plain cross-entropy")
    ] = 2.0


class AcmeFocal:
    """`-(1 - p)^gamma log p`, p the probability of the target (arXiv 1708.02002)."""

    info = PluginInfo(
        name="acme_focal", kind=Kind.LOSS, config=AcmeFocalConfig, requires=("data:classes",)
    )

    def __init__(self, config: AcmeFocalConfig) -> None:
        self.config = config

    @hookimpl
    def compute_loss(self, batch: Batch, outputs: Any) -> Tensor:
        """Outputs of shape (..., classes) against integer targets of shape (...)."""
        if (
            batch.positions is not None
            and outputs.ndim == 3
            and outputs.shape[1] != batch.targets.shape[1]
        ):
            outputs = outputs[:, batch.positions]  # a model that answers everywhere
        targets = batch.targets.reshape(-1)
        logits = outputs.reshape(-1, outputs.shape[-1])
        log_p = -functional.cross_entropy(
            logits, targets, reduction="none", ignore_index=batch.ignore_index
        )
        # The bound keeps the gradient finite where p rounds to 1 and gamma lies below 1.
        unsure = (-torch.expm1(log_p)).clamp_min(1e-12)
        return -(unsure**self.config.gamma) * log_p
