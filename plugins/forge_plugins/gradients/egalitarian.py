"""Egalitarian gradient descent: gradients whose directions are all equally long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, Order, PluginInfo, Run, Step, hookimpl

if TYPE_CHECKING:
    import torch

    from forge_plugins.mathematics.optimizers import newton_schulz
else:
    torch = LazyModule("torch")
    newton_schulz = LazyModule("forge_plugins.mathematics.optimizers.newton_schulz")


@dataclass(frozen=True, kw_only=True)
class EgalitarianConfig:
    """How singular values are brought to one, and how long the result is."""

    solver: Annotated[
        Literal["newton_schulz", "svd"],
        Meta(description="newton_schulz: a few matrix products, values of about 0.7 to 1.2; svd: "
             "exactly one, and several times as dear"),
    ] = "newton_schulz"  # fmt: skip
    iterations: Annotated[int, Meta(ge=1, le=50, description="of newton_schulz")] = 5
    keep_norm: Annotated[
        bool,
        Meta(description="give each gradient its former norm back: then only directions change"),
    ] = False


class Egalitarian:
    """Egalitarian gradient descent: gradients whose directions are all equally long.

    Puts `U V^T` in the place of each matrix gradient `U S V^T`; vectors are left alone.

    Pasand and Dohmatob 2025, "Egalitarian Gradient Descent", arXiv 2510.04930: slow directions, in
    which generalization happens, move as fast as the others. Meant for SGD; under Adam the
    directions are weighed again by the element.
    """

    info = PluginInfo(
        name="egalitarian",
        kind=Kind.GRADIENTS,
        config=EgalitarianConfig,
        order=Order(after=("grokfast",), before=("clip_norm",)),
    )

    def __init__(self, config: EgalitarianConfig) -> None:
        self.config = config

    @hookimpl
    def on_gradients(self, run: Run, step: Step) -> None:
        """All matrices, in place; further dimensions (convolutions) count as inputs."""
        del run
        config = self.config
        for gradient in step.gradients:
            if gradient.ndim < 2:
                continue
            flat = gradient.flatten(1)
            result = newton_schulz.polar_factor(flat, config.solver, config.iterations)
            if config.keep_norm:
                length = torch.linalg.vector_norm(result).clamp_min(1e-30)
                result = result * (torch.linalg.vector_norm(flat) / length)
            gradient.copy_(result.view_as(gradient))
