"""What a finished run gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import nn

Outcome = Literal["completed", "stopped", "failed"]


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """Outcome and metrics of a run; `to_data` is what `result.json` holds.

    Args:
        outcome: `completed`, `stopped` (from outside, resumable) or `failed`.
        steps: finished optimizer steps.
        epochs: finished passes over the training data.
        seconds: of training, over all sessions of the run.
        stop_reason: why it ended where it did.
        final: the last metrics by name; a validation's under its own names.
        best: the best validation metrics.
        exports: folders written by exporters, by exporter.
        failed_exports: what other exporters failed of; the run itself is complete.
        error: what went wrong, for `failed`.
        folder: the run folder, if there is one.
        model: the live model, with the weights that its metrics and exports are of.
        training_model: where those are an average: a model with the weights in training.
    """

    outcome: Outcome
    steps: int
    epochs: int
    seconds: float
    stop_reason: str
    final: dict[str, float | None] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    exports: dict[str, str] = field(default_factory=dict)
    failed_exports: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    folder: Path | None = None
    model: nn.Module | None = field(default=None, repr=False)
    training_model: nn.Module | None = field(default=None, repr=False)

    def to_data(self) -> dict[str, Any]:
        """Plain data without the live parts."""
        return {
            "outcome": self.outcome,
            "steps": self.steps,
            "epochs": self.epochs,
            "seconds": self.seconds,
            "stop_reason": self.stop_reason,
            "final": dict(self.final),
            "best": dict(self.best),
            "exports": dict(self.exports),
            "failed_exports": dict(self.failed_exports),
            "error": self.error,
        }
