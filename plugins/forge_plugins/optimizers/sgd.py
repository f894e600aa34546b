"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, PluginInfo, Run, hookimpl
from forge_plugins.optimizers.groups import optimizer_of
from forge_plugins.optimizers.settings import DecayRule, Fused, Groups, L2Decay, LearningRate

if TYPE_CHECKING:
    import torch
    from torch import nn

else:
    torch = LazyModule("torch")


@dataclass(frozen=True, kw_only=True)
class SgdConfig:
    """What torch's SGD is told."""

    lr: LearningRate = 1e-2
    momentum: Annotated[float, Meta(ge=0, lt=1, description="share of the last update")] = 0.0
    dampening: Annotated[float, Meta(ge=0, lt=1, description="damps what joins momentum")] = 0.0
    nesterov: Annotated[bool, Meta(description="look ahead along the momentum")] = False
    weight_decay: L2Decay = 0.0
    decay: DecayRule = "all"
    groups: Groups = ()
    fused: Fused = True

    def __post_init__(self) -> None:
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError("nesterov needs a momentum above 0 and no dampening")


class Sgd:
    """Stochastic gradient descent with momentum.

    torch.optim.SGD.
    """

    info = PluginInfo(name="sgd", kind=Kind.OPTIMIZER, config=SgdConfig)

    def __init__(self, config: SgdConfig) -> None:
        self.config = config

    @hookimpl
    def make_optimizer(
        self, run: Run, parameters: Sequence[tuple[str, nn.Parameter]]
    ) -> torch.optim.Optimizer:
        """The optimizer over all parameters."""
        del run
        return optimizer_of(torch.optim.SGD, parameters, self.config)
