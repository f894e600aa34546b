"""Muon for matrices, AdamW for the rest."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

from forge_kernel.api import (
    Kind,
    LazyModule,
    PluginError,
    PluginInfo,
    Run,
    fast_precision,
    hookimpl,
)
from forge_plugins.optimizers.groups import check_names, decay_groups
from forge_plugins.optimizers.settings import Groups, Share

if TYPE_CHECKING:
    import torch
    from torch import nn

    from forge_plugins.mathematics.optimizers import chained_optimizer, plain_parameters
    from forge_plugins.mathematics.optimizers import muon as mathematics
else:
    torch = LazyModule("torch")
    chained_optimizer = LazyModule("forge_plugins.mathematics.optimizers.chained_optimizer")
    mathematics = LazyModule("forge_plugins.mathematics.optimizers.muon")
    plain_parameters = LazyModule("forge_plugins.mathematics.optimizers.plain_parameters")


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """What torch's Muon is told, and what AdamW is for parameters that are no hidden matrices."""

    lr: Annotated[float, Meta(ge=0, description="learning rate of the matrices")] = 2e-2
    momentum: Annotated[float, Meta(ge=0, lt=1, description="share of the last update")] = 0.95
    nesterov: Annotated[bool, Meta(description="look ahead along the momentum")] = True
    iterations: Annotated[
        int,
        Meta(ge=1, le=99, description="of Newton-Schulz, which makes the update orthogonal, in "
             "bf16 where the device multiplies that faster than fp32, else in fp32"),
    ] = 5  # fmt: skip
    adjust: Annotated[
        Literal["original", "match_rms_adamw"],
        Meta(description="how the rate follows a matrix's shape: times the root of rows / columns "
             "where that is above 1, or so that AdamW's rates and decays can be used"),
    ] = "original"  # fmt: skip
    weight_decay: Annotated[
        float, Meta(ge=0, description="decoupled decay of the matrices, times their rate")
    ] = 0.0
    adamw: Annotated[
        tuple[str, ...],
        Meta(description="matrices that AdamW takes too, by parameter name with * and ?"),
    ] = ("*embedding*", "*embed*", "*head*")
    adamw_lr: Annotated[float, Meta(ge=0, description="learning rate of AdamW")] = 1e-3
    adamw_betas: Annotated[
        tuple[Share, Share],
        Meta(description="decay of AdamW's averages of gradient and of its square"),
    ] = (0.9, 0.98)
    adamw_weight_decay: Annotated[
        float, Meta(ge=0, description="decoupled decay of AdamW, times its rate")
    ] = 0.0
    decay: Annotated[
        Literal["all", "matrices"],
        Meta(description="which of AdamW's parameters decay; matrices leaves out biases and norms"),
    ] = "all"
    groups: Groups = ()


class Muon:
    """Muon for matrices, AdamW for embeddings, head and vectors, as one optimizer.

    Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". A schedule's
    factor applies to both rates.
    """

    info = PluginInfo(name="muon", kind=Kind.OPTIMIZER, config=MuonConfig)

    def __init__(self, config: MuonConfig) -> None:
        self.config = config

    @hookimpl
    def make_optimizer(
        self, run: Run, parameters: Sequence[tuple[str, nn.Parameter]]
    ) -> torch.optim.Optimizer:
        """The optimizer over all parameters."""
        del run
        config = self.config
        check_names(parameters, config.groups)

        def orthogonal(name: str, parameter: nn.Parameter) -> bool:
            others = any(fnmatch.fnmatchcase(name, pattern) for pattern in config.adamw)
            return parameter.ndim == 2 and not others

        matrices = [(name, p) for name, p in parameters if orthogonal(name, p)]
        others = [(name, p) for name, p in parameters if not orthogonal(name, p)]
        if not matrices:
            raise PluginError(
                "muon: the model has no matrix that AdamW does not take (optimizer.with.adamw is "
                f"{list(config.adamw)}); use adamw"
            )
        muon = mathematics.Muon(
            decay_groups(matrices, config.weight_decay, "all", config.groups),
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            iterations=config.iterations,
            adjust=config.adjust,
            weight_decay=config.weight_decay,
            dtype=_fast_dtype(matrices[0][1].device),
        )
        if not others:
            return plain_parameters.with_plain_parameters(muon)
        adamw = torch.optim.AdamW(
            decay_groups(others, config.adamw_weight_decay, config.decay, config.groups),
            lr=config.adamw_lr,
            betas=config.adamw_betas,
            fused=True,
        )
        joined = chained_optimizer.JoinedOptimizer(muon, adamw)
        return plain_parameters.with_plain_parameters(joined)


def _fast_dtype(device: torch.device) -> torch.dtype:
    """In which Newton-Schulz is computed: never in fp16, whose range is short."""
    return torch.bfloat16 if fast_precision(device) == "bf16" else torch.float32
