"""New plugin: a forge plugin of the kind loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from forge_kernel.api import Batch, Kind, LazyModule, PluginInfo, Run, Step, hookimpl
from msgspec import Meta

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import functional
else:
    functional = LazyModule("torch.nn.functional")


@dataclass(frozen=True, kw_only=True)
class NewPluginConfig:
    """Settings of New plugin."""

    scale: Annotated[float, Meta(gt=0, description="a factor")] = 1.0


class NewPlugin:
    """New plugin."""

    info = PluginInfo(
        name="new_plugin",
        kind=Kind.LOSS,
        config=NewPluginConfig,
    )

    def __init__(self, config: NewPluginConfig) -> None:
        self.config = config

    @hookimpl
    def compute_loss(self, run: Run, step: Step, batch: Batch, outputs: Any) -> Tensor:
        """Cross-entropy times the factor, target by target: the kernel takes the mean."""
        logits = outputs.reshape(-1, outputs.shape[-1])
        losses = functional.cross_entropy(
            logits, batch.targets.reshape(-1), reduction="none", ignore_index=batch.ignore_index
        )
        return losses * self.config.scale
