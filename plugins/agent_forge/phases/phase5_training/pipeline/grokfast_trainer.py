"""Grokfast over the caller's model and optimizer: a kernel session with the kernel's plugins."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agent_forge.phases.phase5_training.grokfast_settings import GrokfastConfig, GrokfastPhase
from agent_forge.phases.phase5_training.live_plugins import live_plugins
from agent_forge.phases.phase5_training.loss_call import (
    CallersBatch,
    CallersData,
    CallersLoss,
    CallersOptimizer,
    LossFunction,
    step_metrics,
)
from agent_forge.phases.phase5_training.measuring import Measuring
from agent_forge.phases.phase5_training.pipeline.scheduler import GrokfastScheduler
from agent_forge.phases.phase5_training.pipeline.training_loop import TrainingMetrics
from forge_kernel.api import (
    Kind,
    PluginInfo,
    Run,
    RunError,
    Step,
    Use,
    UseGradients,
    UseSchedule,
    hookimpl,
)
from forge_kernel.embedding import (
    InMemoryData,
    InMemoryModel,
    NoConfig,
    RunConfig,
    Session,
    Snapshot,
    UsePhases,
    UseWrapper,
)
from forge_plugins.callbacks.capabilities import Capability, Track
from forge_plugins.mathematics.grokfast.filters import SlowGradient, filter_ema

__all__ = [
    "CapabilityTracker",
    "GrokfastConfig",
    "GrokfastOptimizer",
    "GrokfastPhase",
    "GrokfastScheduler",
    "GrokfastTrainer",
    "KnowledgeConsolidation",
]

log = logging.getLogger("agent_forge.phase5_training")

CapabilityFunction = Callable[[Mapping[str, Any]], float]


class CapabilityTracker:
    """Which capabilities are acquired: a score at or above the threshold for so many updates.

    A part of a run too (a policy): it is then told of each step and each validation.

    Args:
        config: threshold and duration; read when a capability first scores.
    """

    info = PluginInfo(name="capability_functions", kind=Kind.CALLBACKS, config=NoConfig)

    def __init__(self, config: GrokfastConfig | None = None) -> None:
        self.config = NoConfig()
        self.settings = config or GrokfastConfig()
        self.duration: int | None = None  # in place of the settings', where a run is short
        self._functions: dict[str, CapabilityFunction] = {}
        self._tracks: dict[str, Track] = {}
        self._errors: dict[str, str] = {}

    def register_capability(self, name: str, metric_fn: CapabilityFunction) -> None:
        """Watch `metric_fn(metrics) -> float`; a name used before gets the new function.

        Raises:
            RunError: it cannot be called.
        """
        if not callable(metric_fn):
            raise RunError(f"capability '{name}': {metric_fn!r} cannot be called")
        self._functions[name] = metric_fn
        _ = self._tracks.pop(name, None), self._errors.pop(name, None)

    def update(self, metrics: Mapping[str, Any], step: int = 0) -> dict[str, str]:
        """Score every capability.

        A function that raises is reported once and asked again the next time; what it gives is
        then unknown.

        Returns:
            `acquired` or `lost`, for those that were.
        """
        changes: dict[str, str] = {}
        if not self.settings.capability_tracking:
            return changes
        for name, function in self._functions.items():
            track, score = self._track(name), self._score(name, function, metrics)
            if not math.isfinite(score):
                track.latest = None  # nothing was measured: neither held nor lost
                continue
            change = track.take(score, step)
            if change is not None:
                changes[name] = change
        return changes

    def _track(self, name: str) -> Track:
        if name not in self._tracks:
            settings = self.settings
            duration = self.duration or settings.min_capability_duration
            wanted = Capability(
                metric=name, threshold=settings.capability_threshold, duration=duration
            )
            self._tracks[name] = Track(wanted)
        return self._tracks[name]

    def _score(self, name: str, function: CapabilityFunction, metrics: Mapping[str, Any]) -> float:
        try:
            return float(function(dict(metrics)))
        except Exception as error:  # noqa: BLE001  a caller's function may raise anything
            if name not in self._errors:
                self._errors[name] = f"{type(error).__name__}: {error}"
                log.warning("the capability '%s' cannot be scored: %s", name, self._errors[name])
            return math.nan

    def status(self) -> dict[str, dict[str, Any]]:
        """Of each capability: acquired, at which step, score, best, retention, error."""
        result: dict[str, dict[str, Any]] = {}
        for name in self._functions:
            track = self._track(name)
            result[name] = {
                "acquired": track.acquired_step is not None,
                "acquired_step": track.acquired_step,
                "score": track.latest,
                "best": track.best.best,
                "retention": track.retention,
                "held": track.held,
                "error": self._errors.get(name),
            }
        return result

    def _tell(self, run: Run, changes: Mapping[str, str]) -> None:
        for name, change in changes.items():
            track = self._tracks[name]
            shown = "not known" if track.latest is None else f"{track.latest:.4g}"
            run.emit_event(
                f"capability_{change}",
                f"The capability {name} is {change}: its score is {shown}.",
                capability=name,
                value=track.latest,
                threshold=track.capability.threshold,
                retention=track.retention,
            )

    @hookimpl
    def on_step_end(self, run: Run, step: Step) -> None:
        """Score with the step's metrics; reads the loss, so only when something is to score."""
        if self._functions and self.settings.capability_tracking:
            self._tell(run, self.update(step_metrics(run, step), run.progress.step))

    @hookimpl
    def on_validation(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Score with the validation's metrics."""
        named = {**metrics, "val_loss": metrics.get("loss"), "step": run.progress.step}
        self._tell(run, self.update(named, run.progress.step))

    @hookimpl
    def log_metrics(self, run: Run, step: Step) -> Mapping[str, float | None]:
        """Score and retention of each, for the log."""
        del run, step
        result: dict[str, float | None] = {}
        for name, known in self.status().items():
            result[f"capability/{name}"] = known["score"]
            result[f"retention/{name}"] = known["retention"]
        return result

    def state_dict(self) -> dict[str, Any]:
        """What is known of each capability."""
        return {name: track.state_dict() for name, track in self._tracks.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what was known of those that are registered."""
        for name, known in state.items():
            if name in self._functions:
                self._track(name).load_state_dict(known)


class KnowledgeConsolidation:
    """Weights drawn toward a snapshot, and only kept when a metric does not get worse.

    Args:
        config: `knowledge_retention_weight` is the share of the snapshot.
    """

    def __init__(self, config: GrokfastConfig | None = None) -> None:
        self.config = config or GrokfastConfig()
        self._snapshot: dict[str, Tensor] = {}

    def capture_knowledge_state(self, model: nn.Module) -> dict[str, Tensor]:
        """Take the snapshot; the one before is let go."""
        self._snapshot = {
            name: value.detach().clone()
            for name, value in model.named_parameters()
            if value.requires_grad
        }
        return self._snapshot

    def _known(self) -> dict[str, Tensor]:
        if not self._snapshot:
            raise RunError("there is no snapshot: call capture_knowledge_state(model) first")
        return self._snapshot

    def consolidate_knowledge(
        self, model: nn.Module, score: Callable[[nn.Module], float], mode: str = "max"
    ) -> bool:
        """Draw the weights that are trained toward the snapshot; whether that was kept.

        Args:
            model: changed in place, or left as it was.
            score: a validated metric of the model.
            mode: whether it is to rise (`max`) or to fall (`min`).

        Raises:
            RunError: there is no snapshot.
        """
        snapshot, share = self._known(), self.config.knowledge_retention_weight
        own = {
            name: value
            for name, value in model.named_parameters()
            if name in snapshot and value.requires_grad
        }
        kept = {name: value.detach().clone() for name, value in own.items()}
        before = score(model)
        with torch.no_grad():
            for name, value in own.items():
                value.lerp_(snapshot[name].to(value), share)
        after = score(model)
        better = after >= before if mode == "max" else after <= before
        if math.isfinite(after) and (better or not math.isfinite(before)):
            return True
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(kept[name])
        return False

    def transfer_to(self, model: nn.Module) -> list[str]:
        """Begin another model from the snapshot: parameters of the same name and shape.

        Returns:
            The names taken over.
        """
        snapshot = self._known()
        taken = []
        with torch.no_grad():
            for name, value in model.named_parameters():
                if name in snapshot and snapshot[name].shape == value.shape:
                    value.copy_(snapshot[name])
                    taken.append(name)
        return taken

    def get_knowledge_distance(self, model: nn.Module) -> float:
        """Distance of the weights from the snapshot, against the snapshot's norm."""
        snapshot = self._known()
        own = dict(model.named_parameters())
        apart = [(own[name].detach() - value.to(own[name])).norm() for name, value in
                 snapshot.items()]  # fmt: skip
        size = torch.stack([value.norm() for value in snapshot.values()]).norm()
        return float(torch.stack(apart).norm() / size.clamp_min(1e-12))


class GrokfastOptimizer:
    """The filter in front of any torch optimizer, for programs that run backward themselves.

    Args:
        optimizer: steps the filtered gradients.
        config: `alpha`, `lambda_reg`, `enable_grokfast`.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, config: GrokfastConfig | None = None
    ) -> None:
        self.optimizer = optimizer
        self.config = config or GrokfastConfig()
        self._memory: dict[Tensor, SlowGradient] = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups."""
        return self.optimizer.param_groups

    def _parameters(self) -> list[Tensor]:
        return [value for group in self.param_groups for value in group["params"]]

    @torch.no_grad()
    def step(self) -> None:
        """Filter the gradients in place, then step."""
        result = [value for value in self._parameters() if value.grad is not None]
        if self.config.enable_grokfast and result:
            for value in result:
                if value not in self._memory:
                    self._memory[value] = SlowGradient.like(value)
            filter_ema(
                [value.grad for value in result if value.grad is not None],
                [self._memory[value] for value in result],
                alpha=self.config.alpha,
                lambda_reg=self.config.lambda_reg,
            )
        self.optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the optimizer's."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, and the slow gradients by the parameters' places."""
        places = {id(value): place for place, value in enumerate(self._parameters())}
        slow = {
            places[id(value)]: {"mean": memory.mean, "count": memory.count}
            for value, memory in self._memory.items()
        }
        return {"optimizer": self.optimizer.state_dict(), "slow": slow}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state."""
        self.optimizer.load_state_dict(state["optimizer"])
        parameters = self._parameters()
        self._memory = {}
        for place, known in state["slow"].items():
            memory = SlowGradient.like(parameters[int(place)].detach())
            memory.mean.copy_(known["mean"])
            memory.count = int(known["count"])
            self._memory[parameters[int(place)]] = memory


class GrokfastTrainer:
    """Grokfast steps over the caller's model.

    Args:
        model: trained in place.
        optimizer: any torch optimizer over its parameters; its first rate (`initial_lr` of its
            groups, where another trainer or scheduler has been at work) is the base that the
            phases' factors are of. None: a pipeline makes it in `train()`. Learned weights of a
            loss join it.
        config: read at the first step, and closed then.
        device: where to; a string or a torch.device.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        config: GrokfastConfig | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.config = config or GrokfastConfig()
        self.device = torch.device(device)
        self.capabilities = CapabilityTracker(self.config)
        self.metrics = TrainingMetrics(self.config.performance_window)
        self._run: Run | None = None
        self._step: Step | None = None
        self._session: Session | None = None
        self._loss = CallersLoss(predicts=True)
        self._waiting: Snapshot | None = None  # taken up with the loss of the first step
        self._measuring: Measuring | None = None

    def register_capability(self, name: str, metric_fn: CapabilityFunction) -> None:
        """Watch `metric_fn(metrics) -> float`, called at every step and every evaluation.

        The metrics of a step are `loss`, `learning_rate`, `grokfast_phase`, `step` and the metrics
        of the latest evaluation (`accuracy`, `val_loss`, ...).
        """
        self.capabilities.register_capability(name, metric_fn)

    def follow(self, run: Run, step: Step) -> None:
        """Be the trainer of a pipeline's run: what is told of it is read there."""
        self._run, self._step, self.optimizer = run, step, run.optimizer

    def _opened(self) -> Session:
        """The session of `train_step`, which has no end."""
        if self._session is not None:
            return self._session
        if self.optimizer is None:
            raise RunError("this trainer has no optimizer: it belongs to a pipeline, whose train() "
                           "makes one; or construct it as GrokfastTrainer(model, optimizer, "
                           "config, device)")  # fmt: skip
        config = self.config
        config.lock("cannot be changed after the first step")
        if config.base_learning_rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] = config.base_learning_rate
        rates = {"warmup_steps": config.warmup_steps, "smoothing_steps": 0, **config.multipliers()}
        uses: list[Use[Any]] = [
            UsePhases("grokfast", config.lengths()),
            UseSchedule("grokfast", rates),
        ]
        if config.gradient_checkpointing:
            uses.append(UseWrapper("activation_checkpointing"))
        if config.enable_grokfast:
            uses.append(UseGradients("grokfast", config.filter_settings()))
        parts = [
            InMemoryModel(self.model),
            InMemoryData(CallersData(())),
            CallersOptimizer(self.optimizer),
            self._loss,
            self.capabilities,
            *live_plugins(uses),
        ]
        settings = RunConfig(
            name="grokfast_trainer", seed=None, device=str(self.device), log_every=1
        )
        session = Session.of(parts, settings, quiet=True)
        session.opened(resume=self._waiting or False).start()
        self._waiting = None
        self._run, self._step, self._session = session.run, session.step_state, session
        return session

    def train_step(
        self, batch: Any, loss_fn: LossFunction, loss_form: str | None = None
    ) -> dict[str, Any]:
        """One optimizer step.

        Returns:
            `loss`, `learning_rate`, `grad_norm` (before the filter), `grokfast_phase`,
            `grokfast_alpha`, `grokfast_lambda`, `step`.

        Raises:
            RunError: see `form_of`; NonFiniteError: the loss or a gradient was not finite, and the
                weights are those from before.
        """
        self._loss.use(loss_fn, loss_form)
        session = self._opened()
        if not self.model.training:
            self.model.train()
        _ = session.step(CallersBatch.of(batch))
        metrics = session.log().metrics
        names = ("loss", "learning_rate", "grad_norm")
        self.metrics.update(**{name: metrics[name] for name in names})
        return {
            **{name: metrics[name] for name in names},
            "grokfast_phase": session.step_state.phase,
            "grokfast_alpha": metrics.get("grokfast_alpha", self.config.alpha),
            "grokfast_lambda": metrics.get("grokfast_lambda", 0.0),
            "step": session.run.progress.step,
        }

    def validate_step(
        self, batch: Any, loss_fn: LossFunction, loss_form: str | None = None
    ) -> dict[str, float]:
        """The metrics of one batch, told to the capabilities; the model's mode is left alone."""
        return self.validate([batch], loss_fn, loss_form)

    def validate(
        self, loader: Iterable[Any], loss_fn: LossFunction, loss_form: str | None = None
    ) -> dict[str, float]:
        """The metrics over a whole loader, told to the capabilities."""
        if self._measuring is None:
            self._measuring = Measuring(self.model, self.device)
        metrics = self._measuring.metrics(loader, loss_fn, loss_form)
        _ = self.capabilities.update({**metrics, "val_loss": metrics.get("loss")}, self.global_step)
        if self._session is not None:  # later steps know of it
            self._session.run.metrics.record_validation(metrics)
        return metrics

    @property
    def global_step(self) -> int:
        """Optimizer steps done."""
        if self._waiting is not None:
            return self._waiting.step
        return 0 if self._run is None else self._run.progress.step

    @property
    def phase(self) -> GrokfastPhase:
        """The phase of the latest step."""
        name = None if self._step is None else self._step.phase
        return GrokfastPhase.WARMUP if name is None else GrokfastPhase(name)

    def get_training_summary(self) -> dict[str, Any]:
        """Where the training is, in plain values."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        known = {} if self._run is None else self._run.metrics.latest
        return {
            "global_step": self.global_step,
            "grokfast_info": {
                "phase": self.phase.value,
                "alpha": known.get("grokfast_alpha", self.config.alpha),
                "lambda_reg": known.get("grokfast_lambda", self.config.lambda_reg),
                "enabled": self.config.enable_grokfast,
            },
            "capability_status": self.capabilities.status(),
            "knowledge_states": {
                name: known["retention"] for name, known in self.capabilities.status().items()
            },
            "current_lr": float(groups[0]["lr"]) if groups else None,
            "metrics": self.metrics.get_summary(),
        }

    def save_checkpoint(self, path: str | Path) -> Path:
        """Keep model, optimizer, filter, phases, capabilities and random states, in plain types."""
        import io

        from forge_kernel.embedding import write_bytes

        snapshot = self._opened().snapshot()
        stream = io.BytesIO()
        torch.save(
            {"step": snapshot.step, "model": snapshot.model, "trees": snapshot.trees}, stream
        )
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, stream.getvalue())
        return file

    def load_checkpoint(self, path: str | Path) -> None:
        """Go on, to the bit, from where `save_checkpoint` was called.

        Where the loss had learned weights or averages, all but the model is taken up at the next
        step, with the loss that is given there.

        Raises:
            RunError: the file is of another model, which is left as it is.
        """
        held = torch.load(path, map_location="cpu")
        snapshot = Snapshot(held["step"], held["model"], held["trees"], {})
        own = self.model.state_dict()
        of_loss = {name for name in snapshot.model if name.startswith("loss")} - own.keys()
        if self._session is not None or not of_loss:
            session = self._opened()
            session.take_up(snapshot)
            session.start()
            return
        given = {name: value for name, value in snapshot.model.items() if name not in of_loss}
        if {n: v.shape for n, v in own.items()} != {n: v.shape for n, v in given.items()}:
            raise RunError(
                f"the checkpoint is of another model: it has {sorted(given)[:5]}, this one "
                f"{sorted(own)[:5]}"
            )
        self.model.load_state_dict(given)
        self._waiting = snapshot
