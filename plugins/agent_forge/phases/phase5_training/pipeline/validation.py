"""Metrics over whole sets, their history, and the machine's readings while they are made."""

from __future__ import annotations

import enum
import math
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final

import torch
from msgspec import Meta
from torch import Tensor, nn

from agent_forge.phases.phase5_training.configuration import Configuration, SettingError
from agent_forge.phases.phase5_training.loss_call import LossFunction
from agent_forge.phases.phase5_training.measuring import Measuring
from agent_forge.phases.phase5_training.training_settings import goal_of
from forge_kernel.api import Batch, RunError
from forge_kernel.embedding import write_json
from forge_plugins.callbacks.improvement import Improvement
from forge_plugins.mathematics.metrics import language_model
from forge_plugins.mathematics.metrics.batch_size import samples_in
from forge_plugins.observers.system_stats import SystemStats
from forge_plugins.validators.classification import AccuracyMetric, ClassMetric

HISTORY: Final = 1000  # validations and readings kept
READING_SECONDS: Final = 0.5


class ValidationMode(enum.Enum):
    """What a batch is of."""

    TRAINING = "training"
    VALIDATION = "validation"
    TEST = "test"
    INFERENCE = "inference"


class MetricType(enum.Enum):
    """The metrics there are; `top_<k>_accuracy` beside them."""

    ACCURACY = "accuracy"
    LOSS = "loss"
    F1_SCORE = "f1_score"
    PRECISION = "precision"
    RECALL = "recall"
    PERPLEXITY = "perplexity"


class ValidationConfig(Configuration):
    """How often, which metrics, when to stop."""

    without_meaning: ClassVar[Mapping[str, str]] = {
        "realtime_plotting": "the kernel shows a run live: forge watch RUN_DIR --serve",
        "distributed_validation": "one process validates",
        "validation_world_size": "one process validates",
        "log_frequency": "TrainingConfig.log_interval has the interval of the log",
        "checkpoint_frequency": "TrainingConfig.save_interval has the interval of checkpoints",
    }

    validation_frequency: Annotated[int, Meta(ge=1)] = 1000  # steps; at least once in an epoch
    validation_steps: Annotated[int, Meta(ge=1)] | None = None  # batches at most; None: all
    validation_patience: Annotated[int, Meta(ge=1)] = (
        10  # another name of early_stopping_patience, when it is set
    )
    primary_metric: str = "accuracy"
    metrics_to_track: list[str] = field(default_factory=lambda: ["accuracy", "loss", "f1_score"])
    memory_monitoring: bool = True
    gpu_monitoring: bool = True
    throughput_monitoring: bool = True
    early_stopping_enabled: bool = True
    early_stopping_patience: Annotated[int, Meta(ge=1)] = 20
    early_stopping_min_delta: Annotated[float, Meta(ge=0)] = 1e-4
    save_best_model: bool = True
    checkpoint_frequency: int = 5000
    realtime_plotting: bool = False
    log_frequency: int = 100
    distributed_validation: bool = False
    validation_world_size: int = 1

    def check(self) -> None:
        """Also: every metric is one that can be measured."""
        super().check()
        assert self.patience >= 1
        for name in (*self.metrics_to_track, self.primary_metric):
            check_metric(name)

    @property
    def patience(self) -> int:
        """Validations without a better metric before a stop.

        Raises:
            SettingError: its two names were given two values.
        """
        if not self.given("validation_patience"):
            return self.early_stopping_patience
        both = self.given("early_stopping_patience")
        if both and self.validation_patience != self.early_stopping_patience:
            raise SettingError(
                f"validation_patience {self.validation_patience} and early_stopping_patience "
                f"{self.early_stopping_patience} mean the same: set one of them"
            )
        return self.validation_patience

    def top_k(self) -> tuple[int, ...]:
        """The k of each `top_<k>_accuracy` that is asked for."""
        asked = dict.fromkeys((*self.metrics_to_track, self.primary_metric))
        return tuple(int(name.split("_")[1]) for name in asked if _is_top_k(name))


def _is_top_k(name: str) -> bool:
    parts = name.split("_")
    return len(parts) == 3 and parts[::2] == ["top", "accuracy"] and parts[1].isdecimal()


def check_metric(name: str) -> None:
    """Refuse a metric that nothing measures.

    Raises:
        SettingError: there is no such metric.
    """
    known = [item.value for item in MetricType]
    if name in known or (_is_top_k(name) and int(name.split("_")[1]) >= 2):
        return
    hint = "; bleu needs texts, and a batch has numbers" if name.startswith("bleu") else ""
    raise SettingError(f"there is no metric '{name}': {', '.join(known)} or top_<k>_accuracy{hint}")


