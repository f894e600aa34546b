"""A training loop over the caller's model and loaders: a kernel session, step by step or whole."""

from __future__ import annotations

import enum
import logging
import math
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from msgspec import Meta
from torch import nn

from agent_forge.phases.phase5_training.configuration import Configuration
from agent_forge.phases.phase5_training.live_plugins import live_plugins
from agent_forge.phases.phase5_training.loss_call import (
    Callbacks,
    CallersBatch,
    CallersData,
    CallersLoss,
    CallersOptimizer,
    LossFunction,
)
from agent_forge.phases.phase5_training.measuring import Measuring
from forge_kernel.config.pipeline import RunConfig
from forge_kernel.config.use import (
    Use,
    UseGradients,
    UsePolicy,
    UseQuantizer,
    UseSchedule,
    UseWrapper,
)
from forge_kernel.durable import write_bytes
from forge_kernel.errors import ConfigError, RunError
from forge_kernel.live import LiveDataPlugin, LiveModel
from forge_kernel.loop import Session
from forge_kernel.random_state import process_state_kept
from forge_kernel.result import RunResult
from forge_kernel.runner import result_of
from forge_plugins.observers.machine import Machine
from forge_plugins.optimizers.adamw import AdamW
from forge_plugins.optimizers.adamw import AdamWConfig as AdamWSettings
from forge_plugins.policies.improvement import Improvement

log = logging.getLogger("agent_forge.phase5_training")

_LOADERS = "the loaders are the caller's, or DataConfig's"


class TrainingState(enum.Enum):
    """Where a loop is."""

    INITIALIZED = "initialized"
    TRAINING = "training"
    VALIDATING = "validating"
    PAUSED = "paused"
    STOPPED = "stopped"
    ERROR = "error"


