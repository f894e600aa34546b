"""Distances from numbers over a whole validation set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forge_kernel.api import Batch, Kind, LazyModule, Metric, MetricInfo, PluginInfo, Run, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from forge_plugins.mathematics.metrics import label_positions, regression
else:
    label_positions = LazyModule("forge_plugins.mathematics.metrics.label_positions")
    regression = LazyModule("forge_plugins.mathematics.metrics.regression")


@dataclass(frozen=True, kw_only=True)
class RegressionMetricsConfig:
    """No settings: all metrics come from the same sums."""


class RegressionMetric:
    """Sums in double precision; `r2` is 1 - residual / total over all numbers together.

    Args:
        device: where the sums of a process without a batch stand.
    """

    def __init__(self, device: Any = "cpu") -> None:
        self._device = device
        self._sums: Tensor | None = None

    def reset(self) -> None:
        """Begin a pass."""
        self._sums = None

    def update(self, batch: Batch, outputs: Any, loss: Tensor, weight: float | Tensor) -> None:
        """Take in outputs and targets of the same shape but for dimensions of 1."""
        del loss, weight
        numbers, wanted = label_positions.number_pairs(outputs, batch.targets)
        weights = batch.as_numbers().counted.samplewise()
        if weights is not None:
            weights = weights.reshape(-1, *(1,) * (numbers.ndim - 1)).expand(numbers.shape)
        result = regression.regression_sums(numbers, wanted, weights)
        known = self._sums
        self._sums = result if known is None else regression.merged(known, result)

    def compute(self, add: Callable[[Tensor], Tensor]) -> Mapping[str, float]:
        """The metrics; `r2` is left out when all targets are equal."""
        own = self._sums
        if own is None:
            own = regression.no_sums(self._device)
        return regression.regression_metrics(own, add)


class Regression:
    """Mean distances and R2 over the whole validation set."""

    info = PluginInfo(
        name="regression",
        kind=Kind.VALIDATORS,
        config=RegressionMetricsConfig,
        provides=("metric:mse", "metric:mae", "metric:r2"),
        requires=("data:numbers",),
        metrics=(
            MetricInfo("mse", goal="min", title="Mean squared error"),
            MetricInfo("mae", goal="min", title="Mean absolute error"),
            MetricInfo("r2", goal="max", title="R²"),
        ),
    )

    def __init__(self, config: RegressionMetricsConfig) -> None:
        self.config = config

    @hookimpl
    def make_metrics(self, run: Run) -> Sequence[Metric]:
        """One metric."""
        return [RegressionMetric(run.device)]
