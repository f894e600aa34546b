"""A training loop over the caller's model and loaders: a kernel session, step by step or whole."""

from __future__ import annotations

import enum
import logging
import math
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from agent_forge.phases.phase5_training.live_plugins import live_plugins
from agent_forge.phases.phase5_training.loss_call import (
    Before,
    Callbacks,
    CallersBatch,
    CallersData,
    CallersLoss,
    CallersOptimizer,
    LossFunction,
)
from agent_forge.phases.phase5_training.measuring import Measuring
from agent_forge.phases.phase5_training.training_checkpoints import CheckpointManager
from agent_forge.phases.phase5_training.training_folder import TrainingFolder
from agent_forge.phases.phase5_training.training_identity import TrainingIdentity
from agent_forge.phases.phase5_training.training_settings import (
    TrainingConfig,
    fitted_warmup,
    goal_of,
    schedule_of,
)
from forge_kernel.api import RunError, RunResult, Use, UseCallback, UseGradients
from forge_kernel.embedding import (
    ConfigError,
    InMemoryData,
    InMemoryModel,
    RunConfig,
    Session,
    Snapshot,
    UseQuantizer,
    UseWrapper,
    optimizer_state,
    process_state_kept,
    result_of,
)
from forge_plugins.callbacks.improvement import Improvement
from forge_plugins.observers.system_stats import SystemStats
from forge_plugins.optimizers.adamw import AdamW
from forge_plugins.optimizers.adamw import AdamWConfig as AdamWSettings

__all__ = [
    "CheckpointManager",
    "EarlyStopping",
    "GradientAccumulator",
    "MemoryMonitor",
    "TrainingConfig",
    "TrainingLoop",
    "TrainingMetrics",
    "TrainingState",
]

log = logging.getLogger("agent_forge.phase5_training")


class TrainingState(enum.Enum):
    """Where a loop is."""

    INITIALIZED = "initialized"
    TRAINING = "training"
    VALIDATING = "validating"
    PAUSED = "paused"
    STOPPED = "stopped"
    ERROR = "error"


class GradientAccumulator:
    """Counts the micro-batches of a window.

    Args:
        accumulation_steps: micro-batches in one optimizer step.
    """

    def __init__(self, accumulation_steps: int = 1) -> None:
        if accumulation_steps < 1:
            raise ConfigError(f"accumulation_steps is {accumulation_steps}, at least 1 is needed")
        self.accumulation_steps = accumulation_steps
        self.count = 0

    def add(self) -> bool:
        """Count one micro-batch; whether it ends the window."""
        self.count = self.count % self.accumulation_steps + 1
        return self.count == self.accumulation_steps


class MemoryMonitor:
    """Bytes in use, as the operating system and the device's driver tell them.

    Args:
        max_usage_ratio: share of the memory there is that is still well.
    """

    def __init__(self, max_usage_ratio: float = 0.9, device: torch.device | str = "cpu") -> None:
        self.max_usage_ratio = max_usage_ratio
        self.device = torch.device(device)
        self._machine = SystemStats(self.device)

    def read(self) -> dict[str, float | None]:
        """Metrics now; what is not there is None."""
        return self._machine.memory()

    def over(self) -> list[str]:
        """The shares that are beyond what is well."""
        shares = {name: value for name, value in self.read().items() if name.endswith("_share")}
        return [
            f"{name} {value:.0%}"
            for name, value in shares.items()
            if value is not None and value > self.max_usage_ratio
        ]