class TrainingConfig(Configuration):
    """How long, how fast, how exactly."""

    without_meaning: ClassVar[Mapping[str, str]] = {
        "loss_scale": "the kernel's loss scale starts there and finds its own way",
        "dataloader_num_workers": _LOADERS,
        "pin_memory": _LOADERS,
        "memory_cleanup_interval": "gradients are freed at each step, and emptying the device's "
        "cache only makes the next step slower",
    }

    epochs: Annotated[int, Meta(ge=1)] = 100
    learning_rate: Annotated[float, Meta(ge=0)] = 1e-4
    weight_decay: Annotated[float, Meta(ge=0)] = 1e-2  # decoupled, of all parameters
    beta1: Annotated[float, Meta(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Meta(ge=0, lt=1)] = 0.999
    eps: Annotated[float, Meta(gt=0)] = 1e-8
    max_grad_norm: Annotated[float, Meta(gt=0)] = 1.0
    gradient_clipping: bool = True
    gradient_accumulation_steps: Annotated[int, Meta(ge=1)] = 1
    use_amp: bool = True  # bfloat16 on the CPU; on CUDA amp_dtype
    amp_dtype: torch.dtype = torch.float16
    loss_scale: float = 65536.0
    warmup_steps: Annotated[int, Meta(ge=0)] = 1000  # shortened in a short run
    scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    min_lr_ratio: Annotated[float, Meta(ge=0, le=1)] = 0.1
    log_interval: Annotated[int, Meta(ge=1)] = 100
    eval_interval: Annotated[int, Meta(ge=1)] = 1000
    save_interval: Annotated[int, Meta(ge=1)] = 5000
    max_checkpoints: Annotated[int, Meta(ge=2)] = 5
    compile_model: bool = False
    use_fused_optimizer: bool = True
    dataloader_num_workers: int = 4
    pin_memory: bool = True
    max_memory_usage: Annotated[float, Meta(gt=0, le=1)] = 0.9  # share that a warning is given at
    memory_cleanup_interval: int = 1000
    validation_patience: Annotated[int, Meta(ge=1)] = 10
    min_delta: Annotated[float, Meta(ge=0)] = 1e-4
    bitnet_enabled: bool = False  # ternary weights, as the kernel's bitnet plugin has them
    quantization_schedule: Literal["linear", "exponential", "sigmoid"] = "linear"
    grokfast_enabled: bool = False
    grokfast_alpha: Annotated[float, Meta(ge=0, lt=1)] = 0.98
    grokfast_lambda: Annotated[float, Meta(ge=0)] = 2.0

    def check(self) -> None:
        """Also: a half-precision type, when one is used."""
        super().check()
        if self.use_amp and self.amp_dtype not in (torch.float16, torch.bfloat16):
            raise ConfigError(f"amp_dtype is {self.amp_dtype}: torch.float16 or torch.bfloat16")

    def precision(self, device: torch.device) -> Literal["fp32", "bf16", "fp16"]:
        """The arithmetic of the forward pass on a device."""
        if not self.use_amp:
            return "fp32"
        half = device.type == "cuda" and self.amp_dtype is torch.float16
        return "fp16" if half else "bf16"


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
        self._machine = Machine(self.device)

    def read(self) -> dict[str, float | None]:
        """Figures now; what is not there is None."""
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
    """The latest values of figures by name.

    Args:
        window_size: values kept of each.
    """

    def __init__(self, window_size: int = 100) -> None:
        self.window_size = window_size
        self._values: dict[str, deque[float]] = {}
        self._counts: dict[str, int] = {}

    def update(self, **figures: float | None) -> None:
        """Take in figures; what was not measured is left out."""
        for name, value in figures.items():
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
        """Of each figure: latest, mean over the window, and how many there were."""
        return {
            name: {
                "latest": values[-1],
                "mean": sum(values) / len(values),
                "count": self._counts[name],
            }
            for name, values in self._values.items()
        }


class CheckpointManager:
    """`checkpoint_step_N.pt` files of plain types, which the default `torch.load` takes.

    Written beside and renamed, so that a file is whole or not there. (`TrainingLoop.train` keeps
    the kernel's own checkpoints, from which a run goes on to the bit.)

    Args:
        checkpoint_dir: made when the first file is written.
        max_checkpoints: newest ones kept.
    """

    def __init__(self, checkpoint_dir: str | Path, max_checkpoints: int = 5) -> None:
        if max_checkpoints < 1:
            raise ConfigError(f"max_checkpoints is {max_checkpoints}, at least 1 is needed")
        self.checkpoint_dir = Path(checkpoint_dir)
        self.max_checkpoints = max_checkpoints

    def save_checkpoint(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        scheduler: Any = None,
        metrics: Mapping[str, Any] | None = None,
        step: int = 0,
        epoch: int = 0,
    ) -> Path:
        """Write one, drop those beyond the number kept."""
        import io

        stream = io.BytesIO()
        held = {
            "model_state_dict": model.state_dict(),
            "optimizer_state_dict": None if optimizer is None else optimizer.state_dict(),
            "scheduler_state_dict": None if scheduler is None else scheduler.state_dict(),
            "metrics": {str(name): _number(value) for name, value in (metrics or {}).items()},
            "step": int(step),
            "epoch": int(epoch),
        }
        torch.save(held, stream)
        self.checkpoint_dir.mkdir(parents=True, exist_ok=True)
        file = self.checkpoint_dir / f"checkpoint_step_{step}.pt"
        write_bytes(file, stream.getvalue())
        for old in self.checkpoints()[: -self.max_checkpoints]:
            old.unlink()
        return file

    def checkpoints(self) -> list[Path]:
        """The files, oldest first."""
        found = [
            file
            for file in self.checkpoint_dir.glob("checkpoint_step_*.pt")
            if file.stem.rpartition("_")[2].isdecimal()
        ]
        return sorted(found, key=lambda file: int(file.stem.rpartition("_")[2]))

    def get_latest_checkpoint(self) -> Path | None:
        """The newest file, or None."""
        found = self.checkpoints()
        return found[-1] if found else None

    def load_checkpoint(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Any = None,
        path: str | Path | None = None,
    ) -> dict[str, Any]:
        """Bring the objects to the state of a file, the newest one unless told.

        Returns:
            `metrics`, `step` and `epoch`.

        Raises:
            RunError: there is none.
        """
        file = self.get_latest_checkpoint() if path is None else Path(path)
        if file is None or not file.is_file():
            raise RunError(f"there is no checkpoint {path or f'in {self.checkpoint_dir}'}")
        held = torch.load(file, map_location="cpu")
        model.load_state_dict(held["model_state_dict"])
        for target, name in ((optimizer, "optimizer"), (scheduler, "scheduler")):
            if target is not None and held[f"{name}_state_dict"] is not None:
                target.load_state_dict(held[f"{name}_state_dict"])
        return {name: held[name] for name in ("metrics", "step", "epoch")}


def _number(value: Any) -> Any:
    """A figure as a plain number, so that the safe loader takes it."""
    return value.item() if hasattr(value, "item") else value


class EarlyStopping:
    """Says when a figure has not become better for a while.

    Args:
        patience: values without a better one.
        min_delta: better means by more than this.
        monitor: the figure; accuracy and alike are to rise, all else to fall.
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
        """Take in figures; whether to stop.

        Raises:
            RunError: the figure is not among them.
        """
        if self.monitor not in metrics:
            raise RunError(f"early stopping watches {self.monitor}, among {sorted(metrics)}")
        better = self._best.better(float(metrics[self.monitor]))
        self.counter = 0 if better else self.counter + 1
        return self.counter >= self.patience


def goal_of(figure: str) -> Literal["max", "min"]:
    """Whether a figure is to rise or to fall."""
    falls = ("loss", "perplexity", "error")
    return "min" if any(word in figure for word in falls) else "max"


def fitted_warmup(steps: int, total: int | None) -> int:
    """A warm-up that takes at most a tenth of the run."""
    return steps if total is None else min(steps, total // 10)


def schedule_of(config: TrainingConfig, total: int | None) -> UseSchedule[Any]:
    """The kernel's schedule of a training configuration.

    Without a known end there is nothing to fall towards: the rate rises and stays.
    """
    warmup = fitted_warmup(config.warmup_steps, total)
    if total is None or config.scheduler_type == "constant":
        return UseSchedule("linear_warmup", {"warmup_steps": warmup})
    name = {"cosine": "warmup_cosine", "linear": "linear"}[config.scheduler_type]
    return UseSchedule(name, {"warmup_steps": warmup, "floor": config.min_lr_ratio})


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
        self.global_step = self.epoch = 0
        self.result: RunResult | None = None
        self._accumulator = GradientAccumulator(self.config.gradient_accumulation_steps)
        self._callbacks: list[Any] = []
        self._loss = CallersLoss(predicts=True)
        self._session: Session | None = None
        self._measuring: Measuring | None = None

    def setup_optimizer(
        self, optimizer_class: type[torch.optim.Optimizer] | None = None, **options: Any
    ) -> torch.optim.Optimizer:
        """Make the optimizer; training does so itself when it was not done.

        Args:
            optimizer_class: AdamW with the configuration's values otherwise.
            options: of the class, in place of the configuration's learning rate and decay.

        Raises:
            RunError: steps have been taken with another one.
        """
        if self._session is not None:
            raise RunError("setup_optimizer() comes before the first step")
        self.model.to(self.device)
        config = self.config
        parameters = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        if optimizer_class is not None:
            chosen = {"lr": config.learning_rate, **options}
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
        session = self._stepping()
        self._loss.use(loss_fn, loss_form)
        if not self.model.training:
            self.model.train()
        last = self._accumulator.add()
        loss = session.accumulate(CallersBatch.of(batch), last=last)
        updated = session.update() if last else False
        figures = session.log().figures if updated else {}
        self.global_step = session.run.progress.step
        rate = float(session.run.optimizer.param_groups[0]["lr"])
        found = {"loss": float(loss), "learning_rate": rate, "grad_norm": figures.get("grad_norm")}
        self.metrics.update(**found)
        return {**found, "step": self.global_step, "updated": updated}

    def _stepping(self) -> Session:
        """The session of `train_step`, which has no end."""
        if self._session is None:
            settings = self._settings(log_every=1, seed=None)
            self._session = self._opened(settings, CallersData(()), self._loss, None, None)
            self._session.set_up()
            self._session.start()
            self.state = TrainingState.TRAINING
        return self._session

    def validation_step(
        self, batch: Any, loss_fn: LossFunction, loss_form: str | None = None
    ) -> dict[str, float]:
        """The figures of one batch; the model's mode is left as it was."""
        return self.validate([batch], loss_fn, loss_form)

    def validate(
        self, loader: Iterable[Any], loss_fn: LossFunction, loss_form: str | None = None
    ) -> dict[str, float]:
        """The figures over a whole loader, however uneven its batches."""
        if self._measuring is None:
            self._measuring = Measuring(self.model, self.device)
        before, self.state = self.state, TrainingState.VALIDATING
        try:
            return self._measuring.figures(loader, loss_fn, loss_form)
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
        """Train for the configuration's epochs.

        Random numbers start from torch's generator as it stands, so that `torch.manual_seed`
        before repeats the run; the generator is left one draw further.

        Args:
            train_loader: an iterable of batches.
            loss_fn: `(predictions, targets)`, `(batch)` or `(model, batch)`.
            val_loader: validated every `eval_interval` steps, at least after each epoch.
            resume_from_checkpoint: go on from the newest checkpoint of `checkpoint_dir`.
            loss_form: overrides what the signature of `loss_fn` says.
            cancel: an event that stops the run at a step's edge.

        Raises:
            RunError: see `form_of`; and what the model, the loader or the loss raise.
        """
        return self._train(
            CallersData(train_loader, val_loader or ()),
            CallersLoss(loss_fn, loss_form, predicts=True),
            self.config.epochs,
            cancel,
            resumes=resume_from_checkpoint,
        )

    def train_epoch(
        self, train_loader: Iterable[Any], loss_fn: LossFunction, loss_form: str | None = None
    ) -> RunResult:
        """One pass over a loader."""
        loss = CallersLoss(loss_fn, loss_form, predicts=True)
        return self._train(CallersData(train_loader), loss, 1, None, resumes=False)

    def _train(
        self, data: CallersData, loss: CallersLoss, epochs: int, cancel: Any, *, resumes: bool
    ) -> RunResult:
        seed = int(torch.randint(2**32, ()).item())
        size, per_epoch = self.config.gradient_accumulation_steps, data.batches_per_epoch
        windows = None if per_epoch is None else -(-per_epoch // size)
        every = self.config.eval_interval
        settings = self._settings(
            seed=seed,
            max_epochs=epochs,
            accumulate=size,
            log_every=self.config.log_interval,
            validate_every=every if windows is None else max(1, min(every, windows)),
            save_every=self.config.save_interval if self.checkpoint_dir else None,
        )
        total = None if windows is None else windows * epochs
        session = self._opened(settings, data, loss, total, cancel)
        self.state = TrainingState.TRAINING
        try:
            with process_state_kept():
                session.set_up()
                if resumes and session.store is not None and session.store.steps():
                    for problem in session.restore():
                        log.warning("a checkpoint cannot be used: %s", problem)
                session.start()
                session.train()
                exports = session.finish()
        except BaseException:
            self.state = TrainingState.ERROR
            raise
        self.result = result_of(session, exports)
        self.metrics.update(**self.result.final)
        self.global_step = session.run.progress.step
        self.epoch = session.run.progress.epoch
        self.state = TrainingState.STOPPED
        self._warn_of_memory()
        return self.result

    def _warn_of_memory(self) -> None:
        self.memory.max_usage_ratio = self.config.max_memory_usage
        for share in self.memory.over():
            log.warning("memory: %s of what there is is in use", share)

    def _settings(self, **chosen: Any) -> RunConfig:
        config = self.config
        config.lock("cannot be changed after the first step")
        return RunConfig(
            name="training_loop",
            device=str(self.device),
            precision=config.precision(self.device),
            keep_checkpoints=config.max_checkpoints,
            **chosen,
        )

    def _opened(
        self, settings: RunConfig, data: CallersData, loss: CallersLoss, total: int | None,
        cancel: Any,
    ) -> Session:  # fmt: skip
        """A session of the caller's parts and the configuration's plugins."""
        optimizer = self.optimizer or self.setup_optimizer()
        parts: list[Any] = [
            LiveModel(self.model),
            LiveDataPlugin(data),
            CallersOptimizer(optimizer),
            loss,
            Callbacks(self._callbacks),
        ]
        if settings.ends:
            parts.append(Measuring.meters())
        parts += live_plugins(self._uses(total, ends=settings.ends))
        folder = self.checkpoint_dir if settings.ends else None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        return Session.of(parts, settings, folder=folder, cancel=cancel, quiet=True)

    def _uses(self, total: int | None, *, ends: bool) -> list[Use[Any]]:
        """The plugins that the configuration names."""
        config = self.config
        found: list[Use[Any]] = [schedule_of(config, total)]
        if config.grokfast_enabled:
            chosen = {"alpha": config.grokfast_alpha, "lambda_reg": config.grokfast_lambda}
            found.append(UseGradients("grokfast", chosen))
        if config.gradient_clipping:
            found.append(UseGradients("clip_norm", {"max_norm": config.max_grad_norm}))
        if ends:
            patience = {"patience": config.validation_patience, "min_delta": config.min_delta}
            found.append(UsePolicy("early_stopping", patience))
        if config.compile_model:
            found.append(UseWrapper("compile"))
        if config.bitnet_enabled:
            warmup = {
                "warmup_steps": fitted_warmup(config.warmup_steps, total),
                "warmup_curve": config.quantization_schedule,
            }
            found.append(UseQuantizer("bitnet", warmup))
        return found

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
