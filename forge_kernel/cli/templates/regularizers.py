"""New plugin: a forge plugin of the kind regularizers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from forge_kernel.api import Kind, PluginInfo, Run, Step, hookimpl
from msgspec import Meta

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class NewPluginConfig:
    """Settings of New plugin."""

    scale: Annotated[float, Meta(gt=0, description="a factor")] = 1.0


class NewPlugin:
    """New plugin."""

    info = PluginInfo(
        name="new_plugin",
        kind=Kind.REGULARIZERS,
        config=NewPluginConfig,
    )

    def __init__(self, config: NewPluginConfig) -> None:
        self.config = config

    @hookimpl
    def regularize(self, run: Run, step: Step) -> Tensor | None:
        """The mean square of all weights, times the factor."""
        terms = [p.square().mean() for _, p in run.named_parameters() if p.requires_grad]
        return sum(terms[1:], terms[0]) * self.config.scale if terms else None
