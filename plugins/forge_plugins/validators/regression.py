"""Distances from numbers over a whole validation set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forge_kernel.api import Batch, Goal, Kind, LazyModule, Meter, PluginInfo, Run, hookimpl

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")


@dataclass(frozen=True, kw_only=True)
class RegressionFiguresConfig:
    """No settings: all figures come from the same sums."""


class RegressionMeter:
    """Sums in double precision; `r2` is 1 - residual / total over all numbers together."""

    goals: Mapping[str, Goal] = {"mse": "min", "mae": "min", "r2": "max"}

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def reset(self) -> None:
        """Begin a pass."""
        self._sums = None

    def update(self, batch: Batch, outputs: Any, loss: Tensor, weight: float | Tensor) -> None:
        """Take in outputs and targets with the same number of entries."""
        del loss, weight
        targets = batch.targets.double().reshape(-1)
        differences = outputs.double().reshape(-1) - targets
        found = torch.stack(
            [
                differences.square().sum(),
                differences.abs().sum(),
                targets.sum(),
                targets.square().sum(),
                torch.full_like(targets[:1].sum(), targets.numel()),
            ]
        )
        self._sums = found if self._sums is None else self._sums + found

    def compute(self, add: Callable[[Tensor], Tensor]) -> Mapping[str, float]:
        """The figures; `r2` is left out when all targets are equal."""
        if self._sums is None:
            return {}
        squares, distances, total, total_squares, count = add(self._sums).tolist()
        if not count:
            return {}
        spread = total_squares - total * total / count
        found = {"mse": squares / count, "mae": distances / count}
        if spread > 1e-12 * max(1.0, total_squares):
            found["r2"] = 1.0 - squares / spread
        return found


class RegressionFigures:
    """Gives the meter to each validation pass."""

    info = PluginInfo(
        name="regression",
        kind=Kind.VALIDATORS,
        config=RegressionFiguresConfig,
        provides=("figure:mse", "figure:mae", "figure:r2"),
        requires=("data:numbers",),
    )

    def __init__(self, config: RegressionFiguresConfig) -> None:
        self.config = config

    @hookimpl
    def make_meters(self, run: Run) -> Sequence[Meter]:
        """One meter."""
        del run
        return [RegressionMeter()]
