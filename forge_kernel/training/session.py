"""The training loop: the only place that calls hooks.

`Session` is one run in this process: `set_up`, then `accumulate` and `update` (or `step`, which is
both), `validate`, `finish`. `train` is a for-loop over `step`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from forge_kernel.config.pipeline import PipelineConfig
from forge_kernel.contract.cancel import Cancel, cancel_reason
from forge_kernel.contract.counting import loss_terms
from forge_kernel.contract.metrics import Meter
from forge_kernel.contract.model_call import ModelCall
from forge_kernel.contract.plugin import Kind, Stateful
from forge_kernel.contract.run import Run
from forge_kernel.contract.run_config import RunConfig
from forge_kernel.contract.seeds import stream_seed
from forge_kernel.contract.strategy import Strategy
from forge_kernel.contract.values import Batch, LogRecord, Progress, Request, Step
from forge_kernel.errors import CheckpointError, Fault, NonFiniteError, PluginError, RunError
from forge_kernel.planning.catalog import Catalog
from forge_kernel.planning.plan import Plan, Planned, plan
from forge_kernel.storage.checkpoint_store import CheckpointStore, Snapshot
from forge_kernel.storage.random_state import (
    StreamState,
    read_random_state,
    seed_everything,
    write_random_state,
)
from forge_kernel.training.accumulation import GradientAccumulation, TermMean
from forge_kernel.training.awaited_metrics import AwaitedMetrics
from forge_kernel.training.bus import Bus
from forge_kernel.training.data_loaders import batch_from
from forge_kernel.training.device import resolve_device
from forge_kernel.training.exports import write_exports
from forge_kernel.training.extra_state import check_extra_states, extra_states, load_extra_states
from forge_kernel.training.finite_check import FiniteCheck, name_non_finite
from forge_kernel.training.forward_state import ForwardState
from forge_kernel.training.loss_scale import LossScale
from forge_kernel.training.one_process import OneProcess
from forge_kernel.training.optimizer_state import load_optimizer_state, optimizer_state
from forge_kernel.training.ownership import OwnershipGuard
from forge_kernel.training.param_group_schedule import GroupRates
from forge_kernel.training.precision import resolve_precision, slow_precision_notice
from forge_kernel.training.random_streams import RunStreams
from forge_kernel.training.trainable import check_trainable

MAX_SKIPS: Final = 100  # windows dropped in a row before the run gives up
MAX_EMPTY: Final = 100  # windows in a row in which nothing counts
MAX_ROLLBACKS: Final = 10
_TREES: Final = frozenset({"optimizer", "plugins", "random", "progress", "metrics", "loop"})
_STRATEGY: Final = tuple(name for name in vars(OneProcess) if not name.startswith("_"))
_AUTOCAST: Final = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Session:
    """One run in this process.

    Args:
        plan: what runs, in which order.
        folder: the run folder; None: nothing is written (no checkpoints, no exports).
        strategy: how the run is spread; one process otherwise.
        cancel: asked at each step's edge whether to stop.
        about: facts kept in each checkpoint (configuration digest, versions).
        quiet: observers that write to the screen keep silent.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        folder: Path | None = None,
        strategy: Strategy | None = None,
        cancel: Cancel | None = None,
        about: Mapping[str, Any] | None = None,
        quiet: bool = False,
    ) -> None:
        settings = plan.pipeline.run
        if settings.non_finite == "rollback" and folder is None:
            raise RunError("run.non_finite 'rollback' needs a run folder to roll back from")
        self.plan = plan
        self.settings: RunConfig = settings
        self.cancel: Cancel = cancel or threading.Event()
        self.about = dict(about or {})
        guard = OwnershipGuard() if settings.checked else None
        self.bus = Bus(plan, guard)
        self.run = Run(settings, folder, strategy or self._planned_strategy(), quiet=quiet)
        if guard is not None:
            guard.run = self.run
        self.store = (
            CheckpointStore(folder / "checkpoints", settings.keep_checkpoints) if folder else None
        )
        self.stop_reason = ""
        self.cancelled = False
        self.training_model: nn.Module | None = None  # see `hand_over`
        self.failed_exports: dict[str, Exception] = {}  # what each one failed of
        self.step_state = Step()
        self._bind_hooks()
        self._awaited = AwaitedMetrics(plan)
        self.streams = RunStreams(takes_turns=self.run.strategy.world_size == 1)
        self._window = GradientAccumulation()
        self._skips = 0  # windows dropped in a row
        self._empty = 0  # windows in a row in which nothing counted
        self._ready = False
        self._validated_at = self._logged_at = self._saved_at = -1
        self._next_due = 0
        self._deadline: float | None = None
        self._clock: float | None = None
        self._phase: str | None = None

    @classmethod
    def of(
        cls, plugins: Sequence[Any], settings: RunConfig | None = None, **options: Any
    ) -> Session:
        """A session of plugin objects alone, for a program that drives the steps itself.

        Args:
            plugins: one for each kind that a run must have, and others.
            settings: of the loop; they need no end and no seed.
            options: as for the constructor.

        Raises:
            PlanError: the parts do not make a run.
        """
        pipeline = PipelineConfig(run=settings or RunConfig(seed=None))
        return cls(plan(pipeline, Catalog(), plugins=plugins), **options)

    def _planned_strategy(self) -> Strategy:
        """The plan's strategy plugin, or one process."""
        for entry in self.plan.entries:
            if entry.info.kind is Kind.STRATEGY:
                found = self.bus.instances[entry.path]
                missing = [name for name in _STRATEGY if not hasattr(found, name)]
                if missing:
                    raise PluginError(f"{entry.label} is no strategy: it lacks {missing}")
                return found  # type: ignore[no-any-return]
        return OneProcess()

    # -- set-up -------------------------------------------------------------------------------

    def _bind_hooks(self) -> None:
        """Local names for the hot path: one attribute each, no look-ups by name in the step."""
        bus = self.bus
        self._on_batch = bus.calls("on_batch")
        self._on_outputs = bus.calls("on_outputs")
        self._on_gradients = bus.calls("on_gradients")
        self._on_weights = bus.calls("on_weights")
        self._on_weights_changed = bus.calls("on_weights_changed")
        self._on_step_end = bus.calls("on_step_end")
        self._penalize = bus.calls("penalize")
        self._compute_phase = bus.call("compute_phase")
        self._compute_outputs = bus.call("compute_outputs")
        self._compute_loss = bus.call("compute_loss")
        self._compute_loss_weights = bus.call("compute_loss_weights")
        self._compute_rates = bus.call("compute_rates")

    def set_up(self) -> Session:
        """Build everything that the plan names, in life-cycle order; nothing is trained.

        Raises:
            RunError, PluginError: a device or a part is missing or wrong.
        """
        with self.streams:
            self._build()
        return self

    def _build(self) -> None:
        run, bus = self.run, self.bus
        run.device = resolve_device(self.settings.device)
        precision = resolve_precision(self.settings.precision, run.device)
        self.settings = run.settings = settings = replace(self.settings, precision=precision)
        self.loss_scale = LossScale(precision)
        if settings.threads is not None and torch.get_num_threads() != settings.threads:
            torch.set_num_threads(settings.threads)
        if settings.deterministic:
            torch.use_deterministic_algorithms(True)
        if settings.seed is not None:
            seed_everything(settings.seed)
        run.strategy.start()
        data = self._need("make_data")(run)
        run.data = bus.transform("transform_data", data, run)
        self._set_total_steps()
        run.model = self._need("make_model")(run).to(run.device)
        run.active_model = run.model
        for answer in bus.calls("make_modules"):
            self._add_modules(answer(run))
        self._name_parameters()
        run.model = bus.transform("transform_model", run.model, run).to(run.device)
        run.model = run.strategy.transform_model(run, run.model)
        run.active_model = run.model
        self._name_parameters()
        optimizer = self._need("make_optimizer")(run, list(run.named_parameters()))
        run.optimizer = optimizer
        self._meters: list[Meter] = [
            meter for answer in bus.calls("make_meters") for meter in answer(run)
        ]
        for meter in self._meters:
            run.metrics.goals.update(meter.goals)
        run.metrics.goals.setdefault("loss", "min")
        self._prepare_step()
        run.model.train()
        self._ready = True

    def _need_set_up(self) -> None:
        if not self._ready:
            raise RunError("the session is not set up: call set_up() and start(), or use `with`")

    def _need(self, hook: str) -> Callable[..., Any]:
        call = self.bus.call(hook)
        assert call is not None, f"the planner let a run pass without {hook}"
        return call

    def _set_total_steps(self) -> None:
        settings, run = self.settings, self.run
        lengths = [settings.max_steps] if settings.max_steps is not None else []
        per_epoch = run.data.batches_per_epoch
        if settings.max_epochs is not None and per_epoch is not None:
            lengths.append(settings.max_epochs * -(-per_epoch // settings.accumulate))
        run.total_steps = min(lengths) if lengths else None

    def _add_modules(self, answer: Mapping[str, nn.Module] | None) -> None:
        for name, module in (answer or {}).items():
            if name in self.run.modules:
                raise PluginError(f"two plugins give a module named '{name}'")
            self.run.modules[name] = module.to(self.run.device)

    def _name_parameters(self) -> None:
        run = self.run
        named = dict(run.model.named_parameters())
        for name, module in run.modules.items():
            named.update({f"{name}.{key}": value for key, value in module.named_parameters()})
        run.parameters = named

    def _prepare_step(self) -> None:
        run = self.run
        self._parameters = list(run.parameters.values())
        for parameter in self._parameters:
            parameter.grad = None  # what someone else's backward left would be stepped
        self._finite = FiniteCheck(run.device)
        self._moves = run.device.type != "cpu"
        self._several = run.strategy.world_size > 1
        self._autocast = _AUTOCAST.get(self.settings.precision)
        self._checks = self.settings.non_finite != "off" or self.settings.precision == "fp16"
        if run.folder is not None:
            check_extra_states(run)
        check_trainable(run.parameters, {"": run.model, **run.modules}, run.optimizer)
        self._group_rates = GroupRates(run.optimizer)
        self._model_call = ModelCall(run.model)
        forward = ForwardState([run.model, *run.modules.values()])
        self._forward_state = forward if self._checks and not forward.empty else None
        self._validation_draws = stream_seed(run.seed, "validation")

    def start(self) -> None:
        """Seal the run and tell everyone; also after a restore."""
        self._need_set_up()
        self._awaited.check(self.run.data)
        self._check_exports()
        self.run.seal()
        self._clock = time.monotonic()
        self._schedule()
        self._open_step()
        for listen in self.bus.calls("on_run_start"):
            listen(self.run)
        self._tell_groups()
        self._tell_slow_precision()
        self._tell_events()
        rolls_back = self.settings.non_finite == "rollback"
        if rolls_back and self.store is not None and not self.store.steps():
            self.save()

    def _check_exports(self) -> None:
        """Ask the exporters, before anything is trained, whether they can write the result.

        Raises:
            PluginError: one of them cannot; names all that cannot.
        """
        if self.run.folder is None:
            return
        entries = self.plan.answering("check_export")
        told = [
            (entry, answer(self.run))
            for entry, answer in zip(entries, self.bus.calls("check_export"), strict=True)
        ]
        faults = [Fault(f"{entry.label}: {reason}") for entry, reason in told if reason]
        if faults:
            raise PluginError(faults)

    def _tell_groups(self) -> None:
        """Say of a loss over groups of samples that a micro-batch is its group."""
        count = self.settings.accumulate
        for entry in self.plan.entries:
            if count > 1 and entry.info.couples_samples:
                self.run.tell(
                    "groups",
                    f"The loss {entry.info.name} compares the samples of a micro-batch with each "
                    f"other: run.accumulate ({count}) makes no larger groups of them, as a larger "
                    "batch would.",
                    loss=entry.info.name,
                    accumulate=count,
                )

    def _tell_slow_precision(self) -> None:
        """Say of a precision that was chosen that it costs more than fp32 here."""
        precision = resolve_precision(self.settings.precision, self.run.device)
        notice = slow_precision_notice(precision, self.run.device)
        if notice is not None:
            self.run.tell("slow_precision", notice, precision=precision)

    def __enter__(self) -> Session:
        self.set_up()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.run.strategy.finish()

    # -- one step -----------------------------------------------------------------------------

    def outputs(self, batch: Batch) -> Any:
        """What the model gives for a batch."""
        if self._compute_outputs is not None:
            return self._compute_outputs(self.run, self.step_state, batch)
        if batch.positions is None and isinstance(batch.inputs, Tensor):
            return self.run.active_model(batch.inputs)
        return self._model_call(self.run.active_model, batch)

    def _cast_loss(self, batch: Batch) -> Any:
        with torch.autocast(self.run.device.type, self._autocast):
            return self._loss_of(batch)

    def _loss_of(self, batch: Batch) -> Any:
        assert self._compute_loss is not None
        run, step = self.run, self.step_state
        outputs = self.outputs(batch)
        for listen in self._on_outputs:
            listen(run, step, batch, outputs)
        return self._compute_loss(run, step, batch, outputs)

    def accumulate(self, batch: Batch, *, last: bool = True) -> Tensor:
        """One micro-step: forward and backward.

        Args:
            batch: the micro-batch.
            last: whether it ends the window; spread over processes, gradients are then brought
                into step.

        Returns:
            The micro-batch's mean loss (0-d, detached, on the device).
        """
        self._need_set_up()
        with self.streams:
            return self._accumulate(batch, last=last)

    def _accumulate(self, batch: Batch, *, last: bool) -> Tensor:
        run, step = self.run, self.step_state
        if self._window.count == 0:
            if self._forward_state is not None:
                self._forward_state.keep()
            if self._compute_phase is not None:
                self._take_phase(self._compute_phase)
        batch = self._taken_in(batch)
        for listen in self._on_batch:
            listen(run, step, batch)
        if not self._several:
            return self._micro_step(batch)
        with run.strategy.backward_scope(last=last):
            return self._micro_step(batch)

    def _taken_in(self, batch: Any) -> Batch:
        """The batch on the device, with what counts in it.

        Raises:
            RunError: it is no batch.
        """
        taken: Batch = batch if isinstance(batch, Batch) else batch_from(batch)
        taken.ignore_index = self.settings.ignore_index
        if not self._moves:
            return taken
        counted = taken.counted  # before it moves: on the host counting waits for nothing
        moved: Batch = taken.to(self.run.device)
        moved.ignore_index = taken.ignore_index
        moved.counted_as(counted, self.run.device)
        return moved

    def _micro_step(self, batch: Batch) -> Tensor:
        answer = self._loss_of(batch) if self._autocast is None else self._cast_loss(batch)
        window = self._window
        weight: float | Tensor
        if type(answer) is tuple and len(answer) == 2 and isinstance(answer[0], Tensor):
            loss, weight = answer
            share = window.add(loss, weight)
        elif isinstance(answer, Tensor) and not answer.ndim:
            counted = batch.counted
            loss, weight = answer, counted.total
            if counted.weights is not None or not weight:
                loss, weight = counted.mean(answer)
            share = window.add(loss, weight)
        else:
            share, weight = self._share_of(answer, batch)
        self.step_state.loss = window.loss
        # a micro-batch of weight 0 adds nothing, but other ranks wait for its gradients
        if isinstance(weight, Tensor) or weight or self._several:
            scale = self.loss_scale.value
            (share if scale == 1.0 else share * scale).backward()  # type: ignore[no-untyped-call]
        return share.detach() if window.loss is None else window.loss

    def _share_of(self, answer: Any, batch: Batch) -> tuple[Tensor, float | Tensor]:
        """What is to be differentiated for a loss of values or of terms, and what it counts."""
        terms = self._term_means(answer, batch)
        if len(terms) == 1 and not terms[0].name:
            (term,) = terms
            mean = term.mean if term.scale == 1.0 else term.mean * term.scale
            share = self._window.add(mean, term.weight)
            return share, term.weight
        share = self._window.add_terms(terms)
        weights = [term.weight for term in terms]
        return share, sum(weights[1:], weights[0])

    @staticmethod
    def _term_means(answer: Any, batch: Batch) -> list[TermMean]:
        """The means of a loss's terms over what counts."""
        if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], Tensor):
            return [TermMean(*answer)]
        counted = batch.counted
        return [TermMean(*term.mean(counted), term.scale, term.name) for term in loss_terms(answer)]

    def _open_step(self) -> None:
        step, number = self.step_state, self.run.progress.step + 1
        step.number = number
        step.logs = number % self.settings.log_every == 0 or number == self.run.total_steps

    def _take_phase(self, compute_phase: Callable[..., Any]) -> None:
        run, step = self.run, self.step_state
        phase = compute_phase(run, step)
        step.phase = phase
        if phase != self._phase:
            before, self._phase = self._phase, phase
            for listen in self.bus.calls("on_phase_change"):
                listen(run, before, phase)
            self._tell_events()

    def update(self) -> bool:
        """End the window: gradients to weights.

        Returns:
            Whether the weights were changed; False for a window that was dropped.

        Raises:
            NonFiniteError: a gradient was not finite and the policy is to stop.
            RunError: there is no open window.
        """
        if self._window.count == 0:
            raise RunError("update() without a micro-batch: call accumulate(batch) first")
        with self.streams:
            return self._update()

    def _update(self) -> bool:
        run, step, window = self.run, self.step_state, self._window
        if window.count > 1 or window.has_terms:
            window.close([p.grad for p in self._parameters if p.grad is not None])
            step.loss, step.losses = window.loss, window.terms
        window.count = 0
        if self._penalize:
            self._add_penalties()
        step.parameters = parameters = [p for p in self._parameters if p.grad is not None]
        gradients: list[Tensor] = [p.grad for p in parameters]  # type: ignore[misc]  # not None
        step.gradients = gradients
        if not self._usable(gradients):
            return False
        if step.logs:
            self._put_norm(gradients)
        for listen in self._on_gradients:
            listen(run, step)
        if self._compute_rates is not None:
            self._group_rates.write(self._compute_rates(run, step))
        run.optimizer.step()
        for listen in self._on_weights:
            listen(run, step)
        for notify in self._on_weights_changed:
            notify(run)
        self._end_step()
        return True

    def _end_step(self) -> None:
        """Count the step, tell everyone, drop the gradients."""
        run, step = self.run, self.step_state
        run.progress.step += 1
        for listen in self._on_step_end:
            listen(run, step)
        if run.events:
            self._tell_events()
        for parameter in step.parameters:
            parameter.grad = None
        self._open_step()

    def _put_norm(self, gradients: list[Tensor]) -> None:
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else None
        self.run.metrics.put("grad_norm", norm)

    def step(self, *batches: Batch) -> Tensor:
        """One optimizer step over a window of micro-batches.

        Returns:
            The window's mean loss (0-d, detached, on the device).
        """
        self._need_set_up()
        if not batches:
            raise RunError("step() without a batch: hand in the micro-batches of the step")
        with self.streams:
            self._step(batches)
        assert self.step_state.loss is not None
        return self.step_state.loss

    def _step(self, batches: Sequence[Batch]) -> None:
        last = len(batches) - 1
        try:
            if last > 0 and self._compute_loss_weights is not None:
                batches = self._weigh(batches, self._compute_loss_weights)
            for index, batch in enumerate(batches):
                self._accumulate(batch, last=index == last)
            _ = self._update()  # a dropped window is counted in `progress.skipped`
        except BaseException:
            self._abandon_window()
            raise

    def _abandon_window(self) -> None:
        """Something raised: who goes on all the same finds nothing of the window left behind."""
        if self._window.count and self._forward_state is not None:
            self._forward_state.put_back()
        self._window.abandon()
        for parameter in self._parameters:
            parameter.grad = None

    def _weigh(self, batches: Sequence[Batch], weights_of: Callable[..., Any]) -> tuple[Batch, ...]:
        """Tell the window what the loss's terms will count in all of it."""
        taken = tuple(self._taken_in(batch) for batch in batches)
        found = [weights_of(self.run, batch) for batch in taken]
        if found[0]:
            self._window.expect(tuple(sum(each[1:], each[0]) for each in zip(*found, strict=True)))
        return taken

    def _add_penalties(self) -> None:
        terms = [call(self.run, self.step_state) for call in self._penalize]
        found = [term for term in terms if term is not None]
        if found:
            total = torch.stack([term.reshape(()) for term in found]).sum()
            (total * self.loss_scale.value).backward()  # type: ignore[no-untyped-call]

    def _usable(self, gradients: list[Tensor]) -> bool:
        """Unscale, check, and decide for all ranks whether the window is stepped."""
        weight = self._window.weight
        if not isinstance(weight, Tensor) and not weight:
            self._drop_empty()
            return False
        if not self._checks:
            self._empty = 0
            return True
        loss = self.step_state.loss
        assert loss is not None
        if self._autocast is torch.float16:
            flag = self._finite.scale_and_check(gradients, 1.0 / self.loss_scale.value)
            flag = flag + ~torch.isfinite(loss)
        else:  # a factor of 1 leaves the loss as it is, so it joins the one pass
            flag = self._finite.scale_and_check([*gradients, loss], 1.0)
        if isinstance(weight, Tensor):
            flag = torch.where(weight > 0, (flag > 0).float(), 2.0)
        if self._several:
            flag = self.run.strategy.reduce(flag)
        code = flag.item()  # the one host read of a step
        if code == 0:
            self._skips = self._empty = 0
            self.loss_scale.count_finite()
            return True
        self._finite.clear()
        if isinstance(weight, Tensor) and code == 2.0:
            self._drop_empty()
            return False
        self._after_non_finite()
        return False

    def _drop_window(self) -> None:
        """Leave no trace of the window; the step's number stands for the next one."""
        for parameter in self._parameters:
            parameter.grad = None
        if self._forward_state is not None:
            self._forward_state.put_back()

    def _drop_empty(self) -> None:
        """Drop a window in which nothing counted.

        Raises:
            RunError: there have been too many in a row: the run would never end.
        """
        self._drop_window()
        self._empty += 1
        if self._empty >= MAX_EMPTY:
            raise RunError(self._nothing_counts(f"in {self._empty} optimizer steps in a row"))

    def _nothing_counts(self, where: str) -> str:
        loss = next(entry.info.name for entry in self.plan.answering("compute_loss"))
        return (
            f"the loss {loss} has nothing to learn from {where}: every target is "
            f"run.ignore_index ({self.settings.ignore_index}) or has the sample weight 0. Look at "
            "the targets, or name another run.ignore_index"
        )

    def _after_non_finite(self) -> None:
        """Apply the policy; the optimizer has not stepped and no filter has seen the values."""
        progress, policy = self.run.progress, self.settings.non_finite
        names = name_non_finite(self.run.named_parameters())
        self._drop_window()
        progress.skipped += 1
        self._skips += 1
        if self.loss_scale.back_off():
            return  # an overflow of the scaled loss is how the scale finds its place
        where = f"in step {progress.step + 1}: {names}"
        if policy == "rollback":
            self._roll_back(where)
            return
        if policy in ("stop", "off") or self._skips >= MAX_SKIPS:
            times = f" {self._skips} windows in a row" if self._skips > 1 else ""
            raise NonFiniteError(
                f"not finite{times} {where}. The weights are those of step {progress.step}. "
                "Lower the learning rate, clip gradients, or set run.non_finite to skip or rollback"
            )

    def _roll_back(self, where: str) -> None:
        """Back to the newest checkpoint, on with the data: the windows after it are lost."""
        assert self.store is not None
        progress = self.run.progress
        rollbacks, skipped = progress.rollbacks + 1, progress.skipped
        if rollbacks > MAX_ROLLBACKS:
            raise NonFiniteError(f"not finite {where}, after {MAX_ROLLBACKS} rollbacks")
        epoch, batch = progress.epoch, progress.batch
        snapshot, _, _ = self.store.newest()
        self.take_up(snapshot, random=False)
        progress.epoch, progress.batch = epoch, batch
        progress.rollbacks, progress.skipped = rollbacks, skipped
        self._open_step()

    # -- the run ------------------------------------------------------------------------------

    def train(self) -> None:
        """Step until the end, a request to stop, or a cancel."""
        while not self._over():
            self._train_epoch()

    def _over(self) -> bool:
        settings, progress = self.settings, self.run.progress
        if self.stop_reason:
            return True
        if settings.max_steps is not None and progress.step >= settings.max_steps:
            self.stop_reason = f"max_steps ({settings.max_steps})"
        elif settings.max_epochs is not None and progress.epoch >= settings.max_epochs:
            self.stop_reason = f"max_epochs ({settings.max_epochs})"
        elif settings.max_seconds is not None and self.seconds() >= settings.max_seconds:
            self.stop_reason = f"max_seconds ({settings.max_seconds:g})"
        elif self.run.strategy.decide(int(self.cancel.is_set())):
            self.stop_reason = cancel_reason(self.cancel)
            self.cancelled = True
        return bool(self.stop_reason)

    def _train_epoch(self) -> None:
        """The rest of an epoch, from the position that `progress` tells."""
        progress, size = self.run.progress, self.settings.accumulate
        window: list[Batch] = []
        stepped, drawn, start = progress.step, False, progress.batch
        requests, cancelled, clock = self.run.requests, self.cancel.is_set, time.monotonic
        step = self.streams.holding(self._step)  # between steps other threads' runs take their turn
        for batch in self.run.data.batches(progress.epoch, progress.batch):
            window.append(batch)
            if len(window) < size:
                continue
            progress.batch += size
            step(window)
            drawn = True
            window.clear()
            if (
                progress.step >= self._next_due
                or requests
                or cancelled()
                or (self._deadline is not None and clock() >= self._deadline)
            ) and not self.attend():
                return
        if window:
            progress.batch += len(window)
            step(window)
            drawn = True
        if progress.batch == 0:
            raise RunError("the training data gave no batch: nothing can be trained")
        if self._empty and drawn and not start and progress.step == stepped:
            raise RunError(self._nothing_counts("in a whole epoch"))
        if not self.attend():
            return
        progress.epoch, progress.batch = progress.epoch + 1, 0
        for listen in self.bus.calls("on_epoch_end"):
            listen(self.run)

    def _schedule(self) -> None:
        """The next step after which something is due by interval."""
        settings, step = self.settings, self.run.progress.step
        every = [settings.log_every, settings.validate_every, settings.save_every]
        due = [(step // interval + 1) * interval for interval in every if interval]
        if settings.max_steps is not None:
            due.append(settings.max_steps)
        self._next_due = step if self._several else min(due)  # ranks decide together, each step
        if settings.max_seconds is not None:
            self._deadline = time.monotonic() + settings.max_seconds - self.seconds()

    def attend(self) -> bool:
        """Do what is due after a step: validate, log, save, serve requests, in this order.

        Returns:
            Whether training goes on.
        """
        settings, step = self.settings, self.run.progress.step
        every = settings.validate_every
        if every and step % every == 0 and step != self._validated_at:
            self.validate()
        if step and step % settings.log_every == 0 and step != self._logged_at:
            self.log()
        saves, tags = self._serve_requests()
        due = settings.save_every is not None and step % settings.save_every == 0
        if saves or (due and step and step != self._saved_at):
            self.save(tags)
        self._schedule()
        return not self._over()

    def _serve_requests(self) -> tuple[bool, tuple[str, ...]]:
        """Serve what plugins asked for; saving is left to the caller, who does it last."""
        run = self.run
        tags: dict[str, None] = {}
        saves = False
        restores: list[Request] = []
        for _ in range(3):  # a validation may lead to further requests, but not for ever
            requests, run.requests[:] = list(run.requests), []
            for request in requests:
                if request.what == "validate" and run.progress.step != self._validated_at:
                    self.validate()
                elif request.what == "save":
                    saves = True
                    tags.update({request.tag: None} if request.tag else {})
                elif request.what == "restore":
                    restores.append(request)
                elif request.what == "stop" and not self.stop_reason:
                    self.stop_reason = request.reason or "a plugin asked for it"
            if not run.requests:
                break
        if restores and saves:
            self.save(tuple(tags))  # what is to be kept is kept before weights are replaced
            saves, tags = False, {}
        for request in restores:
            self.restore_weights(request.tag)
        return saves, tuple(tags)

    def validate(self) -> dict[str, float]:
        """One pass over the validation data; model modes are left as they were.

        Returns:
            The figures over the whole set; empty when there is no validation data.
        """
        self._need_set_up()
        run = self.run
        run.active_model = self.evaluation_model()
        modes = [(module, module.training) for module in run.active_model.modules()]
        run.active_model.eval()
        try:
            # whatever a validation draws, each one draws the same, and training draws on as if
            # there had been none
            own = StreamState.seeded(self._validation_draws)
            with self.streams.drawing(own) as turn, torch.no_grad():
                figures = self._validation_pass(turn)
        finally:
            run.active_model = run.model
            for module, mode in modes:
                module.training = mode
        self._validated_at = run.progress.step
        self._awaited.look(run, figures)
        if figures:
            unfinished = self.unfinished()
            run.metrics.record_validation(figures, best=not unfinished)
            entries = self.plan.answering("on_validation")
            for entry, listen in zip(entries, self.bus.calls("on_validation"), strict=True):
                if not unfinished or self._hears_unfinished(entry):
                    listen(run, figures)
        self._tell_events()
        return figures

    def unfinished(self) -> list[str]:
        """Why the network is not yet what will be exported; empty when it is."""
        told = [answer(self.run) for answer in self.bus.calls("unfinished")]
        return [reason for reason in told if reason]

    def _hears_unfinished(self, entry: Planned) -> bool:
        """Whether a plugin is told the figures of a network that is not yet finished."""
        if entry.info.kind is not Kind.POLICIES or entry.info.hears_unfinished:
            return True
        asked = getattr(entry.config, "not_before", None)
        return asked is not None and self.run.progress.step >= asked

    def _validation_pass(self, turn: Callable[[], None]) -> dict[str, float]:
        run = self.run
        for meter in self._meters:
            meter.reset()
        # of each term of the loss: sum of weighted means, sum of weights; then the batches:
        # exact however they are shared out
        total: Tensor | None = None
        terms: list[TermMean] = []
        for item in run.data.validation():
            batch = self._taken_in(item)
            if self._autocast is None:
                answer, outputs = self._validation_loss(batch)
            else:
                with torch.autocast(run.device.type, self._autocast):
                    answer, outputs = self._validation_loss(batch)
            terms = self._term_means(answer, batch)
            if total is None:
                total = torch.zeros(2 * len(terms) + 1, dtype=torch.float64, device=run.device)
            for index, term in enumerate(terms):
                total[2 * index] += term.mean.double() * term.weight
                total[2 * index + 1] += term.weight
            total[-1] += 1
            loss, weight = _joined(terms)
            for meter in self._meters:
                meter.update(batch, outputs, loss, weight)
            turn()
        if total is None:
            total = torch.zeros(3, dtype=torch.float64, device=run.device)
        # all ranks add up, also one whose share was empty: the others wait for it
        *sums, seen = run.strategy.reduce(total).tolist()
        if not seen:
            return {}
        figures: dict[str, float] = {}
        if any(sums[1::2]):
            scales = [float(term.scale) for term in terms] or [1.0]
            means = [
                total / weight if weight else 0.0
                for total, weight in zip(sums[::2], sums[1::2], strict=True)
            ]
            figures["loss"] = sum(scale * mean for scale, mean in zip(scales, means, strict=True))
        for meter in self._meters:
            figures.update(meter.compute(run.strategy.reduce))
        return figures

    def _validation_loss(self, batch: Batch) -> tuple[Any, Any]:
        outputs = self.outputs(batch)
        answer = self._need("compute_loss")(self.run, self.step_state, batch, outputs)
        return answer, outputs

    def log(self) -> LogRecord:
        """Read the figures and tell everyone; the only place where metrics reach the host."""
        run, step = self.run, self.step_state
        run.metrics.put("loss", step.loss)
        run.metrics.put("learning_rate", float(run.optimizer.param_groups[0]["lr"]))
        if run.progress.skipped:
            run.metrics.put("skipped_steps", run.progress.skipped)
        if self._autocast is torch.float16:
            run.metrics.put("loss_scale", self.loss_scale.value)
        for answer in self.bus.calls("measure"):
            for name, value in answer(run, step).items():
                run.metrics.put(name, value)
        progress = run.progress
        record = LogRecord(progress.step, progress.epoch, time.time(), run.metrics.read())
        self._logged_at = progress.step
        for listen in self.bus.calls("on_log"):
            listen(run, record)
        return record

    def _tell_events(self) -> None:
        """Pass on what plugins told; a listener may not tell in its turn for ever."""
        run = self.run
        for _ in range(3):
            events, run.events[:] = list(run.events), []
            for event in events:
                for listen in self.bus.calls("on_event"):
                    listen(run, event)

    def seconds(self) -> float:
        """Seconds of training so far, over all sessions of the run."""
        passed = 0.0 if self._clock is None else time.monotonic() - self._clock
        return self.run.progress.seconds + passed

    # -- saving and restoring -----------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Everything that the run needs to go on."""
        run = self.run
        data = run.data
        self._bank_seconds()
        with self.streams:
            random = read_random_state()
        trees: dict[str, Any] = {
            "optimizer": optimizer_state(run),
            "plugins": {entry.label: plugin.state_dict() for entry, plugin in self.bus.stateful()},
            "random": random,
            "data": data.state_dict() if isinstance(data, Stateful) else None,
            "progress": asdict(run.progress),
            "metrics": run.metrics.state_dict(),
            "extra_state": extra_states(run),
            "loop": self._loop_state(),
        }
        versions = {entry.label: entry.origin for entry, _ in self.bus.stateful()}
        about = {
            **self.about,
            "torch": torch.__version__,
            "optimizer": type(run.optimizer).__name__,
            "plugins": versions,
        }
        return Snapshot(run.progress.step, run.strategy.model_state(run), trees, about)

    def _loop_state(self) -> dict[str, Any]:
        """The loop's own memory."""
        return {
            "scale": self.loss_scale.value,
            "clean": self.loss_scale.clean,
            "skips": self._skips,
            "empty": self._empty,
            "total_steps": self.run.total_steps,
            "phase": self._phase,
            "validated_at": self._validated_at,
            "logged_at": self._logged_at,
        }

    def _bank_seconds(self) -> None:
        self.run.progress.seconds = self.seconds()
        self._clock = time.monotonic() if self._clock is not None else None

    def save(self, tags: tuple[str, ...] = ()) -> Path | None:
        """Commit a checkpoint; None for a run without a folder.

        Args:
            tags: names to pin it under.
        """
        if self.store is None:
            return None
        folder = self.store.save(self.snapshot(), tags)
        self._saved_at = self.run.progress.step
        for listen in self.bus.calls("on_checkpoint"):
            listen(self.run, folder)
        return folder

    def restore(self) -> list[str]:
        """Take up the newest intact checkpoint of the run folder; nothing is written.

        Returns:
            What was wrong with newer ones, and what is otherwise than when it was saved.

        Raises:
            CheckpointError: there is no intact one.
        """
        assert self.store is not None, "a run without a folder has nothing to restore"
        snapshot, _, problems = self.store.newest()
        self.take_up(snapshot)
        known = snapshot.trees["loop"].get("total_steps", self.run.total_steps)
        self.run.total_steps_before = known
        self._saved_at = snapshot.step
        return [*problems, *self._otherwise(snapshot.about)]

    def _otherwise(self, about: Mapping[str, Any]) -> list[str]:
        """What a checkpoint was made with that is another now."""
        found = []
        if about.get("torch") not in (None, torch.__version__):
            found.append(f"it was saved with torch {about['torch']}, this is {torch.__version__}")
        origins = {entry.label: entry.origin for entry, _ in self.bus.stateful()}
        for label, origin in about.get("plugins", {}).items():
            if label in origins and origins[label] != origin:
                found.append(f"{label} was {origin} when it was saved, and is {origins[label]}")
        config = self.about.get("config")
        if config is not None and about.get("config") not in (None, config):
            found.append("the configuration is another than when it was saved")
        return found

    def clear_unfinished(self) -> None:
        """Remove what an interrupted save of this run left in its folder."""
        if self.store is not None:
            self.store.clear_unfinished()

    def take_up(self, snapshot: Snapshot, *, random: bool = True) -> None:
        """Bring the run to the state of a snapshot.

        Args:
            snapshot: what `snapshot` gave.
            random: also the random streams and the position in the data.

        Raises:
            RunError: it is of another model or of other plugins.
        """
        run, trees = self.run, snapshot.trees
        lacking = sorted(_TREES - trees.keys())
        if lacking:
            raise CheckpointError(
                f"the checkpoint of step {snapshot.step} has no {', '.join(lacking)}"
            )
        try:
            run.strategy.load_model_state(run, snapshot.model)
        except (KeyError, ValueError) as error:
            raise RunError(f"the checkpoint is of another model: {error.args[0]}") from error
        theirs, mine = snapshot.about.get("optimizer"), type(run.optimizer).__name__
        if theirs not in (None, mine):
            raise RunError(f"the checkpoint holds the memory of {theirs}, and this run has {mine}")
        load_extra_states(run, trees.get("extra_state", {}))
        load_optimizer_state(run, trees["optimizer"])
        known = trees["plugins"]
        for entry, plugin in self.bus.stateful():
            if entry.label not in known:
                raise RunError(
                    f"the checkpoint has no state of {entry.label}; it has {sorted(known)}"
                )
            plugin.load_state_dict(known[entry.label])
        for name, value in trees["progress"].items():
            if not hasattr(run.progress, name):
                raise CheckpointError(f"the checkpoint's progress has an unknown part '{name}'")
            if random or name not in ("epoch", "batch"):
                setattr(run.progress, name, value)
        assert isinstance(run.progress, Progress)
        run.metrics.load_state_dict(trees["metrics"])
        loop = {**self._loop_state(), **trees["loop"]}  # what an older one lacks stays as it is
        self.loss_scale.value, self.loss_scale.clean = loop["scale"], loop["clean"]
        self._skips, self._empty = loop["skips"], loop["empty"]
        self._phase = self.step_state.phase = loop["phase"]
        self._validated_at, self._logged_at = loop["validated_at"], loop["logged_at"]
        if random:
            data = run.data
            if isinstance(data, Stateful) and trees.get("data"):
                data.load_state_dict(trees["data"])
            with self.streams:
                write_random_state(trees["random"])
        for notify in self._on_weights_changed:
            notify(run)

    def restore_weights(self, tag: str) -> None:
        """Put the weights of a pinned checkpoint into the model.

        The plugin that names the evaluation model, if one does, takes up its memory too: what was
        validated then is what is restored. Nothing else changes.

        Raises:
            RunError: nothing is pinned under the tag.
        """
        found = self.store.pinned(tag) if self.store is not None else None
        if self.store is None or found is None:
            raise RunError(f"there is no checkpoint pinned as '{tag}' to restore")
        run, snapshot = self.run, self.store.load(found)
        run.strategy.load_model_state(run, snapshot.model)
        namers = {entry.path for entry in self.plan.answering("compute_evaluation_model")}
        for entry, plugin in self.bus.stateful():
            if entry.path in namers:
                plugin.load_state_dict(snapshot.trees["plugins"][entry.label])
        self._validated_at = -1
        for notify in self._on_weights_changed:
            notify(run)

    # -- the end ------------------------------------------------------------------------------

    def finish(self) -> dict[str, str]:
        """Keep, log, validate and export the result, once for each.

        The checkpoint comes first, so that a resumed run does not see what only an ended one does.
        A cancelled run is kept and not exported.

        Returns:
            Folders written by exporters, by name.
        """
        step = self.run.progress.step
        if step != self._saved_at:
            self.save()
        if self.cancelled:
            return {}
        if step and step != self._logged_at:
            self.log()
        if step != self._validated_at:
            self.validate()
            saves, tags = self._serve_requests()
            if saves:
                self.save(tags)
            if self._validated_at < 0:  # weights were restored meanwhile
                self.validate()
        self._bank_seconds()
        reasons = self.unfinished()
        if reasons:
            self.run.tell(
                "unfinished",
                f"The run has ended before its network was finished ({'; '.join(reasons)}): its "
                "figures are not those of what is exported.",
            )
            self._tell_events()
        return self.export()

    def hand_over(self) -> None:
        """Put the weights that validation and export used into the run's model.

        Where they are others than those in training (an average), the latter change places with
        them and are `training_model` from then on. Nothing can be trained afterwards.
        """
        run = self.run
        used = self.evaluation_model()
        if used is run.model:
            return
        with torch.no_grad():
            for mine, theirs in zip(run.model.parameters(), used.parameters(), strict=True):
                kept = mine.clone()
                mine.copy_(theirs)
                theirs.copy_(kept)
        self.training_model = used
        for notify in self._on_weights_changed:
            notify(run)

    def evaluation_model(self) -> nn.Module:
        """The model that validation and export use."""
        choose = self.bus.call("compute_evaluation_model")
        return self.run.model if choose is None else choose(self.run)

    def export(self) -> dict[str, str]:
        """Let the exporters write what the model is now; one that fails stops no other.

        Returns:
            Folders written, by exporter, relative to the run folder.
        """
        run = self.run
        if run.folder is None:
            return {}
        entries = zip(self.plan.answering("export"), self.bus.calls("export"), strict=True)
        run.active_model = self.evaluation_model()
        try:
            with self.streams:
                written, self.failed_exports = write_exports(
                    run.folder, [(entry.info.name, partial(call, run)) for entry, call in entries]
                )
        finally:
            run.active_model = run.model
        for name, error in self.failed_exports.items():
            run.tell("export_failed", f"The export {name} failed: {error}", export=name)
        self._tell_events()
        return written


def _joined(terms: Sequence[TermMean]) -> tuple[Tensor, float | Tensor]:
    """One mean and weight of a batch's terms, for whoever looks at the batch alone."""
    if len(terms) == 1:
        (term,) = terms
        return term.mean if term.scale == 1.0 else term.mean * term.scale, term.weight
    mean = torch.stack([term.mean * term.scale for term in terms]).sum()
    weights = [term.weight for term in terms]
    return mean, sum(weights[1:], weights[0]) / len(weights)
