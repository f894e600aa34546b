"""The clock of a Grokfast run: warm-up, acceleration, consolidation, refinement, completed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, PluginInfo, Run, Step, hookimpl

if TYPE_CHECKING:
    from forge_plugins.mathematics.grokfast import phase_lengths
else:
    phase_lengths = LazyModule("forge_plugins.mathematics.grokfast.phase_lengths")


@dataclass(frozen=True, kw_only=True)
class GrokfastPhasesConfig:
    """Lengths in optimizer steps; a length of 0 leaves the phase out."""

    warmup_steps: Annotated[int, Meta(ge=0, description="steps of the phase warmup")] = 1000
    acceleration_steps: Annotated[
        int, Meta(ge=0, description="steps of the phase acceleration")
    ] = 5000
    consolidation_steps: Annotated[
        int, Meta(ge=0, description="steps of the phase consolidation")
    ] = 2000
    refinement_steps: Annotated[int, Meta(ge=0, description="steps of the phase refinement")] = 1000
    fit: Annotated[
        bool, Meta(description="shorten all phases alike when the run is shorter than they are")
    ] = True

    def __post_init__(self) -> None:
        if not sum(self.lengths().values()):
            raise ValueError("all phases have the length 0: give one of them a length")

    def lengths(self) -> dict[str, int]:
        """The phases but the last with their lengths."""
        return {
            "warmup": self.warmup_steps,
            "acceleration": self.acceleration_steps,
            "consolidation": self.consolidation_steps,
            "refinement": self.refinement_steps,
        }


class GrokfastPhases:
    """The clock of a Grokfast run: warm-up, acceleration, consolidation, refinement, completed.

    Names the phase of each step; what phases change is the business of who listens.
    """

    info = PluginInfo(
        name="grokfast",
        kind=Kind.PHASES,
        config=GrokfastPhasesConfig,
        provides=tuple(
            f"phase:{name}"
            for name in ("warmup", "acceleration", "consolidation", "refinement", "completed")
        ),
    )

    def __init__(self, config: GrokfastPhasesConfig) -> None:
        self.config = config
        self._lengths = config.lengths()

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Fit the phases into the run, and say so."""
        whole, total = sum(self.config.lengths().values()), run.total_steps
        if total is None or whole <= total:
            return
        if self.config.fit:
            self._lengths = phase_lengths.fitted(self.config.lengths(), total)
            listed = ", ".join(f"{name} {length}" for name, length in self._lengths.items())
            message = f"The phases ({whole} steps) are fitted into the run's {total}: {listed}."
        else:
            reached = phase_lengths.phase_at(total, self._lengths)
            message = f"The phases take {whole} steps and the run {total}: it ends in {reached}."
        run.emit_event("phases_longer_than_run", message, phases=whole, total_steps=total)

    @hookimpl
    def compute_phase(self, run: Run, step: Step) -> str:
        """The phase of this step."""
        del run
        return phase_lengths.phase_at(step.number, self._lengths)
