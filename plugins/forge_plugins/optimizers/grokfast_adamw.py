"""The Grokfast filter and AdamW as one update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, PluginInfo, Run, hookimpl
from forge_plugins.mathematics.grokfast.setting_checks import swapped
from forge_plugins.optimizers.groups import check_names, decay_groups
from forge_plugins.optimizers.settings import (
    DecayRule,
    DecoupledDecay,
    Epsilon,
    Groups,
    LearningRate,
    Share,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from forge_plugins.mathematics.optimizers import grokfast_adamw as mathematics
    from forge_plugins.mathematics.optimizers import plain_parameters, torch_compile
else:
    torch_compile = LazyModule("forge_plugins.mathematics.optimizers.torch_compile")
    mathematics = LazyModule("forge_plugins.mathematics.optimizers.grokfast_adamw")
    plain_parameters = LazyModule("forge_plugins.mathematics.optimizers.plain_parameters")


@dataclass(frozen=True, kw_only=True)
class GrokfastAdamWConfig:
    """What AdamW is told, and the filter."""

    lr: LearningRate = 1e-3
    betas: Annotated[
        tuple[Share, Share],
        Meta(description="decay of the averages of the filtered gradient and of its square"),
    ] = (0.9, 0.98)
    eps: Epsilon = 1e-8
    weight_decay: DecoupledDecay = 0.01
    decay: DecayRule = "all"
    groups: Groups = ()
    alpha: Annotated[float, Meta(ge=0, lt=1, description="decay of the slow gradient")] = 0.98
    lambda_reg: Annotated[
        float, Meta(ge=0, description="how much of the slow gradient is added")
    ] = 2.0
    compile: Annotated[
        Literal["auto", "never"],
        Meta(description="auto: tensors of more than 131,072 elements on a CPU are updated in one "
             "compiled loop, where torch.compile works; results agree up to rounding"),
    ] = "auto"  # fmt: skip

    @staticmethod
    def advice(values: Mapping[str, Any]) -> str | None:
        """A hint for settings that are wrong in a known way."""
        return swapped(values)


class GrokfastAdamW:
    """The Grokfast filter and AdamW as one update.

    The gradients that AdamW sees are those of `gradients: [{use: grokfast}]` in its last place.

    One passage over memory in place of two. Other gradient filters (clipping) act before it here,
    on gradients that are not amplified yet.
    """

    info = PluginInfo(
        name="grokfast_adamw",
        kind=Kind.OPTIMIZER,
        config=GrokfastAdamWConfig,
        conflicts=("gradients.grokfast",),  # the slow gradient would be added twice
    )

    def __init__(self, config: GrokfastAdamWConfig) -> None:
        self.config = config

    @hookimpl
    def make_optimizer(
        self, run: Run, parameters: Sequence[tuple[str, nn.Parameter]]
    ) -> torch.optim.Optimizer:
        """The optimizer over all parameters."""
        config = self.config
        check_names(parameters, config.groups)
        made = mathematics.GrokfastAdamW(
            decay_groups(parameters, config.weight_decay, config.decay, config.groups),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            alpha=config.alpha,
            lambda_reg=config.lambda_reg,
            compiled=config.compile == "auto" and self._compiles(run, parameters),
        )
        return plain_parameters.with_plain_parameters(made)

    @staticmethod
    def _compiles(run: Run, parameters: Sequence[tuple[str, nn.Parameter]]) -> bool:
        """Whether there is something to compile and a compiler; told when that is missing."""
        if not any(mathematics.is_large(parameter) for _, parameter in parameters):
            return False
        fault = torch_compile.compiler_fault("cpu")
        if fault is not None:
            run.emit_event(
                "not_compiled",
                f"Filter and AdamW are not compiled into one loop: {fault}",
                plugin="grokfast_adamw",
            )
        return fault is None
