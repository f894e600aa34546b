"""What a finished run gives back."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from forge_kernel.errors import RunError

if TYPE_CHECKING:
    from torch import nn

Outcome = Literal["completed", "stopped", "failed"]


class History(dict[str, list[float | None]]):
    """Metrics by name, each a column over `step`; None where one was not measured."""

    def frame(self) -> Any:
        """As a data frame of pandas, with the step as its index.

        Raises:
            ImportError: pandas is not installed.
        """
        import pandas  # type: ignore[import-untyped]  # an extra of the caller

        return pandas.DataFrame(dict(self)).set_index("step")


@dataclass(frozen=True)
class Charts:
    """A page of curves, which a notebook shows in place.

    Args:
        page: a whole HTML document, which loads nothing.
        height: of the frame in a notebook, in pixels.
    """

    page: str = field(repr=False)
    height: int = 470

    def _repr_html_(self) -> str:
        return (
            f'<iframe srcdoc="{html.escape(self.page)}" sandbox title="curves" '
            f'style="width:100%;height:{self.height}px;border:0"></iframe>'
        )

    def save(self, file: str | Path) -> Path:
        """Write the page.

        Raises:
            OSError: it cannot be written.
        """
        file = Path(file)
        file.write_text(self.page, encoding="utf-8")
        return file


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

    @property
    def history(self) -> History:
        """The metrics as columns over the steps, those of validations under `validation_`.

        Raises:
            RunError: the run has no folder, or wrote no metrics into it.
        """
        from forge_kernel.contract.uses import use

        return History(use("run_history")(self._folder()))

    def plot(self, *metrics: str) -> Charts:
        """Curves over the steps; a notebook shows them.

        Args:
            metrics: names as in `history`; without any, all that were measured.

        Raises:
            RunError: as `history`, or there is no such metric.
        """
        from forge_kernel.contract.uses import use

        return Charts(use("run_charts")(self._folder(), metrics))

    def _folder(self) -> Path:
        if self.folder is None:
            raise RunError("this run has no folder, in which its metrics would stand")
        return self.folder

    def _repr_html_(self) -> str:
        """The whole report, as a notebook shows it."""
        from forge_kernel.contract.uses import use

        if self.folder is None:
            return f"<pre>{html.escape(repr(self))}</pre>"
        return Charts(use("run_report")(self.folder), height=640)._repr_html_()

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