class TrainingMetrics:
    """The latest values of metrics by name.

    Args:
        window_size: values kept of each.
    """

    def __init__(self, window_size: int = 100) -> None:
        self.window_size = window_size
        self._values: dict[str, deque[float]] = {}
        self._counts: dict[str, int] = {}

    def update(self, **metrics: float | None) -> None:
        """Take in metrics; what was not measured is left out."""
        for name, value in metrics.items():
            if value is None or not math.isfinite(value):
                continue
            kept = self._values.setdefault(name, deque(maxlen=self.window_size))
            kept.append(float(value))
            self._counts[name] = self._counts.get(name, 0) + 1

    def get_recent_average(self, name: str, window: int | None = None) -> float | None:
        """The mean of the latest values; None when there is none."""
        values = list(self._values.get(name, ()))[-(window or self.window_size) :]
        return sum(values) / len(values) if values else None

    def get_summary(self) -> dict[str, dict[str, float]]:
        """Of each metric: latest, mean over the window, and how many there were."""
        return {
            name: {
                "latest": values[-1],
                "mean": sum(values) / len(values),
                "count": self._counts[name],
            }
            for name, values in self._values.items()
        }


class EarlyStopping:
    """Says when a metric has not become better for a while.

    Args:
        patience: values without a better one.
        min_delta: better means by more than this.
        monitor: the metric; accuracy and alike are to rise, all else to fall.
    """

    def __init__(
        self, patience: int = 10, min_delta: float = 1e-4, monitor: str = "val_loss"
    ) -> None:
        self.patience, self.monitor = patience, monitor
        self._best = Improvement(goal_of(monitor), min_delta)
        self.counter = 0

    @property
    def best(self) -> float | None:
        """The best value so far."""
        return self._best.best

    def __call__(self, metrics: Mapping[str, float]) -> bool:
        """Take in metrics; whether to stop.

        Raises:
            RunError: the metric is not among them.
        """
        if self.monitor not in metrics:
            raise RunError(f"early stopping watches {self.monitor}, among {sorted(metrics)}")
        better = self._best.better(float(metrics[self.monitor]))
        self.counter = 0 if better else self.counter + 1
        return self.counter >= self.patience


