"""Metrics of a model over a loader: a kernel session that validates and trains nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from agent_forge.phases.phase5_training.loss_call import CallersData, CallersLoss, LossFunction
from forge_kernel.api import Batch, Kind, Metric, MetricInfo, PluginInfo, Run, Step, hookimpl
from forge_kernel.embedding import InMemoryData, InMemoryModel, NoConfig, RunConfig, Session
from forge_plugins.mathematics.metrics.classification import ByClass
from forge_plugins.validators.classification import (
    AccuracyMetric,
    ClassMetric,
    TrainingAccuracy,
)

NAMES: Final[Mapping[str, ByClass]] = {
    "f1_score": "f1", "precision": "precision", "recall": "recall",
}  # fmt: skip
"""The metrics by class: the name here, the name in the kernel's validator."""


def of_classes(batch: Batch, outputs: Any) -> bool:
    """Whether the outputs are rows of logits, one for each whole number of the targets."""
    targets = batch.targets
    whole = isinstance(targets, Tensor) and not targets.is_floating_point()
    return whole and isinstance(outputs, Tensor) and outputs.ndim == targets.ndim + 1


class AnswerMetric:
    """Metrics of classes, where predictions are rows of logits and targets are whole numbers.

    Elsewhere there is no metric: what is not known is left out.

    Args:
        inner: the validator's own metric.
        names: other names of its metrics.
    """

    def __init__(self, inner: Any, names: Mapping[str, str]) -> None:
        self._inner, self._names = inner, {kernel: own for own, kernel in names.items()}

    def reset(self) -> None:
        """Begin a pass."""
        self._inner.reset()

    def update(self, batch: Batch, outputs: Any, loss: Tensor, weight: float | Tensor) -> None:
        """Take in a batch of classes."""
        if of_classes(batch, outputs):
            self._inner.update(batch, outputs, loss, weight)

    def compute(self, add: Callable[[Tensor], Tensor]) -> Mapping[str, float]:
        """The metrics over all batches."""
        return {self._names.get(name, name): v for name, v in self._inner.compute(add).items()}


class Metrics:
    """The metrics of the face as a validator."""

    info = PluginInfo(
        name="metrics",
        kind=Kind.VALIDATORS,
        config=NoConfig,
        provides=("metric:accuracy", "metric:f1_score", "metric:precision", "metric:recall"),
        metrics=tuple(
            MetricInfo(name, "share", "max")
            for name in ("accuracy", "top_*_accuracy", "f1_score", "precision", "recall")
        ),
    )

    def __init__(self, top_k: Sequence[int] = ()) -> None:
        self.config = NoConfig()
        self._top_k = tuple(top_k)
        self._training: TrainingAccuracy | None = None

    @hookimpl
    def make_metrics(self, run: Run) -> Sequence[Metric]:
        """Shares of hits, and metrics by class."""
        self._training = TrainingAccuracy(AccuracyMetric(device=run.device))
        return [
            AnswerMetric(AccuracyMetric(self._top_k, device=run.device), {}),
            AnswerMetric(ClassMetric(tuple(NAMES.values()), device=run.device), NAMES),
        ]

    @hookimpl
    def on_outputs(self, run: Run, step: Step, batch: Batch, outputs: Any) -> None:
        """Count the answers when a log line is due; a loss that runs the model shows none."""
        del run
        if step.logs and self._training is not None and of_classes(batch, outputs):
            self._training.take(step, batch, outputs)

    @hookimpl
    def log_metrics(self, run: Run, step: Step) -> Mapping[str, Tensor | None]:
        """The accuracy of the step that the line is of."""
        del step
        return {} if self._training is None else self._training.metrics(run)


class _NothingSteps:
    """The optimizer of a session that trains nothing."""

    info = PluginInfo(name="nothing_steps", kind=Kind.OPTIMIZER, config=NoConfig)

    def __init__(self) -> None:
        self.config = NoConfig()

    @hookimpl
    def make_optimizer(
        self, run: Run, parameters: Sequence[tuple[str, nn.Parameter]]
    ) -> torch.optim.Optimizer:
        """One over a number of its own."""
        del run, parameters
        return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.0)


class Measuring:
    """Validates a model, again and again.

    Args:
        model: its modes are left as they are found.
        device: where to.
        top_k: also the share of targets among the k likeliest classes.
    """

    def __init__(
        self, model: nn.Module, device: torch.device | str, top_k: Sequence[int] = ()
    ) -> None:
        self._model, self._device, self._top_k = model, torch.device(device), tuple(top_k)
        self._loss = CallersLoss(predicts=True)
        self._loader: Iterable[Any] = ()
        self._session: Session | None = None

    @staticmethod
    def validator(top_k: Sequence[int] = ()) -> Metrics:
        """The validator that another run is to have, for the same metrics."""
        return Metrics(top_k)

    def __iter__(self) -> Any:
        """The batches of the pass that is due; the session's data are this object."""
        return iter(self._loader)

    def _opened(self) -> Session:
        if self._session is None:
            modes = [(module, module.training) for module in self._model.modules()]
            parts = [
                InMemoryModel(self._model),
                InMemoryData(CallersData((), cast(Any, self))),
                _NothingSteps(),
                self._loss,
                Metrics(self._top_k),
            ]
            settings = RunConfig(name="validation", seed=None, device=str(self._device))
            session = Session.of(parts, settings, quiet=True)
            try:
                session.opened()
            finally:
                for module, mode in modes:
                    module.training = mode
            self._session = session
        return self._session

    def metrics(
        self, loader: Iterable[Any], loss_fn: LossFunction, loss_form: str | None = None
    ) -> dict[str, float]:
        """`loss` and, where the targets are classes, `accuracy`, `f1_score`, `precision`, `recall`.

        All are over the whole loader. What is not finite is left out.
        """
        self._loss.use(loss_fn, loss_form)
        self._loader = loader
        try:
            result = self._opened().validate()
        finally:
            self._loader = ()
        return {name: value for name, value in result.items() if math.isfinite(value)}
