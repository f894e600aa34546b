"""Stop when a validation metric reaches a threshold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from forge_kernel.api import Kind, PluginInfo, Run, hookimpl
from forge_plugins.callbacks.watched_metric import MetricName, Mode, NotBefore


@dataclass(frozen=True, kw_only=True)
class StopAtConfig:
    """Which metric, and where."""

    metric: MetricName = "accuracy"
    threshold: Annotated[float, Meta(description="stop when the metric reaches this value")] = 0.95
    mode: Mode = "max"
    not_before: NotBefore = None


class StopAt:
    """Stops when a validation metric reaches a threshold."""

    info = PluginInfo(
        name="stop_at",
        kind=Kind.CALLBACKS,
        config=StopAtConfig,
        requires=lambda config: (f"metric:{config.metric}",),
    )

    def __init__(self, config: StopAtConfig) -> None:
        self.config = config

    @hookimpl
    def on_validation(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Compare."""
        config = self.config
        value = metrics.get(config.metric)
        if value is None or run.progress.step < (config.not_before or 0):
            return
        reached = value >= config.threshold if config.mode == "max" else value <= config.threshold
        if reached:
            sign = ">=" if config.mode == "max" else "<="
            reason = f"{config.metric} {value:.4g} {sign} {config.threshold:g}"
            run.request("stop", reason=reason)
