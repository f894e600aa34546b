"""Weights kept small, or sparse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

from forge_kernel.api import (
    Kind,
    LazyModule,
    MetricInfo,
    PluginError,
    PluginInfo,
    Run,
    Step,
    hookimpl,
)

if TYPE_CHECKING:
    from torch import Tensor

    from forge_plugins.mathematics.quantization import bit_layer
    from forge_plugins.mathematics.quantization import weight_size as mathematics
else:
    bit_layer = LazyModule("forge_plugins.mathematics.quantization.bit_layer")
    mathematics = LazyModule("forge_plugins.mathematics.quantization.weight_size")


@dataclass(frozen=True, kw_only=True)
class WeightSizeConfig:
    """How strong, by which measure, on which weights."""

    strength: Annotated[float, Meta(ge=0, description="factor of the mean over all weights")] = 1e-3
    measure: Annotated[
        Literal["square", "magnitude"],
        Meta(description="square: keeps weights small; magnitude: |w| in units of each tensor's "
             "root mean square, which draws small weights to zero and leaves its size alone"),
    ] = "square"  # fmt: skip
    weights: Annotated[
        Literal["all", "quantized"],
        Meta(description="all parameters that are trained, or the latent weights of quantized "
             "layers"),
    ] = "all"  # fmt: skip


def _required(config: WeightSizeConfig) -> tuple[str, ...]:
    return ("model:quantized",) if config.weights == "quantized" else ()


class WeightSize:
    """Weights kept small, or sparse.

    Adds `strength` times the mean square, or the mean magnitude, of all weights; tied ones count
    once.
    """

    info = PluginInfo(
        name="weight_size",
        kind=Kind.REGULARIZERS,
        config=WeightSizeConfig,
        requires=_required,
        metrics=(
            MetricInfo("weight_square", goal="min"),
            MetricInfo("weight_magnitude", goal="min"),
        ),
    )

    def __init__(self, config: WeightSizeConfig) -> None:
        self.config = config
        self._weights: Sequence[Tensor] = ()

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Find the weights.

        Raises:
            PluginError: there are none.
        """
        result = [value for _, value in run.named_parameters()]
        if self.config.weights == "quantized":
            layers = [item for item in run.model.modules() if isinstance(item, bit_layer.BitLayer)]
            result = [bit_layer.latent(item) for item in layers if item.scheme.quantizes_weight]  # type: ignore[misc]
        self._weights = [value for value in result if value.requires_grad]
        if not self._weights:
            raise PluginError(
                f"weight_size: the model has no {self.config.weights} weights to train"
            )

    @hookimpl
    def regularize(self, run: Run, step: Step) -> Tensor | None:
        """The mean, times its strength."""
        if not self.config.strength:
            return None
        square = self.config.measure == "square"
        mean = (mathematics.mean_square if square else mathematics.mean_magnitude)(self._weights)
        if step.logs:
            run.metrics.put(f"weight_{self.config.measure}", mean.detach())
        return mean * self.config.strength
