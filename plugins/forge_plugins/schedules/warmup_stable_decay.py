"""A linear rise, a long constant part, and a fall at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, PluginInfo
from forge_plugins.schedules.span import SpanConfig, SpanSchedule

if TYPE_CHECKING:
    from forge_plugins.mathematics.optimizers import learning_rate_curves
else:
    learning_rate_curves = LazyModule("forge_plugins.mathematics.optimizers.learning_rate_curves")


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecayConfig(SpanConfig):
    """Lengths, floor and form of the fall."""

    renamed: ClassVar[Mapping[str, str]] = {"decay_share": "decay_fraction"}

    decay_fraction: Annotated[
        float,
        Meta(
            gt=0,
            le=1,
            description="fraction of the steps after the warm-up in which the rate falls",
        ),
    ] = 0.2
    fall: Annotated[
        Literal["linear", "cosine", "root"],
        Meta(description="form of the fall; root: 1 - sqrt(share)"),
    ] = "linear"


class WarmupStableDecay(SpanSchedule):
    """A linear rise, a long constant part, and a fall at the end."""

    info = PluginInfo(
        name="warmup_stable_decay", kind=Kind.SCHEDULE, config=WarmupStableDecayConfig
    )
    config: WarmupStableDecayConfig

    def curve(self, position: int, span: int) -> float:
        """Constant, then the fall."""
        config = self.config
        decay_steps = max(1, round(config.decay_fraction * span))
        return learning_rate_curves.stable_decay(
            position, span, decay_steps, config.floor, config.fall
        )
