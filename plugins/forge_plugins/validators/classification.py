"""How many answers are right, over a whole validation set and in each line of the log."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal

from msgspec import Meta

from forge_kernel.api import (
    Batch,
    Kind,
    LazyModule,
    Metric,
    MetricInfo,
    PluginInfo,
    Run,
    RunResult,
    Step,
    hookimpl,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from forge_plugins.mathematics.metrics import classification, label_positions
    from forge_plugins.mathematics.metrics.classification import ByClass
else:
    torch = LazyModule("torch")
    label_positions = LazyModule("forge_plugins.mathematics.metrics.label_positions")
    classification = LazyModule("forge_plugins.mathematics.metrics.classification")


FILE: Final = "confusion.json"
RECORD: Final[dict[str, Any]] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "description": "confusion.json: what was answered in the last validation of a run",
    "type": "object",
    "properties": {
        "step": {"type": "integer", "minimum": 0, "description": "of the validation"},
        "labels": {
            "type": ["array", "null"],
            "items": {"type": "string"},
            "description": "names of the classes by number, where the data have names",
        },
        "counts": {
            "type": "array",
            "items": {"type": "array", "items": {"type": "number", "minimum": 0}},
            "description": "rows: the class that was wanted; columns: the class that was answered",
        },
    },
    "required": ["counts", "labels", "step"],
    "additionalProperties": False,
}


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig:
    """Which further metrics, and of what."""

    renamed: ClassVar[Mapping[str, str]] = {"ignore": "run.ignore_index"}

    top_k: Annotated[
        tuple[Annotated[int, Meta(ge=2)], ...],
        Meta(description="also the share of targets among the k likeliest classes, for these k"),
    ] = ()
    by_class: Annotated[
        tuple[
            Literal[
                "f1", "precision", "recall", "f1_micro", "precision_micro", "recall_micro",
                "f1_weighted",
            ],
            ...,
        ],
        Meta(
            description="also these: means over the classes that occur in targets or answers "
            "(macro), weighted by their targets, or over all answers alike (micro)"
        ),
    ] = ()  # fmt: skip
    confusion_classes: Annotated[
        int,
        Meta(ge=0, le=1000, description="up to so many classes, which was answered for which is "
             "counted, for confusion.json and the report; 0: never"),
    ] = 100  # fmt: skip
    in_training: Annotated[
        bool,
        Meta(description="also the accuracy of the training batches of a step that ends a log "
             "interval, as the model was before the update"),
    ] = True  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("top_k", "by_class"):
            asked = getattr(self, name)
            if len(set(asked)) < len(asked):
                raise ValueError(f"{name} {list(asked)} names one twice")


def metrics(config: ClassificationConfig) -> tuple[str, ...]:
    """Names of the metrics that a configuration gives."""
    return ("accuracy", *(f"top_{k}_accuracy" for k in config.top_k), *config.by_class)


class ClassMetric:
    """Counts hits, answers and targets of each class over the whole set.

    Args:
        names: of metrics by class.
        device: where the counts of a process without a batch stand.
    """

    def __init__(self, names: Sequence[ByClass], device: Any = "cpu") -> None:
        self._names = tuple(names)
        self._device = device
        self._counts: Tensor | None = None

    def reset(self) -> None:
        """Begin a pass."""
        self._counts = None

    def update(self, batch: Batch, outputs: Any, loss: Tensor, weight: float | Tensor) -> None:
        """Count."""
        del loss, weight
        weights = batch.counted.weights
        pieces = label_positions.answer_pieces(outputs, batch.targets, batch.positions)
        for logits, targets, rows in pieces:
            own = None if weights is None else weights[rows]
            result = classification.class_counts(logits, targets, own)
            self._counts = result if self._counts is None else self._counts + result

    def compute(self, add: Callable[[Tensor], Tensor]) -> Mapping[str, float]:
        """Shares in [0, 1]; nothing when no target was seen.

        A process without a batch learns from the others how many classes there are, so that all
        add up alike.
        """
        own = self._counts
        about = [0, 0] if own is None else [own.shape[1], 1]
        classes, having = add(torch.tensor(about, device=self._device)).tolist()
        if not having:
            return {}
        if own is None:
            own = classification.no_counts((3, classes // having), self._device)
        return classification.class_metrics(add(own), self._names)


class AccuracyMetric:
    """Counts over the whole set, never a mean of batch means.

    Args:
        top_k: numbers of classes among which the target may be.
        device: where the counts stand.
    """

    def __init__(self, top_k: Sequence[int] = (), device: Any = "cpu") -> None:
        self._ranks = (1, *top_k)
        self._device = device
        self._counts: Tensor | None = None

    def _names(self) -> list[str]:
        return ["accuracy" if k == 1 else f"top_{k}_accuracy" for k in self._ranks]

    def reset(self) -> None:
        """Begin a pass."""
        self._counts = None

    def update(self, batch: Batch, outputs: Any, loss: Tensor, weight: float | Tensor) -> None:
        """Count targets found; outputs (..., classes) against integer targets (...)."""
        del loss, weight
        weights = batch.counted.weights
        pieces = label_positions.answer_pieces(outputs, batch.targets, batch.positions)
        for logits, targets, rows in pieces:
            own = None if weights is None else weights[rows]
            result = classification.hit_counts(logits, targets, self._ranks, own)
            self._counts = result if self._counts is None else self._counts + result

    def counts(self) -> Tensor:
        """Targets found for each k, then all targets; zeros before the first batch."""
        if self._counts is not None:
            return self._counts
        return classification.no_counts((len(self._ranks) + 1,), self._device)

    def compute(self, add: Callable[[Tensor], Tensor]) -> Mapping[str, float]:
        """Shares in [0, 1]; nothing when no target was seen."""
        *hits, total = add(self.counts()).tolist()
        if not total:
            return {}
        return {name: hit / total for name, hit in zip(self._names(), hits, strict=True)}


class ConfusionMetric:
    """Counts which class was answered where which was wanted; the counts are its result.

    Args:
        most: classes up to which there is a count.
        device: where the counts of a process without a batch stand.
    """

    def __init__(self, most: int, device: Any = "cpu") -> None:
        self._most, self._device = most, device
        self._counts: Tensor | None = None
        self.counts: list[list[float]] = []
        """Of the last whole pass: [target][answer]; empty where there were too many classes."""

    def reset(self) -> None:
        """Begin a pass."""
        self._counts = None

    def update(self, batch: Batch, outputs: Any, loss: Tensor, weight: float | Tensor) -> None:
        """Count."""
        del loss, weight
        weights = batch.counted.weights
        pieces = label_positions.answer_pieces(outputs, batch.targets, batch.positions)
        for logits, targets, rows in pieces:
            if logits.shape[-1] > self._most:
                return
            own = None if weights is None else weights[rows]
            result = classification.confusion_counts(logits, targets, own)
            self._counts = result if self._counts is None else self._counts + result

    def compute(self, add: Callable[[Tensor], Tensor]) -> Mapping[str, float]:
        """No metric: the counts stay in `counts`."""
        own = self._counts
        about = [0, 0] if own is None else [len(own), 1]
        classes, having = add(torch.tensor(about, device=self._device)).tolist()
        if having:
            size = classes // having
            none = classification.no_counts((size, size), self._device)
            self.counts = add(none if own is None else own).tolist()
        return {}


class TrainingAccuracy:
    """The accuracy of the window of a step that ends a log interval; no other step costs anything.

    Args:
        metric: takes in the window's batches.
    """

    def __init__(self, metric: AccuracyMetric) -> None:
        self._metric = metric
        self._step = 0  # the step that was counted

    def take(self, step: Step, batch: Batch, outputs: Any) -> None:
        """Count a micro-batch, without a read to the host."""
        if step.number != self._step:
            self._step = step.number
            self._metric.reset()
        with torch.no_grad():
            self._metric.update(batch, outputs, outputs, 1.0)

    def metrics(self, run: Run) -> Mapping[str, Tensor | None]:
        """`accuracy` (0-d) over all processes; None for another step than the one counted."""
        if run.progress.step != self._step:
            return {"accuracy": None}
        hits, total = run.strategy.reduce(self._metric.counts())
        return {"accuracy": hits / total}  # without a target: 0 / 0, which is "not measured"


class Classification:
    """Accuracy, F1, precision, recall and top-k over the whole validation set.

    Where the run has a folder, `confusion.json` there says which class was answered for which.
    """

    info = PluginInfo(
        name="classification",
        kind=Kind.VALIDATORS,
        config=ClassificationConfig,
        provides=lambda config: tuple(f"metric:{name}" for name in metrics(config)),
        metrics=(
            MetricInfo("accuracy", "share", "max"),
            MetricInfo("top_*_accuracy", "share", "max"),
            *(
                MetricInfo(f"{name}{mean}", "share", "max", title=title + how)
                for name, title in (("f1", "F1"), ("precision", "Precision"), ("recall", "Recall"))
                for mean, how in (("", ""), ("_micro", ", micro"), ("_weighted", ", weighted"))
            ),
        ),
        requires=("data:classes",),
        records={"confusion": RECORD},
    )

    def __init__(self, config: ClassificationConfig) -> None:
        self.config = config
        self._training: TrainingAccuracy | None = None
        self._confusion: ConfusionMetric | None = None
        self._validated = 0  # the step of the last validation

    @hookimpl
    def make_metrics(self, run: Run) -> Sequence[Metric]:
        """One metric for shares of hits, one for metrics by class."""
        config, device = self.config, run.device
        if config.in_training:
            self._training = TrainingAccuracy(AccuracyMetric((), device))
        metrics: list[Metric] = [AccuracyMetric(config.top_k, device)]
        if config.by_class:
            metrics.append(ClassMetric(config.by_class, device))
        if config.confusion_classes:
            self._confusion = ConfusionMetric(config.confusion_classes, device)
            metrics.append(self._confusion)
        return metrics

    @hookimpl
    def on_validation(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Remember of which step the counts are."""
        del metrics
        self._validated = run.progress.step

    @hookimpl
    def on_run_end(self, run: Run, result: RunResult) -> None:
        """Write what was answered, before the report is made.

        Raises:
            OSError: it cannot be written.
        """
        del result
        counts = [] if self._confusion is None else self._confusion.counts
        if run.folder is None or not counts or run.strategy.rank:
            return
        names = run.data.spec.labels
        fits = names is not None and len(names) == len(counts)
        about = {
            "step": self._validated,
            "labels": list(names) if names is not None and fits else None,
            "counts": [[int(n) if n == int(n) else n for n in row] for row in counts],
        }
        (run.folder / FILE).write_text(json.dumps(about) + "\n", encoding="utf-8")

    @hookimpl
    def on_outputs(self, run: Run, step: Step, batch: Batch, outputs: Any) -> None:
        """Count the answers when a log line is due."""
        del run
        if step.logs and self._training is not None:
            self._training.take(step, batch, outputs)

    @hookimpl
    def log_metrics(self, run: Run, step: Step) -> Mapping[str, Tensor | None]:
        """The accuracy of the step that the line is of."""
        del step
        return {} if self._training is None else self._training.metrics(run)
