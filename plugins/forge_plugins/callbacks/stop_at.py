"""Stop when a validation metric reaches a threshold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from forge_kernel.api import Kind, PluginInfo, Run, hookimpl


@dataclass(frozen=True, kw_only=True)
class StopAtConfig:
    """Which metric, and where."""

    metric: Annotated[str, Meta(min_length=1, description="name of a validation metric")] = (
        "accuracy"
    )
    threshold: Annotated[float, Meta(description="stop when the metric reaches this value")] = 0.95
    mode: Annotated[
        Literal["max", "min"], Meta(description="whether higher (max) or lower (min) is better")
    ] = "max"
    not_before: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(description="validations before this step are not looked at; null: none is looked at "
             "before the network is what will be exported (levels still being blended in); a "
             "number: from that step on, whatever the network is"),
    ] = None  # fmt: skip


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
