"""A rate for each phase of the run's clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, PluginInfo, Run, ScheduleFactors, Step, hookimpl

if TYPE_CHECKING:
    from forge_plugins.mathematics.optimizers import learning_rate_curves
else:
    learning_rate_curves = LazyModule("forge_plugins.mathematics.optimizers.learning_rate_curves")

_Multiplier = Annotated[float, Meta(ge=0, description="factor of the optimizer's rate")]


@dataclass(frozen=True, kw_only=True)
class GrokfastScheduleConfig:
    """Factors of the phases, and how they go over into each other."""

    warmup_steps: Annotated[
        int, Meta(ge=0, description="optimizer steps of the first rise, from the run's start")
    ] = 10
    warmup_multiplier: _Multiplier = 1.0
    acceleration_multiplier: _Multiplier = 5.0
    consolidation_multiplier: _Multiplier = 0.2
    refinement_multiplier: _Multiplier = 0.1
    completed_multiplier: _Multiplier = 0.1
    smoothing_steps: Annotated[
        int, Meta(ge=0, description="optimizer steps from one phase's factor to the next; 0: none")
    ] = 100


class GrokfastSchedule:
    """A rate for each phase of the run's clock.

    Reads the phase that the clock names; it has no clock of its own.
    """

    info = PluginInfo(
        name="grokfast",
        kind=Kind.SCHEDULE,
        config=GrokfastScheduleConfig,
        requires=("phase:warmup", "phase:acceleration", "phase:consolidation", "phase:refinement"),
    )

    def __init__(self, config: GrokfastScheduleConfig) -> None:
        self.config = config
        self._from = self._factor = 1.0
        self._began: int | None = None  # last step of the phase before

    def _target(self, phase: str | None) -> float:
        return float(getattr(self.config, f"{phase}_multiplier", 1.0))

    @hookimpl
    def on_phase_change(self, run: Run, before: str | None, after: str | None) -> None:
        """From here on the factor goes to the new phase's."""
        del after
        self._from = self._factor if before is not None else self._target(before)
        self._began = run.progress.step if before is not None else None

    @hookimpl
    def compute_schedule_factors(self, run: Run, step: Step) -> ScheduleFactors:
        """The factor of this step."""
        del run
        target = self._target(step.phase)
        self._factor = target
        if self._began is not None:
            self._factor = learning_rate_curves.eased(
                self._from, target, step.number - self._began, self.config.smoothing_steps
            )
        return ScheduleFactors(
            self._factor * learning_rate_curves.linear_warmup(step.number, self.config.warmup_steps)
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the factor comes from."""
        return {"from": self._from, "factor": self._factor, "began": self._began}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the way to the phase's factor."""
        self._from, self._factor = float(state["from"]), float(state["factor"])
        self._began = state["began"]
