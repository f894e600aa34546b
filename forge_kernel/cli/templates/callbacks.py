"""New plugin: a forge plugin of the kind callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from forge_kernel.api import Kind, PluginInfo, Run, hookimpl
from msgspec import Meta


@dataclass(frozen=True, kw_only=True)
class NewPluginConfig:
    """Settings of New plugin."""

    threshold: Annotated[float, Meta(gt=0, description="loss at which to stop")] = 1.0


class NewPlugin:
    """New plugin."""

    info = PluginInfo(
        name="new_plugin",
        kind=Kind.CALLBACKS,
        config=NewPluginConfig,
    )

    def __init__(self, config: NewPluginConfig) -> None:
        self.config = config

    @hookimpl
    def on_validation(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Stop when the loss is below the threshold."""
        if metrics.get("loss", float("inf")) < self.config.threshold:
            run.request("stop", reason=f"loss below {self.config.threshold}")
