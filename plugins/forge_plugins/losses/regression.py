"""Distance from numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
    from torch import Tensor
    from torch.nn import functional

    from forge_plugins.mathematics.metrics import label_positions
else:
    label_positions = LazyModule("forge_plugins.mathematics.metrics.label_positions")
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

    Mean over samples of each sample's mean distance. Every number counts, whatever it is.
    """

    info = PluginInfo(
        name="regression", kind=Kind.LOSS, config=RegressionConfig, requires=("data:numbers",)
    )

    def __init__(self, config: RegressionConfig) -> None:
        self.config = config

    @hookimpl
    def compute_loss(self, run: Run, step: Step, batch: Batch, outputs: Any) -> LossTerm:
        """Outputs and targets of the same shape but for dimensions of 1.

        Raises:
            PluginError: the shapes differ.
        """
        del run, step
        try:
            numbers, wanted = label_positions.number_pairs(outputs, batch.targets)
        except ValueError as error:
            raise PluginError(f"regression: {error}") from error
        distances = self._distances(numbers, wanted)
        each = distances.reshape(len(distances), -1).mean(1)
        return LossTerm(each, counted=batch.as_numbers().counted)

    @hookimpl
    def compute_loss_weights(self, run: Run, batch: Batch) -> Sequence[float | Tensor]:
        """What the samples count."""
        del run
        return [batch.as_numbers().counted.total]

    def _distances(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.config.distance == "squared":
            return functional.mse_loss(outputs, targets, reduction="none")
        if self.config.distance == "absolute":
            return functional.l1_loss(outputs, targets, reduction="none")
        return functional.huber_loss(outputs, targets, reduction="none", delta=self.config.delta)
