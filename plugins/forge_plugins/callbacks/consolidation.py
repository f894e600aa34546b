"""Weights are drawn toward the best validated ones, and only kept when that does not harm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, PluginError, PluginInfo, Run, Step, hookimpl
from forge_plugins.callbacks.improvement import Improvement
from forge_plugins.callbacks.watched_metric import MetricName, Mode, NotBefore

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

TAG = "consolidation"
Stage = Literal["idle", "asked", "kept", "drawn"]


@dataclass(frozen=True, kw_only=True)
class ConsolidationConfig:
    """How strongly, how often, and by which metric."""

    renamed: ClassVar[Mapping[str, str]] = {"share": "fraction"}

    fraction: Annotated[
        float, Meta(gt=0, le=1, description="part of the way to the best weights; 1: all of it")
    ] = 0.5
    every: Annotated[
        int, Meta(ge=2, description="optimizer steps between attempts; each takes one step")
    ] = 50
    phase: Annotated[
        Annotated[str, Meta(min_length=1)] | None,
        Meta(description="attempts are made in this phase only; null: throughout the run"),
    ] = "consolidation"
    metric: MetricName = "loss"
    mode: Mode = "min"
    not_before: NotBefore = None


def _needs(config: ConsolidationConfig) -> tuple[str, ...]:
    """The facts that the run must bring."""
    phase = () if config.phase is None else (f"phase:{config.phase}",)
    return (f"metric:{config.metric}", *phase)


class Consolidation:
    """Moves weights towards the best validated ones, and undoes it when the metric gets worse.

    At an attempt the weights are validated and kept in a checkpoint, drawn, validated again.

    Step n: the metric of the weights as they are is the one to hold, and they are pinned as
    `consolidation`. Step n + 1: after the optimizer, `w <- w + fraction * (best - w)`. When its
    metric is worse than the one to hold (or not finite), the weights of step n are restored, before
    a further batch is seen; the optimizer's memory is left alone. The best weights are those of the
    best validation so far, whoever asked for it.

    Events: `consolidation_accepted`, `consolidation_rejected`. Other listeners hear of the extra
    validations too, also of those of weights that are then given up.
    """

    info = PluginInfo(
        name="consolidation",
        kind=Kind.CALLBACKS,
        config=ConsolidationConfig,
        requires=_needs,
        conflicts=("callbacks.weight_average",),  # its metrics are not those of the weights drawn
    )

    def __init__(self, config: ConsolidationConfig) -> None:
        self.config = config
        self._best = Improvement(config.mode)
        self._best_step: int | None = None
        self._weights: dict[str, Tensor] = {}  # of the best validation
        self._stage: Stage = "idle"
        self._held: float | None = None  # the metric not to fall behind

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Weights that are given up come back from a checkpoint."""
        if run.folder is None:
            raise PluginError("consolidation needs a run folder: weights come back from there")

    @hookimpl
    def on_weights(self, run: Run, step: Step) -> None:
        """Draw, when the weights before it are safe."""
        del step
        if self._stage != "kept":
            return
        self._stage = "drawn"
        own = {
            name: value
            for name, value in run.named_parameters()
            if name in self._weights and value.requires_grad
        }
        if not own:  # all of them are frozen by now
            return
        with torch.no_grad():
            torch._foreach_lerp_(
                list(own.values()), [self._weights[name] for name in own], self.config.fraction
            )

    @hookimpl
    def on_step_end(self, run: Run, step: Step) -> None:
        """Ask for the metric: of weights that were drawn, or of those that are to be."""
        config = self.config
        due = step.number % config.every == 0 and config.phase in (None, step.phase)
        asks = due and self._stage in ("idle", "asked")
        if asks:
            self._stage = "asked"
        if asks or self._stage == "drawn":
            run.request("validate")

    @hookimpl
    def on_validation(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Judge the weights drawn, remember the best, keep those that are to be drawn."""
        early = run.progress.step < (self.config.not_before or 0)
        if early or self.config.metric not in metrics:
            return
        value = metrics[self.config.metric]
        stage, self._stage = self._stage, "idle"
        if stage == "kept":  # somebody else's validation, before the next step
            self._stage = "kept"
        if stage == "drawn":
            self._judge(run, value)
        if self._best.better(value):
            self._best_step = run.progress.step
            self._weights = {
                name: parameter.detach().clone()
                for name, parameter in run.named_parameters()
                if parameter.requires_grad
            }
        elif stage == "asked" and self._weights:
            self._stage = "kept"
            self._held = value if math.isfinite(value) else None
            run.request("save", tag=TAG)

    def _judge(self, run: Run, value: float) -> None:
        held, metric = self._held, self.config.metric
        accepted = math.isfinite(value) and (
            held is None or (value >= held if self.config.mode == "max" else value <= held)
        )
        before = "not finite" if held is None else f"{held:.4g}"
        outcome = "accepted" if accepted else "rejected"
        message = (
            f"Consolidation {outcome}: {metric} {before} -> {value:.4g} "
            f"(drawn toward step {self._best_step})."
        )
        run.emit_event(
            f"consolidation_{outcome}",
            message,
            metric=metric,
            before=held,
            after=value if math.isfinite(value) else None,
            best_step=self._best_step,
        )
        self._held = None
        if not accepted:
            run.request("restore", tag=TAG)

    def state_dict(self) -> dict[str, Any]:
        """The best weights and how far an attempt is."""
        return {
            "best": self._best.state_dict(),
            "best_step": self._best_step,
            "weights": dict(self._weights),
            "stage": self._stage,
            "held": self._held,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up an attempt where it stands."""
        self._best.load_state_dict(state["best"])
        self._best_step, self._stage = state["best_step"], state["stage"]
        self._weights, self._held = dict(state["weights"]), state["held"]