class TrainingLoop:
    """Trains the caller's model.

    Args:
        model: trained in place.
        config: read when the first step is taken, and closed then.
        device: where to; a string or a torch.device.
        checkpoint_dir: the kernel's checkpoints; None: nothing is written.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainingConfig | None = None,
        device: torch.device | str = "cpu",
        checkpoint_dir: str | Path | None = None,
    ) -> None:
        self.model = model
        self.config = config or TrainingConfig()
        self.device = torch.device(device)
        self.checkpoint_dir = None if checkpoint_dir is None else Path(checkpoint_dir)
        self.optimizer: torch.optim.Optimizer | None = None
        self.metrics = TrainingMetrics()
        self.memory = MemoryMonitor(self.config.max_memory_usage, self.device)
        self.state = TrainingState.INITIALIZED
        self.global_step = self.epoch = 0  # over all calls
        self.result: RunResult | None = None
        self._accumulator = GradientAccumulator(self.config.gradient_accumulation_steps)
        self._callbacks: list[Any] = []
        self._loss = CallersLoss(predicts=True)
        self._session: Session | None = None
        self._before = Before()  # of the session that steps
        self._course: Snapshot | None = None  # where the last `train_epoch` ended
        self._measuring: Measuring | None = None

    def setup_optimizer(
        self, optimizer_class: type[torch.optim.Optimizer] | None = None, **options: Any
    ) -> torch.optim.Optimizer:
        """Make the optimizer; training does so itself when it was not done.

        Args:
            optimizer_class: AdamW with the configuration's values otherwise. It is told the
                configuration's rate, and what the program set of decay, betas and eps.
            options: of the class, in place of the configuration's values.

        Raises:
            RunError: steps have been taken with another one; SettingError: what was set is
                nothing that the class takes.
        """
        if self._session is not None:
            raise RunError("setup_optimizer() comes before the first step")
        self.model.to(self.device)
        config = self.config
        parameters = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        if optimizer_class is not None:
            chosen = {**config.optimizer_options(optimizer_class), **options}
            made = optimizer_class([p for _, p in parameters], **chosen)
        else:
            settings = {
                "lr": config.learning_rate,
                "betas": (config.beta1, config.beta2),
                "eps": config.eps,
                "weight_decay": config.weight_decay,
                "fused": config.use_fused_optimizer,
                **options,
            }
            made = AdamW(AdamWSettings(**settings)).make_optimizer(cast(Any, None), parameters)
        self.optimizer = made
        return made

    def add_callback(self, callback: Any) -> None:
        """Tell an object of steps and epochs: `on_step_end(step, metrics)`,
        `on_epoch_end(epoch, metrics)`, whichever it has.

        Raises:
            RunError: it has neither.
        """
        if not any(hasattr(callback, name) for name in ("on_step_end", "on_epoch_end")):
            raise RunError(f"{type(callback).__name__} has no on_step_end and no on_epoch_end")
        self._callbacks.append(callback)

    # -- step by step ---------------------------------------------------------------------------

    def train_step(
        self, batch: Any, loss_fn: LossFunction, loss_form: str | None = None
    ) -> dict[str, Any]:
        """One micro-batch; every `gradient_accumulation_steps`-th one updates the weights.

        Returns:
            `loss` (of the micro-batch), `learning_rate`, `grad_norm` (None between updates),
            `step` and `updated`.
        """
        self._loss.use(loss_fn, loss_form)
        session = self._stepping()
        progress = session.run.progress
        self._before.steps = self.global_step - progress.step
        if not self.model.training:
            self.model.train()
        last = self._accumulator.add()
        loss = session.accumulate(CallersBatch.of(batch), last=last)
        updated = session.update() if last else False
        metrics = session.log().metrics if updated else {}
        self.global_step = self._before.steps + progress.step
        rate = float(session.run.optimizer.param_groups[0]["lr"])
        result = {"loss": float(loss), "learning_rate": rate, "grad_norm": metrics.get("grad_norm")}
        self.metrics.update(**result)
        return {**result, "step": self.global_step, "updated": updated}

    def _stepping(self) -> Session:
        """The session of `train_step`, which has no end."""
        if self._session is None:
            settings = self._settings(log_every=1, seed=None)
            data = CallersData((), before=self._before)
            session = self._opened(settings, data, self._loss, None, None)
            session.opened().start()
            self._session = session
            self.state = TrainingState.TRAINING
        return self._session

    def validation_step(
        self, batch: Any, loss_fn: LossFunction, loss_form: str | None = None
    ) -> dict[str, float]:
        """The metrics of one batch; the model's mode is left as it was."""
        return self.validate([batch], loss_fn, loss_form)

    def validate(
        self, loader: Iterable[Any], loss_fn: LossFunction, loss_form: str | None = None
    ) -> dict[str, float]:
        """The metrics over a whole loader, however uneven its batches."""
        if self._measuring is None:
            self._measuring = Measuring(self.model, self.device)
        before, self.state = self.state, TrainingState.VALIDATING
        try:
            return self._measuring.metrics(loader, loss_fn, loss_form)
        finally:
            self.state = before

    # -- whole runs -----------------------------------------------------------------------------

    def train(
        self,
        train_loader: Iterable[Any],
        loss_fn: LossFunction,
        val_loader: Iterable[Any] | None = None,
        resume_from_checkpoint: bool = True,
        *,
        loss_form: str | None = None,
        cancel: Any = None,
    ) -> RunResult:
        """Train for the configuration's epochs, from the configured rate on.

        Random numbers start from torch's generator as it stands, so that `torch.manual_seed`
        before repeats the run; the generator is left one draw further.

        A training that was stopped or killed goes on from the newest checkpoint of
        `checkpoint_dir`; one that came to its end there is not made again for the same model and
        data. Checkpoints of an ended training of another model, other weights or other data are set
        aside, and the training begins anew; both is told. Of one that has not ended they are not
        touched: that is refused, except for other weights of the same network, which a program that
        draws them anew has at each start (told).

        Args:
            train_loader: an iterable of batches.
            loss_fn: `(predictions, targets)`, `(batch)` or `(model, batch)`. What it has to be
                trained itself is.
            val_loader: validated every `eval_interval` steps, at least after each epoch.
            resume_from_checkpoint: False: begin anew; what the folder holds is set aside.
            loss_form: overrides what the signature of `loss_fn` says.
            cancel: an event that stops the run at a step's edge.

        Raises:
            RunError: see `form_of`, and above; and what the model, the loader or the loss raise.
        """
        self._course = None
        data = CallersData(train_loader, val_loader or (), before=self._counts())
        loss = CallersLoss(loss_fn, loss_form, predicts=True)
        folder = None
        if self.checkpoint_dir is not None:
            own = self.result is not None and self.result.outcome == "stopped"
            identity = TrainingIdentity.of(self.model, train_loader)
            folder = TrainingFolder(self.checkpoint_dir, identity, self.config.epochs, own=own)
            if resume_from_checkpoint:
                folder.check()
            else:
                folder.set_aside("resume_from_checkpoint is off")
        about = {} if folder is None else folder.about()
        session = self._whole(data, loss, self.config.epochs, cancel, about)
        return self._trained(session, data.before, folder)

    def train_epoch(
        self, train_loader: Iterable[Any], loss_fn: LossFunction, loss_form: str | None = None
    ) -> RunResult:
        """The next one of the configuration's epochs.

        `epochs` calls are `train`: rates, phases, memories and counts go on from call to call. Each
        draws its random numbers from torch's generator as it stands.
        """
        before = self._counts()
        course, epoch = self._course, 0
        if course is not None:
            epoch = int(course.trees["progress"]["epoch"])
            before = Before(before.steps - course.step, before.epochs - epoch)
        elif self.checkpoint_dir is not None:
            TrainingFolder(self.checkpoint_dir, None, 0).set_aside("train_epoch() begins anew")
        loss = CallersLoss(loss_fn, loss_form, predicts=True)
        session = self._whole(CallersData(train_loader, before=before), loss, epoch + 1, None, {})
        result = self._trained(session, before, None, course)
        ended = session.snapshot()
        self._course = Snapshot(ended.step, {}, {**ended.trees, "optimizer": {}}, {})
        return result

    def _counts(self) -> Before:
        return Before(self.global_step, self.epoch)

    def _whole(
        self, data: CallersData, loss: CallersLoss, epochs: int, cancel: Any,
        about: Mapping[str, Any],
    ) -> Session:  # fmt: skip
        """A session that ends by itself, after so many epochs; the schedule knows all of them."""
        seed = int(torch.randint(2**32, ()).item())
        size, windows = self.config.gradient_accumulation_steps, self._windows(data)
        every = self.config.eval_interval
        settings = self._settings(
            seed=seed,
            max_epochs=epochs,
            accumulate=size,
            log_every=self.config.log_interval,
            validate_every=every if windows is None else max(1, min(every, windows)),
            save_every=self.config.save_interval if self.checkpoint_dir else None,
        )
        if windows is None and self.config.scheduler_type != "constant":
            log.warning(
                "the loader does not say how many batches it has: the rate cannot fall over the "
                "run's length, and stays after the warm-up"
            )
        total = None if windows is None else windows * self.config.epochs
        return self._opened(settings, data, loss, total, cancel, about)

    def _windows(self, data: CallersData) -> int | None:
        """Optimizer steps of an epoch, where that is known."""
        size, batches = self.config.gradient_accumulation_steps, data.batches_per_epoch
        return None if batches is None else -(-batches // size)

    def _trained(
        self, session: Session, before: Before, folder: TrainingFolder | None,
        course: Snapshot | None = None,
    ) -> RunResult:  # fmt: skip
        """Run a session from where its folder or course is to its end."""
        self.state = TrainingState.TRAINING
        run = session.run
        try:
            with process_state_kept():
                session.opened(resume=folder is not None and folder.continues(session))
                for problem in session.problems:
                    log.warning("a checkpoint cannot be used: %s", problem)
                if folder is None:
                    self._go_on(session, course)
                session.start()
                session.train()
                exports = session.finish()
        except BaseException:
            self.state = TrainingState.ERROR
            raise
        self.result = result_of(session, exports)
        self.metrics.update(**self.result.final)
        self.global_step = before.steps + run.progress.step
        self.epoch = before.epochs + run.progress.epoch
        self.state = TrainingState.STOPPED
        self._warn_of_memory()
        return self.result

    def _go_on(self, session: Session, course: Snapshot | None) -> None:
        """Take a course's progress and memories up, with weights and optimizer as they are now."""
        run = session.run
        data: Any = run.data
        windows = self._windows(data)
        if windows is not None:
            run.total_steps = windows * self.config.epochs
        if course is None:
            return
        now = run.strategy.model_state(run)
        trees = {**course.trees, "optimizer": optimizer_state(run)}
        session.take_up(Snapshot(course.step, now, trees, {}), random=False)
        run.progress.epoch, run.progress.place = int(course.trees["progress"]["epoch"]), 0

    def _warn_of_memory(self) -> None:
        self.memory.max_usage_ratio = self.config.max_memory_usage
        for share in self.memory.over():
            log.warning("memory: %s of what there is is in use", share)

    def _settings(self, **chosen: Any) -> RunConfig:
        config = self.config
        config.check_switches()
        config.lock("cannot be changed after the first step")
        return RunConfig(
            name="training_loop",
            device=str(self.device),
            precision=config.precision(),
            keep_checkpoints=config.max_checkpoints,
            **chosen,
        )

    def _opened(
        self, settings: RunConfig, data: CallersData, loss: CallersLoss, total: int | None,
        cancel: Any, about: Mapping[str, Any] | None = None,
    ) -> Session:  # fmt: skip
        """A session of the caller's parts and the configuration's plugins."""
        optimizer = self.optimizer or self.setup_optimizer()
        parts: list[Any] = [
            InMemoryModel(self.model),
            InMemoryData(data),
            CallersOptimizer(optimizer),
            loss,
            Callbacks(self._callbacks, data.before),
        ]
        if settings.ends:
            parts.append(Measuring.validator())
        judged = settings.ends and data.has_validation
        parts += live_plugins(self._uses(total, judged=judged))
        folder = self.checkpoint_dir if settings.ends else None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        return Session.of(
            parts, settings, folder=folder, cancel=cancel, about=about, quiet=True
        )  # fmt: skip

    def _uses(self, total: int | None, *, judged: bool) -> list[Use[Any]]:
        """The plugins that the configuration names; `judged`: there are validations to stop by."""
        config = self.config
        result: list[Use[Any]] = [schedule_of(config, total)]
        if config.grokfast_enabled:
            chosen = {"alpha": config.grokfast_alpha, "lambda_reg": config.grokfast_lambda}
            result.append(UseGradients("grokfast", chosen))
        if config.gradient_clipping:
            result.append(UseGradients("clip_norm", {"max_norm": config.max_grad_norm}))
        if judged:
            patience = {"patience": config.validation_patience, "min_delta": config.min_delta}
            result.append(UseCallback("early_stopping", patience))
        if config.compile_model:
            result.append(UseWrapper("compile"))
        if config.bitnet_enabled:
            warmup = {
                "warmup_steps": fitted_warmup(config.warmup_steps, total),
                "warmup_curve": config.quantization_schedule,
            }
            result.append(UseQuantizer("bitnet", warmup))
        return result

    def get_state(self) -> dict[str, Any]:
        """Where the loop is, in plain values."""
        return {
            "state": self.state.value,
            "global_step": self.global_step,
            "epoch": self.epoch,
            "metrics": self.metrics.get_summary(),
            "memory": self.memory.read(),
        }

    def get_training_summary(self) -> dict[str, Any]:
        """The same as `get_state`, under the name that `GrokfastTrainer` has."""
        return self.get_state()
