"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101)."""

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
    DecoupledDecay,
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
class AdamWConfig:
    """What torch's AdamW is told."""

    lr: LearningRate = 1e-3
    betas: AdamBetas = (0.9, 0.999)
    eps: Epsilon = 1e-8
    weight_decay: DecoupledDecay = 0.01
    decay: DecayRule = "all"
    groups: Groups = ()
    amsgrad: Annotated[bool, Meta(description="keep the largest second average")] = False
    fused: Fused = True


class AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101).

    torch.optim.AdamW.
    """

    info = PluginInfo(name="adamw", kind=Kind.OPTIMIZER, config=AdamWConfig)

    def __init__(self, config: AdamWConfig) -> None:
        self.config = config

    @hookimpl
    def make_optimizer(
        self, run: Run, parameters: Sequence[tuple[str, nn.Parameter]]
    ) -> torch.optim.Optimizer:
        """The optimizer over all parameters."""
        del run
        return optimizer_of(torch.optim.AdamW, parameters, self.config)