class MetricCalculator:
    """Metrics of one set of predictions; all its samples at once."""

    @staticmethod
    def _batch(predictions: Tensor, targets: Tensor) -> Batch:
        if len(predictions) != len(targets) or not len(targets):
            raise RunError(f"{len(predictions)} predictions for {len(targets)} targets")
        return Batch(None, targets)

    @classmethod
    def _by_class(cls, predictions: Tensor, targets: Tensor) -> Mapping[str, float]:
        metric = ClassMetric(("f1", "precision", "recall"))
        metric.reset()
        batch = cls._batch(predictions, targets)
        metric.update(batch, predictions, predictions.new_zeros(()), 1.0)
        return metric.compute(lambda value: value)

    @classmethod
    def accuracy(cls, predictions: Tensor, targets: Tensor) -> float:
        """Share of rows of logits (n, classes) whose largest is the target (n)."""
        return float(cls._hits(predictions, targets, ())["accuracy"])

    @classmethod
    def top_k_accuracy(cls, predictions: Tensor, targets: Tensor, k: int = 5) -> float:
        """Share of targets among the k likeliest classes."""
        if k == 1:
            return cls.accuracy(predictions, targets)
        return float(cls._hits(predictions, targets, (k,))[f"top_{k}_accuracy"])

    @classmethod
    def _hits(
        cls, predictions: Tensor, targets: Tensor, top_k: tuple[int, ...]
    ) -> Mapping[str, float]:
        metric = AccuracyMetric(top_k)
        metric.reset()
        batch = cls._batch(predictions, targets)
        metric.update(batch, predictions, predictions.new_zeros(()), 1.0)
        return metric.compute(lambda value: value)

    @classmethod
    def f1_score(cls, predictions: Tensor, targets: Tensor) -> float:
        """The mean over the classes that occur (macro)."""
        return cls._by_class(predictions, targets)["f1"]

    @classmethod
    def precision_recall(cls, predictions: Tensor, targets: Tensor) -> tuple[float, float]:
        """Both as means over the classes that occur."""
        result = cls._by_class(predictions, targets)
        return result["precision"], result["recall"]

    @staticmethod
    def perplexity(loss: float) -> float | None:
        """exp(loss) of a mean cross-entropy in nats; None where it is no finite number."""
        result = language_model.perplexity(loss)
        return result if math.isfinite(result) else None

    @staticmethod
    def bleu_score(*texts: Any) -> float:
        """Refused: predictions here are numbers.

        Raises:
            RunError: always.
        """
        del texts
        raise RunError("bleu_score compares texts, which this pipeline does not generate")


