"""A linear rise, then half a cosine down to a floor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forge_kernel.api import Kind, LazyModule, PluginInfo
from forge_plugins.schedules.span import SpanConfig, SpanSchedule

if TYPE_CHECKING:
    from forge_plugins.mathematics.optimizers import learning_rate_curves
else:
    learning_rate_curves = LazyModule("forge_plugins.mathematics.optimizers.learning_rate_curves")


class WarmupCosine(SpanSchedule):
    """A linear rise, then half a cosine down to a floor."""

    info = PluginInfo(name="warmup_cosine", kind=Kind.SCHEDULE, config=SpanConfig)

    def curve(self, position: int, span: int) -> float:
        """Half a cosine."""
        return learning_rate_curves.cosine(position, span, self.config.floor)
