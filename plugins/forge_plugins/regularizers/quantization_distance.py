"""Latent weights drawn to the levels that they round to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, MetricInfo, PluginInfo, Run, Step, hookimpl

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from forge_plugins.mathematics.quantization import bit_layer
    from forge_plugins.mathematics.quantization import quantization_distance as mathematics
    from forge_plugins.mathematics.quantization.bit_layer import BitLayer
else:
    torch = LazyModule("torch")
    bit_layer = LazyModule("forge_plugins.mathematics.quantization.bit_layer")
    mathematics = LazyModule("forge_plugins.mathematics.quantization.quantization_distance")


@dataclass(frozen=True, kw_only=True)
class QuantizationDistanceConfig:
    """How strong."""

    strength: Annotated[
        float,
        Meta(ge=0, description="factor of the mean squared distance, in steps between levels"),
    ] = 1e-3


class QuantizationDistance:
    """Latent weights drawn to the levels that they round to.

    Adds `strength` times the mean squared distance to the levels, over all quantized weights.
    """

    info = PluginInfo(
        name="quantization_distance",
        kind=Kind.REGULARIZERS,
        config=QuantizationDistanceConfig,
        requires=("model:quantized",),
        metrics=(MetricInfo("quantization_distance", goal="min", section="Quantized weights"),),
    )

    def __init__(self, config: QuantizationDistanceConfig) -> None:
        self.config = config
        self._layers: list[BitLayer] = []
        self._count = 0

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Find the quantized layers; tied weights count once."""
        result = {
            id(bit_layer.latent(module)): module
            for module in run.model.modules()
            if isinstance(module, bit_layer.BitLayer)
            and module.scheme.quantizes_weight
            and module.weight.requires_grad
        }
        self._layers = list(result.values())
        self._count = sum(layer.weight.numel() for layer in self._layers)

    @hookimpl
    def regularize(self, run: Run, step: Step) -> Tensor | None:
        """The mean squared distance, in steps between levels."""
        if not self._layers:
            return None
        sums = [mathematics.quantization_distance(layer) for layer in self._layers]
        mean = torch.stack(sums).sum() / self._count
        if step.logs:
            run.metrics.put("quantization_distance", mean.detach())
        return mean * self.config.strength
