"""A linear rise, then a power of the rest of the run down to a floor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, PluginInfo
from forge_plugins.schedules.span import SpanConfig, SpanSchedule

if TYPE_CHECKING:
    from forge_plugins.mathematics.optimizers import learning_rate_curves
else:
    learning_rate_curves = LazyModule("forge_plugins.mathematics.optimizers.learning_rate_curves")


@dataclass(frozen=True, kw_only=True)
class PolynomialConfig(SpanConfig):
    """Lengths, floor and power."""

    power: Annotated[float, Meta(gt=0, description="power of the share that is left")] = 2.0


class Polynomial(SpanSchedule):
    """A linear rise, then a power of the rest of the run down to a floor."""

    info = PluginInfo(name="polynomial", kind=Kind.SCHEDULE, config=PolynomialConfig)
    config: PolynomialConfig

    def curve(self, position: int, span: int) -> float:
        """A power of the rest."""
        return learning_rate_curves.polynomial(position, span, self.config.power, self.config.floor)
