"""Keep the checkpoint of the best validation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from forge_kernel.api import Kind, PluginInfo, Run, hookimpl
from forge_plugins.callbacks.improvement import Improvement
from forge_plugins.callbacks.watched_metric import MetricName, MinDelta, Mode, NotBefore


@dataclass(frozen=True, kw_only=True)
class BestCheckpointConfig:
    """Which metric."""

    metric: MetricName = "loss"
    mode: Mode = "min"
    min_delta: MinDelta = 0.0
    not_before: NotBefore = None


class BestCheckpoint:
    """Keeps the checkpoint of the best validation, pinned as `best`."""

    info = PluginInfo(
        name="best_checkpoint",
        kind=Kind.CALLBACKS,
        config=BestCheckpointConfig,
        requires=lambda config: (f"metric:{config.metric}",),
    )

    def __init__(self, config: BestCheckpointConfig) -> None:
        self.config = config
        self._best = Improvement(config.mode, config.min_delta)

    @hookimpl
    def on_validation(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Compare and ask."""
        value = metrics.get(self.config.metric)
        if run.progress.step < (self.config.not_before or 0):
            return
        if value is not None and self._best.better(value):
            run.request("save", tag="best")

    def state_dict(self) -> dict[str, Any]:
        """The best value."""
        return self._best.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the best value."""
        self._best.load_state_dict(state)
