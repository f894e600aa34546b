"""Gradients scaled down to a largest global norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, MetricInfo, Order, PluginInfo, Run, Step, hookimpl

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")


@dataclass(frozen=True, kw_only=True)
class ClipNormConfig:
    """The bound."""

    max_norm: Annotated[float, Meta(gt=0, description="largest global norm of the gradients")] = 1.0


class ClipNorm:
    """Gradients scaled down to a largest global norm.

    Clips after the filters, so that what the optimizer sees keeps within the bound.
    """

    info = PluginInfo(
        name="clip_norm",
        kind=Kind.GRADIENTS,
        config=ClipNormConfig,
        order=Order(after=("grokfast",)),
        metrics=(MetricInfo("clipped_from_norm", title="Gradient norm before clipping"),),
    )

    def __init__(self, config: ClipNormConfig) -> None:
        self.config = config

    @hookimpl
    def on_gradients(self, run: Run, step: Step) -> None:
        """Multiply by `min(1, max_norm / (norm + 1e-6))`, as torch's `clip_grad_norm_` does."""
        if not step.gradients:
            return
        norm = torch.nn.utils.get_total_norm(step.gradients)
        torch.nn.utils.clip_grads_with_norm_(step.parameters, self.config.max_norm, norm)
        if step.logs:
            run.metrics.put("clipped_from_norm", norm)
