"""Distance from numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from forge_kernel.api import Batch, Kind, LazyModule, PluginError, PluginInfo, Run, Step, hookimpl

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import functional
else:
    functional = LazyModule("torch.nn.functional")


@dataclass(frozen=True, kw_only=True)
class RegressionConfig:
    """Which distance."""

    distance: Annotated[
        Literal["squared", "absolute", "huber"],
        Meta(description="squared (MSE), absolute (MAE), or squared near 0 and absolute beyond"),
    ] = "squared"
    delta: Annotated[
        float, Meta(gt=0, description="where the huber distance turns from squared to absolute")
    ] = 1.0

    def __post_init__(self) -> None:
        if self.delta != 1.0 and self.distance != "huber":
            raise ValueError(f"delta {self.delta} is read by the huber distance only")


class Regression:
    """Squared, absolute or Huber distance from numbers.

    Mean over samples of each sample's mean distance.
    """

    info = PluginInfo(
        name="regression", kind=Kind.LOSS, config=RegressionConfig, requires=("data:numbers",)
    )

    def __init__(self, config: RegressionConfig) -> None:
        self.config = config

    @hookimpl
    def compute_loss(
        self, run: Run, step: Step, batch: Batch, outputs: Any
    ) -> tuple[Tensor, float | Tensor]:
        """Outputs and targets of the same shape, or of the same number of entries."""
        del run, step
        targets = batch.targets.to(outputs.dtype)
        if targets.shape != outputs.shape and targets.numel() == outputs.numel():
            targets = targets.view_as(outputs)
        if targets.shape != outputs.shape:
            raise PluginError(
                f"regression: outputs of shape {tuple(outputs.shape)} for targets of shape "
                f"{tuple(targets.shape)}"
            )
        distances = self._distances(outputs, targets)
        if batch.weights is None:
            return distances.mean(), len(distances)
        weights = batch.weights.to(distances)
        total = weights.sum()
        each = distances.reshape(len(distances), -1).mean(1)
        return (each * weights).sum() / total.clamp_min(1e-30), total.detach()

    def _distances(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.config.distance == "squared":
            return functional.mse_loss(outputs, targets, reduction="none")
        if self.config.distance == "absolute":
            return functional.l1_loss(outputs, targets, reduction="none")
        return functional.huber_loss(outputs, targets, reduction="none", delta=self.config.delta)
