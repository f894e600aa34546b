"""A linear rise, then a straight line down to a floor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forge_kernel.api import Kind, LazyModule, PluginInfo
from forge_plugins.schedules.span import SpanConfig, SpanSchedule

if TYPE_CHECKING:
    from forge_plugins.mathematics.optimizers import learning_rate_curves
else:
    learning_rate_curves = LazyModule("forge_plugins.mathematics.optimizers.learning_rate_curves")


class Linear(SpanSchedule):
    """A linear rise, then a straight line down to a floor."""

    info = PluginInfo(name="linear", kind=Kind.SCHEDULE, config=SpanConfig)

    def curve(self, position: int, span: int) -> float:
        """A straight line."""
        return learning_rate_curves.linear(position, span, self.config.floor)
