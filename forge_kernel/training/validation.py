"""Validation: one pass over the validation data, with random streams of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from forge_kernel.contract.answers import are_metrics_of_validation, shown
from forge_kernel.contract.metric_info import Goal, MetricInfos
from forge_kernel.contract.metrics import Metric
from forge_kernel.contract.plugin import Kind
from forge_kernel.contract.run import Run
from forge_kernel.contract.seeds import stream_seed
from forge_kernel.contract.values import Batch
from forge_kernel.errors import PluginError
from forge_kernel.planning.plan import Plan, Planned
from forge_kernel.storage.random_state import StreamState
from forge_kernel.training.accumulation import TermMean
from forge_kernel.training.awaited_metrics import AwaitedMetrics
from forge_kernel.training.bus import Bus
from forge_kernel.training.events import pass_events
from forge_kernel.training.forward_pass import ForwardPass, joined, term_means
from forge_kernel.training.loaders.random_streams import RunStreams


class Validation:
    """The validations of a run that is set up.

    Args:
        forward: outputs and loss of a batch.
        bus: of the run.
        plan: what runs.
        streams: the run's random streams.

    Attributes:
        at: the step that was validated last; -1: none, or the weights are others since.
        cancelled: asked between two batches whether to leave the rest; None: never.
        cut: a validation was left so, and is to be done when the run goes on.
    """

    def __init__(
        self,
        forward: ForwardPass,
        bus: Bus,
        plan: Plan,
        streams: RunStreams,
    ) -> None:
        self.forward, self.bus, self.plan, self.streams = forward, bus, plan, streams
        self.run: Run = forward.run
        self.at = -1
        self.cancelled: Callable[[], bool] | None = None
        self.cut = False
        self._awaited = AwaitedMetrics(plan)
        self._draws = stream_seed(self.run.seed, "validation")
        self._metrics: list[Metric] = [
            metric for answer in bus.calls("make_metrics") for metric in answer(self.run)
        ]
        goals: dict[str, Goal] = {}
        for metric in self._metrics:
            goals |= getattr(metric, "goals", {})
        self.run.metrics.declare(
            MetricInfos(info for entry in plan.entries for info in entry.info.metrics), goals
        )

    def check(self) -> None:
        """Refuse plugins that would wait for ever for a metric.

        Raises:
            PluginError: naming them.
        """
        self._awaited.check(self.run.data)

    def pass_over(self) -> dict[str, float]:
        """One pass over the validation data; model modes are left as they were.

        Returns:
            The metrics over the whole set; empty when there is no validation data, or the run was
            cancelled meanwhile.
        """
        run = self.run
        self.cut = False
        with self._evaluating(self.evaluation_model()) as turn:
            metrics = self._computed(run.data.validation(), turn)
        if self.cut:
            return {}
        self.at = run.progress.step
        self._awaited.look(run, metrics)
        if metrics:
            unfinished = self.unfinished()
            run.metrics.record_validation(metrics, best=not unfinished)
            entries = self.plan.answering("on_validation")
            seen = MappingProxyType(metrics)  # what one listener wrote, the next would believe
            for entry, listen in zip(entries, self.bus.calls("on_validation"), strict=True):
                if not unfinished or self._hears_unfinished(entry):
                    listen(run, seen)
        pass_events(self.run, self.bus)
        return metrics

    @contextmanager
    def _evaluating(self, model: nn.Module) -> Iterator[Callable[[], None]]:
        """A stretch of evaluation; model modes and random streams are left as they were."""
        run = self.run
        run.active_model = model
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            # whatever a validation draws, each one draws the same, and training draws on as if
            # there had been none
            own = StreamState.seeded(self._draws)
            with self.streams.drawing(own) as turn, torch.no_grad():
                yield turn
        finally:
            run.active_model = run.model
            for module, mode in modes:
                module.training = mode

    def try_batch(self, batch: Batch) -> None:
        """Outputs, loss and metrics of one batch on the device, as a validation has them.

        Nothing is told and nothing kept: what is raised is what is wanted.
        """
        with self._evaluating(self.run.model) as turn:
            _ = self._computed([batch], turn)
            for metric in self._metrics:
                metric.reset()

    def try_outputs(self, batch: Batch) -> Any:
        """What the model gives for one batch on the device, as a validation has it."""
        with self._evaluating(self.run.model), self.forward.arithmetic():
            return self.forward.outputs(batch)

    def _computed(self, batches: Iterable[Any], turn: Callable[[], None]) -> dict[str, float]:
        run = self.run
        for metric in self._metrics:
            metric.reset()
        # of each term of the loss: sum of weighted means, sum of weights; then the batches:
        # exact however they are shared out
        total: Tensor | None = None
        terms: list[TermMean] = []
        for item in batches:
            batch = self.forward.to_device(item)
            answer, outputs = self.forward.validation_loss(batch)
            terms = self._terms_of(answer, batch)
            if total is None:
                total = torch.zeros(2 * len(terms) + 1, dtype=torch.float64, device=run.device)
            for index, term in enumerate(terms):
                total[2 * index] += term.mean.double() * term.weight
                total[2 * index + 1] += term.weight
            total[-1] += 1
            loss, weight = joined(terms)
            for metric in self._metrics:
                metric.update(batch, outputs, loss, weight)
            if self.cancelled is not None and self.cancelled():
                self.cut = True
                return {}
            turn()
        if total is None:
            total = torch.zeros(3, dtype=torch.float64, device=run.device)
        # all ranks add up, also one whose share was empty: the others wait for it
        *sums, seen = run.strategy.reduce(total).tolist()
        if not seen:
            return {}
        metrics: dict[str, float] = {}
        if any(sums[1::2]):
            scales = [float(term.scale) for term in terms] or [1.0]
            means = [
                total / weight if weight else 0.0
                for total, weight in zip(sums[::2], sums[1::2], strict=True)
            ]
            metrics["loss"] = sum(scale * mean for scale, mean in zip(scales, means, strict=True))
        for metric in self._metrics:
            result = metric.compute(run.strategy.reduce)
            if not are_metrics_of_validation(result):
                raise PluginError(
                    f"{self.bus.giver_of(metric)}: {type(metric).__name__}.compute returned "
                    f"{shown(result)}: give a mapping of names to numbers"
                )
            metrics.update(result)
        return metrics

    def _terms_of(self, answer: Any, batch: Batch) -> list[TermMean]:
        try:
            return term_means(answer, batch)
        except Exception as error:
            self.forward.judge_loss(answer, error)
            raise

    def unfinished(self) -> list[str]:
        """Why the network is not yet what will be exported; empty when it is."""
        answers = [answer(self.run) for answer in self.bus.calls("unfinished")]
        return [reason for reason in answers if reason]

    def _hears_unfinished(self, entry: Planned) -> bool:
        """Whether a plugin is told the metrics of a network that is not yet finished."""
        if entry.info.kind is not Kind.CALLBACKS or entry.info.hears_unfinished:
            return True
        asked = getattr(entry.config, "not_before", None)
        return asked is not None and self.run.progress.step >= asked

    def evaluation_model(self) -> nn.Module:
        """The model that validation and export use."""
        choose = self.bus.call("compute_evaluation_model")
        return self.run.model if choose is None else choose(self.run)