class PerformanceMonitor:
    """Reads memory, processor and throughput now and then, in a thread of its own.

    Args:
        config: what is read.
        device: whose memory is read.
    """

    def __init__(
        self, config: ValidationConfig | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.config = config or ValidationConfig()
        self.history: deque[dict[str, float | None]] = deque(maxlen=HISTORY)
        self._machine = SystemStats(torch.device(device))
        self._samples = 0
        self._seconds = 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        """Whether the thread is alive."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Begin to read; a second call changes nothing."""
        if self.running:
            return
        self._stop.clear()
        self._thread = threading.Thread(target=self._read_on, name="phase5-monitor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; twice is fine."""
        self._stop.set()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()

    def _read_on(self) -> None:
        self.read()
        while not self._stop.wait(READING_SECONDS):
            self.read()

    def count(self, samples: int, seconds: float) -> None:
        """Take in so many samples in so much wall time."""
        self._samples += samples
        self._seconds += seconds

    def read(self) -> dict[str, float | None]:
        """One reading, kept; what is not there or not asked for is None."""
        config = self.config
        load, memory = self._machine.load(), self._machine.memory()
        result: dict[str, float | None] = {
            "time": time.time(),
            "cpu_percent": load["cpu_percent"],
            "samples_per_second": None,
        }
        for name, value in {**memory, "device_percent": load["device_percent"]}.items():
            asked = config.gpu_monitoring if "device" in name else config.memory_monitoring
            result[name] = value if asked else None
        if config.throughput_monitoring and self._seconds > 0:
            result["samples_per_second"] = self._samples / self._seconds
        self.history.append(result)
        return result


class RealTimeValidator:
    """Validates the caller's model and remembers.

    Args:
        model: its modes are left as they are found.
        config: closed at the first validation.
        device: where to; a string or a torch.device.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ValidationConfig | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.model = model
        self.config = config or ValidationConfig()
        self.device = torch.device(device)
        self.monitor = PerformanceMonitor(self.config, self.device)
        self.step_count = 0
        self.total_validations = 0
        self.history: deque[dict[str, Any]] = deque(maxlen=HISTORY)
        self._best: Improvement | None = None
        self._waited = 0
        self._measuring: Measuring | None = None

    # -- monitoring -----------------------------------------------------------------------------

    def start_monitoring(self) -> None:
        """Read the machine in a thread; a second call changes nothing."""
        self.monitor.start()

    def stop_monitoring_thread(self) -> None:
        """End the thread; twice is fine."""
        self.monitor.stop()

    # -- validating -----------------------------------------------------------------------------

    def validate_step(
        self,
        batch: Any,
        loss_fn: LossFunction,
        mode: ValidationMode = ValidationMode.VALIDATION,
        loss_form: str | None = None,
    ) -> dict[str, float]:
        """The metrics of one batch; those of a validation are remembered."""
        metrics = self._measure([batch], loss_fn, loss_form)
        if mode is ValidationMode.VALIDATION:
            self.record(metrics)
        return self._tracked(metrics)

    def run_validation(
        self,
        val_loader: Iterable[Any],
        loss_fn: LossFunction,
        num_steps: int | None = None,
        loss_form: str | None = None,
    ) -> dict[str, float]:
        """The metrics over a whole loader, however uneven its batches, remembered.

        Args:
            val_loader: an iterable of batches.
            loss_fn: `(predictions, targets)`, `(batch)` or `(model, batch)`.
            num_steps: batches at most; the configuration's `validation_steps` otherwise.
            loss_form: overrides what the signature of `loss_fn` says.
        """
        limit = num_steps or self.config.validation_steps
        metrics = self._measure(islice(val_loader, limit), loss_fn, loss_form)
        self.record(metrics)
        return self._tracked(metrics)

    def _measure(
        self, batches: Iterable[Any], loss_fn: LossFunction, loss_form: str | None
    ) -> dict[str, float]:
        self.config.lock("cannot be changed after the first validation")
        if self._measuring is None:
            self._measuring = Measuring(self.model, self.device, self.config.top_k())
        counted = _Counted(batches)
        begun = time.perf_counter()
        metrics = self._measuring.metrics(counted, loss_fn, loss_form)
        self.monitor.count(counted.samples, time.perf_counter() - begun)
        return self._with_perplexity(metrics)

    def _with_perplexity(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The metrics, and the one that is taken from the loss where it is asked for."""
        asked = "perplexity" in (*self.config.metrics_to_track, self.config.primary_metric)
        result = MetricCalculator.perplexity(metrics.get("loss", math.nan)) if asked else None
        return {**metrics, **({} if result is None else {"perplexity": result})}

    def _tracked(self, metrics: Mapping[str, float]) -> dict[str, float]:
        names = dict.fromkeys(("loss", *self.config.metrics_to_track, self.config.primary_metric))
        return {name: metrics[name] for name in names if name in metrics}

    def record(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Remember a validation, whoever made it.

        Args:
            metrics: `loss`, `accuracy`, ...
            step: of the training; the number of the validation otherwise.
        """
        self.total_validations += 1
        self.step_count = self.step_count + 1 if step is None else step
        known = self._with_perplexity(metrics)
        names = ("loss", *self.config.metrics_to_track, self.config.primary_metric)
        values = {name: known.get(name) for name in names}
        finite = {n: v if v is not None and math.isfinite(v) else None for n, v in values.items()}
        self.history.append({"step": self.step_count, "time": time.time(), "metrics": finite})
        self._judge(finite[self.config.primary_metric])

    def _judge(self, value: float | None) -> None:
        if self._best is None:
            goal = goal_of(self.config.primary_metric)
            self._best = Improvement(goal, self.config.early_stopping_min_delta)
        better = value is not None and self._best.better(value)
        self._waited = 0 if better else self._waited + 1

    def step(self) -> None:
        """Count one step of the caller's training."""
        self.step_count += 1

    def should_stop_early(self) -> bool:
        """Whether patience is over; never when early stopping is off."""
        enabled = self.config.early_stopping_enabled
        return enabled and self._waited >= self.config.patience

    # -- telling --------------------------------------------------------------------------------

    def get_validation_summary(self) -> dict[str, Any]:
        """What is known; None where nothing was measured."""
        latest = self.history[-1] if self.history else None
        readings = self.monitor.history
        return {
            "step_count": self.step_count,
            "best_metric_value": None if self._best is None else self._best.best,
            "no_improvement_count": self._waited,
            "should_stop_early": self.should_stop_early(),
            "total_validations": self.total_validations,
            "latest_metrics": dict(latest["metrics"]) if latest else None,
            "latest_timestamp": latest["time"] if latest else None,
            "system_performance": dict(readings[-1]) if readings else self.monitor.read(),
        }

    def export_results(self, path: str | Path) -> Path:
        """Write strict JSON: `config`, `validation_results`, `metrics_history`,
        `performance_history` and `summary`; see schemas/phase5/validation.json.

        The folder must be there.
        """
        file = Path(path)
        history = list(self.history)
        names = list(history[-1]["metrics"]) if history else []
        write_json(
            file,
            {
                "config": self.config.to_dict(),
                "validation_results": history,
                "metrics_history": {
                    name: [item["metrics"].get(name) for item in history] for name in names
                },
                "performance_history": list(self.monitor.history),
                "summary": self.get_validation_summary(),
            },
        )
        return file


class _Counted:
    """Counts the samples of the batches that pass."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches
        self.samples = 0

    def __iter__(self) -> Any:
        for batch in self._batches:
            self.samples += samples_in(batch)
            yield batch
