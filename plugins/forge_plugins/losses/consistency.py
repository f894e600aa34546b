"""A loss with the network's own answers in full precision beside the targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Protocol, cast

from msgspec import Meta

from forge_kernel.api import (
    Batch,
    Kind,
    LazyModule,
    LossAnswer,
    LossTerm,
    MetricInfo,
    PluginInfo,
    Run,
    Step,
    UseLoss,
    call_model,
    hookimpl,
    loss_terms,
    loss_weights,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from forge_plugins.mathematics.losses import distillation as mathematics
    from forge_plugins.mathematics.losses import latent_answer
    from forge_plugins.mathematics.metrics import label_positions
else:
    torch = LazyModule("torch")
    mathematics = LazyModule("forge_plugins.mathematics.losses.distillation")
    label_positions = LazyModule("forge_plugins.mathematics.metrics.label_positions")
    latent_answer = LazyModule("forge_plugins.mathematics.losses.latent_answer")


class Loss(Protocol):
    """What the nested plugin is asked for."""

    def compute_loss(self, run: Run, step: Step, batch: Batch, outputs: Any) -> LossAnswer:
        """Values of which the kernel takes the mean."""
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
        name="consistency",
        kind=Kind.LOSS,
        config=ConsistencyConfig,
        requires=("model:quantized",),
        metrics=(
            MetricInfo("consistency", goal="min"),
            MetricInfo("target_loss", goal="min"),
        ),
    )

    def __init__(self, config: ConsistencyConfig) -> None:
        self.config = config

    @hookimpl
    def compute_loss(self, run: Run, step: Step, batch: Batch, outputs: Any) -> LossAnswer:
        """The nested loss with the divergence, of the rows that count."""
        config = self.config
        answer = cast(Loss, config.loss).compute_loss(run, step, batch, outputs)
        if not torch.is_grad_enabled():
            return answer
        terms = [replace(item, name=item.name or "target_loss") for item in loss_terms(answer)]

        def compared(answers: Any) -> Any:
            result = label_positions.main_output(answers)
            return label_positions.at_targets(result, batch.targets, batch.positions)

        own = compared(outputs)
        latent = latent_answer.latent_answer(
            run.active_model, lambda: compared(call_model(run.active_model, batch))
        )
        divergences = mathematics.divergences(own, latent, 1.0)
        return [*terms, LossTerm(divergences, scale=config.weight, name="consistency")]

    @hookimpl
    def compute_loss_weights(self, run: Run, batch: Batch) -> Sequence[float | Tensor]:
        """What the nested loss counts, and the rows that are compared."""
        return [*loss_weights(self.config.loss, run, batch), batch.counted.total]

    @hookimpl
    def log_metrics(self, run: Run, step: Step) -> Mapping[str, Tensor | None]:
        """The parts of the loss, over the whole optimizer step."""
        del run
        return dict(step.losses)
