"""Gradients at right angles to the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, Order, PluginInfo, Run, Step, hookimpl

if TYPE_CHECKING:
    from forge_plugins.mathematics.optimizers import orthogonal_gradient
else:
    orthogonal_gradient = LazyModule("forge_plugins.mathematics.optimizers.orthogonal_gradient")


@dataclass(frozen=True, kw_only=True)
class OrthogonalConfig:
    """Which gradients, and how long they are afterwards."""

    keep_norm: Annotated[
        bool, Meta(description="give each gradient its former norm back after the removal")
    ] = True
    matrices_only: Annotated[
        bool, Meta(description="leave the gradients of biases, norms and other vectors alone")
    ] = False


class Orthogonal:
    """Gradients at right angles to the weights.

    Takes from each gradient its part along the weight, which only scales the logits.

    Meant to be used with `loss: {use: cross_entropy, with: {activation: stablemax}}` (the same
    paper) and without weight decay.
    """

    info = PluginInfo(
        name="orthogonal",
        kind=Kind.GRADIENTS,
        config=OrthogonalConfig,
        order=Order(before=("clip_norm",)),
    )

    def __init__(self, config: OrthogonalConfig) -> None:
        self.config = config

    @hookimpl
    def on_gradients(self, run: Run, step: Step) -> None:
        """All gradients, in place."""
        del run
        pairs = list(zip(step.gradients, step.parameters, strict=True))
        if self.config.matrices_only:
            pairs = [(gradient, weight) for gradient, weight in pairs if weight.ndim >= 2]
        orthogonal_gradient.remove_parallel_part(
            [gradient for gradient, _ in pairs],
            [weight for _, weight in pairs],
            keep_norm=self.config.keep_norm,
        )
