"""AdamW whose averages take a byte each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, PluginError, PluginInfo, Run, hookimpl
from forge_plugins.optimizers.groups import check_names, decay_groups
from forge_plugins.optimizers.settings import (
    DecayRule,
    DecoupledDecay,
    Epsilon,
    Groups,
    LearningRate,
)

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torchao import optim as torchao_optim

    from forge_plugins.mathematics.optimizers import plain_parameters, torch_compile
else:
    torch = LazyModule("torch")
    torchao_optim = LazyModule("torchao.optim")
    torch_compile = LazyModule("forge_plugins.mathematics.optimizers.torch_compile")
    plain_parameters = LazyModule("forge_plugins.mathematics.optimizers.plain_parameters")


Beta = Annotated[float, Meta(ge=0, le=0.999999)]  # torchao counts in fp32, where more is 1


@dataclass(frozen=True, kw_only=True)
class AdamW8BitConfig:
    """What torchao's AdamW8bit is told."""

    lr: LearningRate = 1e-3
    betas: Annotated[
        tuple[Beta, Beta], Meta(description="decay of the averages of gradient and of its square")
    ] = (0.9, 0.999)
    eps: Epsilon = 1e-8
    weight_decay: DecoupledDecay = 0.01
    decay: DecayRule = "all"
    groups: Groups = ()
    block_size: Annotated[
        int,
        Meta(ge=2, description="elements that share a scale; tensors of fewer than 4096 elements, "
             "or not a multiple of this, keep averages in full precision"),
    ] = 256  # fmt: skip


class AdamW8Bit:
    """AdamW whose averages take a byte each (torchao's AdamW8bit).

    torchao.optim.AdamW8bit: block-wise 8-bit averages (Dettmers et al. 2022, arXiv 2110.02861).

    A quarter of AdamW's memory. Its update is compiled, so it needs what torch.compile needs.
    """

    info = PluginInfo(
        name="adamw_8bit",
        kind=Kind.OPTIMIZER,
        config=AdamW8BitConfig,
        packages={"torchao": "pip install 'forge-kernel[optimizers]'"},
    )

    def __init__(self, config: AdamW8BitConfig) -> None:
        self.config = config

    @hookimpl
    def make_optimizer(
        self, run: Run, parameters: Sequence[tuple[str, nn.Parameter]]
    ) -> torch.optim.Optimizer:
        """The optimizer over all parameters."""
        config = self.config
        check_names(parameters, config.groups)
        fault = torch_compile.compiler_fault(run.device.type)
        if fault is not None:
            raise PluginError(f"adamw_8bit is compiled, and no compiler works here: {fault}")
        made = torchao_optim.AdamW8bit(
            decay_groups(parameters, config.weight_decay, config.decay, config.groups),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            block_size=config.block_size,
        )
        made.register_state_dict_post_hook(_taken_apart)
        made.register_load_state_dict_pre_hook(_put_together)
        return plain_parameters.with_plain_parameters(made)


def _taken_apart(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Averages as codes and scales: a checkpoint holds plain tensors."""
    del optimizer
    for index, state in state_dict["state"].items():
        state_dict["state"][index] = {
            name: _parts(value) if hasattr(value, "codes") else value
            for name, value in state.items()
        }


def _parts(value: Any) -> dict[str, Any]:
    return {"codes": value.codes, "scale": value.scale, "signed": value.signed}


def _put_together(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """The averages of a checkpoint as torchao has them; the map of codes is a constant of it."""
    from torchao.optim.subclass_8bit import OptimState8bit

    del optimizer
    for index, state in state_dict["state"].items():
        whole = dict(state)
        for name, value in state.items():
            if isinstance(value, dict):
                codes, scale = value["codes"], value["scale"]
                block = codes.numel() // scale.numel()
                made = OptimState8bit.zeros(codes.shape, value["signed"], block, codes.device)
                made.codes.copy_(codes)
                made.scale.copy_(scale)
                whole[name] = made
        state_dict["state"][index] = whole
