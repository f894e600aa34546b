"""Cross-entropy over classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from forge_kernel.api import Batch, Kind, LazyModule, PluginError, PluginInfo, Run, Step, hookimpl

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import functional
else:
    functional = LazyModule("torch.nn.functional")


@dataclass(frozen=True, kw_only=True)
class CrossEntropyConfig:
    """How targets are read."""

    label_smoothing: Annotated[
        float, Meta(ge=0, lt=1, description="share of the target spread over all classes")
    ] = 0.0


class CrossEntropy:
    """Mean cross-entropy; its weight is the number of targets or the sum of sample weights."""

    info = PluginInfo(
        name="cross_entropy",
        kind=Kind.LOSS,
        config=CrossEntropyConfig,
        requires=("data:classes",),
    )

    def __init__(self, config: CrossEntropyConfig) -> None:
        self.config = config

    @hookimpl
    def compute_loss(
        self, run: Run, step: Step, batch: Batch, outputs: Any
    ) -> tuple[Tensor, float | Tensor]:
        """Outputs of shape (..., classes) against integer targets of shape (...)."""
        del run, step
        targets = batch.targets
        if outputs.ndim == 3 and batch.positions is not None:
            if outputs.shape[1] != targets.shape[1]:
                outputs = outputs[:, batch.positions]  # a model that answers everywhere
            outputs = outputs.flatten(0, 1)
        elif outputs.ndim > 2:
            outputs = outputs.flatten(0, -2)
        flat = targets.reshape(-1)
        if len(outputs) != len(flat):
            raise PluginError(
                f"cross_entropy: {len(outputs)} outputs for {len(flat)} targets; the model must "
                "give one row of logits for each target"
            )
        smoothing = self.config.label_smoothing
        if batch.weights is None:
            return functional.cross_entropy(outputs, flat, label_smoothing=smoothing), len(flat)
        losses = functional.cross_entropy(
            outputs, flat, label_smoothing=smoothing, reduction="none"
        )
        weights = batch.weights.reshape(len(batch.weights), -1)
        weights = weights.expand(-1, len(flat) // len(weights)).reshape(-1).to(losses)
        total = weights.sum()
        mean = (losses * weights).sum() / total.clamp_min(1e-30)
        return mean, total.detach()
