"""A loss with the network's own answers in full precision beside the targets."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Protocol, cast

from msgspec import Meta

from forge_kernel.api import (
    Batch,
    Kind,
    LazyModule,
    PluginInfo,
    Run,
    Step,
    UseLoss,
    hookimpl,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from forge_plugins.mathematics import distillation as mathematics
    from forge_plugins.mathematics import latent_answer
else:
    torch = LazyModule("torch")
    mathematics = LazyModule("forge_plugins.mathematics.distillation")
    latent_answer = LazyModule("forge_plugins.mathematics.latent_answer")


class Loss(Protocol):
    """What the nested plugin is asked for."""

    def compute_loss(
        self, run: Run, step: Step, batch: Batch, outputs: Any
    ) -> tuple[Tensor, float | Tensor]:
        """Mean loss and its weight."""
        ...


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig:
    """The loss towards the targets, and how much the divergence counts."""

    loss: Annotated[UseLoss[Loss], Meta(description="the loss towards the targets")] = field(
        default_factory=lambda: UseLoss("cross_entropy")
    )
    weight: Annotated[
        float, Meta(ge=0, description="of the divergence from the answers in full precision")
    ] = 0.1


class Consistency:
    """A loss with the network's own answers in full precision beside the targets.

    `loss + weight * KL(latent || quantized)`: what the network answers with its latent weights
    is a teacher without gradient, for one more forward pass in each step. In a validation the
    nested loss alone is computed.
    """

    info = PluginInfo(
        name="consistency", kind=Kind.LOSS, config=ConsistencyConfig, requires=("model:quantized",)
    )

    def __init__(self, config: ConsistencyConfig) -> None:
        self.config = config
        self._positions = False

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Whether the model is told where it is to answer."""
        self._positions = "positions" in inspect.signature(run.model.forward).parameters

    @hookimpl
    def compute_loss(
        self, run: Run, step: Step, batch: Batch, outputs: Any
    ) -> tuple[Tensor, float | Tensor]:
        """The nested loss with the divergence."""
        config = self.config
        loss, weight = cast(Loss, config.loss).compute_loss(run, step, batch, outputs)
        if not torch.is_grad_enabled() or not config.weight:
            return loss, weight
        takes = self._positions and batch.positions is not None
        options = {"positions": batch.positions} if takes else {}
        answers = latent_answer.latent_answer(
            run.active_model, lambda: run.active_model(batch.inputs, **options)
        )
        told = mathematics.distillation(outputs, answers, 1.0)
        if step.logs:
            run.metrics.put("consistency", told.detach())
            run.metrics.put("target_loss", loss.detach())
        return loss + config.weight * told, weight
