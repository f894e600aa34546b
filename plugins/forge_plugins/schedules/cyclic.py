"""The rate goes up and down between a floor and the optimizer's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, PluginInfo, Run, ScheduleFactors, Step, hookimpl

if TYPE_CHECKING:
    from forge_plugins.mathematics.optimizers import learning_rate_curves
else:
    learning_rate_curves = LazyModule("forge_plugins.mathematics.optimizers.learning_rate_curves")


@dataclass(frozen=True, kw_only=True)
class CyclicConfig:
    """The triangle's sides; its top is the optimizer's rate."""

    rise_steps: Annotated[int, Meta(ge=1, description="optimizer steps up")] = 1000
    fall_steps: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="optimizer steps down; null: as many as up"),
    ] = None
    floor: Annotated[
        float, Meta(ge=0, le=1, description="lowest rate, as a fraction of the configured one")
    ] = 0.1
    mode: Annotated[
        Literal["triangular", "triangular2", "exponential"],
        Meta(description="triangular2 halves the height each cycle, exponential shrinks it"),
    ] = "triangular"
    gamma: Annotated[
        float, Meta(gt=0, le=1, description="factor of the height in each step (exponential)")
    ] = 1.0
    lowest_momentum: Annotated[
        Annotated[float, Meta(gt=0, le=1)] | None,
        Meta(description="momentum at the top, as a fraction of the optimizer's; null: it stays"),
    ] = None

    def __post_init__(self) -> None:
        if self.gamma != 1.0 and self.mode != "exponential":
            raise ValueError(f"gamma {self.gamma} is read by the mode exponential only")


class Cyclic:
    """The rate goes up and down between a floor and the optimizer's."""

    info = PluginInfo(name="cyclic", kind=Kind.SCHEDULE, config=CyclicConfig)

    def __init__(self, config: CyclicConfig) -> None:
        self.config = config

    @hookimpl
    def compute_schedule_factors(self, run: Run, step: Step) -> ScheduleFactors:
        """The factors of this step."""
        del run
        config = self.config
        factor, height = learning_rate_curves.cyclic(
            step.number - 1,
            config.rise_steps,
            config.fall_steps or config.rise_steps,
            config.floor,
            config.mode,
            config.gamma,
        )
        if config.lowest_momentum is None:
            return ScheduleFactors(factor)
        return ScheduleFactors(factor, 1.0 - (1.0 - config.lowest_momentum) * height)
