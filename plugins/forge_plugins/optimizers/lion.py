"""Lion (Chen et al. 2023, arXiv 2302.06675): steps of the sign of a momentum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, PluginInfo, Run, hookimpl
from forge_plugins.optimizers.groups import optimizer_of
from forge_plugins.optimizers.settings import DecayRule, DecoupledDecay, Groups, Share

if TYPE_CHECKING:
    import torch
    from torch import nn

    from forge_plugins.mathematics.optimizers import lion
else:
    lion = LazyModule("forge_plugins.mathematics.optimizers.lion")


@dataclass(frozen=True, kw_only=True)
class LionConfig:
    """What Lion is told."""

    lr: Annotated[float, Meta(ge=0, description="learning rate; about a tenth of Adam's")] = 1e-4
    betas: Annotated[
        tuple[Share, Share],
        Meta(description="blend of the step, and decay of the momentum"),
    ] = (0.9, 0.99)
    weight_decay: DecoupledDecay = 0.0
    decay: DecayRule = "all"
    groups: Groups = ()


class Lion:
    """Lion (Chen et al. 2023, arXiv 2302.06675): steps of the sign of a momentum.

    Half of Adam's memory.
    """

    info = PluginInfo(name="lion", kind=Kind.OPTIMIZER, config=LionConfig)

    def __init__(self, config: LionConfig) -> None:
        self.config = config

    @hookimpl
    def make_optimizer(
        self, run: Run, parameters: Sequence[tuple[str, nn.Parameter]]
    ) -> torch.optim.Optimizer:
        """The optimizer over all parameters."""
        del run
        return optimizer_of(lion.Lion, parameters, self.config)
