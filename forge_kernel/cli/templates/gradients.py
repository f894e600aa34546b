"""New plugin: a forge plugin of the kind gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from forge_kernel.api import Kind, PluginInfo, Run, Step, hookimpl
from msgspec import Meta


@dataclass(frozen=True, kw_only=True)
class NewPluginConfig:
    """Settings of New plugin."""

    scale: Annotated[float, Meta(gt=0, description="a factor")] = 1.0


class NewPlugin:
    """New plugin."""

    info = PluginInfo(
        name="new_plugin",
        kind=Kind.GRADIENTS,
        config=NewPluginConfig,
    )

    def __init__(self, config: NewPluginConfig) -> None:
        self.config = config

    @hookimpl
    def on_gradients(self, run: Run, step: Step) -> None:
        """Multiply the gradients in place."""
        for gradient in step.gradients:
            gradient.mul_(self.config.scale)
