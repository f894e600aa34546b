"""Adam (Kingma and Ba 2015, arXiv 1412.6980), with decay as a term of the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, PluginInfo, Run, hookimpl
from forge_plugins.optimizers.groups import optimizer_of
from forge_plugins.optimizers.settings import (
    AdamBetas,
    DecayRule,
    Epsilon,
    Fused,
    Groups,
    LearningRate,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

else:
    torch = LazyModule("torch")


@dataclass(frozen=True, kw_only=True)
class AdamConfig:
    """What torch's Adam is told."""

    lr: LearningRate = 1e-3
    betas: AdamBetas = (0.9, 0.999)
    eps: Epsilon = 1e-8
    weight_decay: Annotated[float, Meta(ge=0, description="L2 decay, added to the gradient")] = 0.0
    decay: DecayRule = "all"
    groups: Groups = ()
    amsgrad: Annotated[bool, Meta(description="keep the largest second average")] = False
    fused: Fused = True


class Adam:
    """Adam (Kingma and Ba 2015, arXiv 1412.6980), with decay as a term of the gradient.

    torch.optim.Adam.
    """

    info = PluginInfo(name="adam", kind=Kind.OPTIMIZER, config=AdamConfig)

    def __init__(self, config: AdamConfig) -> None:
        self.config = config

    @hookimpl
    def make_optimizer(
        self, run: Run, parameters: Sequence[tuple[str, nn.Parameter]]
    ) -> torch.optim.Optimizer:
        """The optimizer over all parameters."""
        del run
        return optimizer_of(torch.optim.Adam, parameters, self.config)
