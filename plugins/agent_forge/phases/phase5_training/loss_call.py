"""The caller's loss function, batches, optimizer and callbacks as parts of a run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

import torch
from torch import Tensor, nn

from forge_kernel.api import Batch, DataSpec, Kind, PluginInfo, Run, RunError, Step, hookimpl
from forge_kernel.data import batch_from
from forge_kernel.live import NoConfig
from forge_plugins.mathematics.samples import samples_in

Form = Literal["predictions_targets", "batch", "model_batch"]
"""What a loss function is called with."""

LossFunction = Callable[..., Any]
_MODELS: Final = frozenset({"model", "net", "network", "module"})
_BATCHES: Final = frozenset({"batch", "data", "sample", "samples"})
_FORMS: Final = ("predictions_targets", "batch", "model_batch")


def form_of(loss_fn: LossFunction, form: str | None = None) -> Form:
    """How a loss function wants to be called.

    One argument is the batch; two are the predictions and the targets, unless the first is named
    like a model (`model`, `net`, ...) or the second like a batch (`batch`, `data`, ...).

    Args:
        loss_fn: a function, a bound method or a module.
        form: overrides what the signature says.

    Raises:
        RunError: the signature does not tell.
    """
    if form is not None:
        if form not in _FORMS:
            raise RunError(f"loss_form {form!r} is none of {', '.join(_FORMS)}")
        return cast(Form, form)
    if not callable(loss_fn):
        raise RunError(f"loss_fn is a {type(loss_fn).__name__}, which cannot be called")
    named = loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn
    mend = "say which with loss_form='predictions_targets', 'batch' or 'model_batch'"
    try:
        parameters = list(inspect.signature(named).parameters.values())
    except (TypeError, ValueError) as error:
        raise RunError(f"what {loss_fn!r} is called with cannot be read: {mend}") from error
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [one.name for one in parameters if one.kind in by_place and one.default is one.empty]
    if len(needed) == 1:
        return "batch"
    if len(needed) == 2:
        is_model = needed[0].lower() in _MODELS or needed[1].lower() in _BATCHES
        return "model_batch" if is_model else "predictions_targets"
    raise RunError(f"a loss function takes one or two arguments, not {needed}: {mend}")


def moved(value: Any, device: torch.device) -> Any:
    """A batch of the caller's on a device: a tensor, or tensors in a mapping, list or tuple."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        parts = {name: _part_moved(part, device) for name, part in value.items()}
        return parts if type(value) is dict else type(value)(parts)  # type: ignore[call-arg]
    if isinstance(value, list | tuple):
        found = [_part_moved(part, device) for part in value]
        return type(value)(*found) if hasattr(value, "_fields") else type(value)(found)
    return value.to(device) if hasattr(value, "to") else value


def _part_moved(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if hasattr(value, "to") else value


@dataclass(slots=True)
class CallersBatch(Batch):
    """A batch that keeps the form in which the caller's loader gave it."""

    given: Any = None

    @classmethod
    def of(cls, given: Any) -> CallersBatch:
        """Inputs and targets where the form tells them, else the whole as inputs."""
        try:
            known = batch_from(given)
        except RunError:
            return cls(given, None, None, None, given)
        return cls(known.inputs, known.targets, known.weights, known.positions, given)

    def to(self, device: torch.device) -> CallersBatch:
        """The batch on a device, once for all its parts."""
        return CallersBatch.of(moved(self.given, device))

    def size(self) -> int:
        """Its number of samples."""
        return samples_in(self.inputs if self.targets is not None else self.given)


class CallersData:
    """The caller's loaders as data of a run.

    Args:
        training: an iterable of batches, begun anew for each epoch.
        validation: likewise.
    """

    def __init__(
        self, training: Iterable[Any], validation: Iterable[Any] = (), classes: int | None = None
    ) -> None:
        self.spec = DataSpec(classes=classes)
        self._training, self._validation = training, validation
        try:
            self.batches_per_epoch: int | None = len(training)  # type: ignore[arg-type]
        except TypeError:
            self.batches_per_epoch = None

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """One pass, without its first `start` batches."""
        sampler = getattr(self._training, "sampler", None)
        if sampler is not None and hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        for position, given in enumerate(self._training):
            if position >= start:
                yield CallersBatch.of(given)

    def validation(self) -> Iterator[Batch]:
        """One pass over the validation batches."""
        for given in self._validation:
            yield CallersBatch.of(given)


class CallersLoss:
    """The caller's loss function, in whichever form it is written.

    The weight of a batch is its number of samples.

    Args:
        loss_fn: the function; `use` gives another one later.
        form: overrides what its signature says.
        predicts: whether validations need predictions, whatever the form.
    """

    info = PluginInfo(name="callers_loss", kind=Kind.LOSS, config=NoConfig)

    def __init__(
        self,
        loss_fn: LossFunction | None = None,
        form: str | None = None,
        *,
        predicts: bool = False,
    ) -> None:
        self.config = NoConfig()
        self.predicts = predicts
        self._function: LossFunction | None = None
        self._asked: str | None = None
        self._form: Form = "predictions_targets"
        if loss_fn is not None:
            self.use(loss_fn, form)

    def use(self, loss_fn: LossFunction, form: str | None = None) -> None:
        """Call this function from now on; its form is found once.

        Raises:
            RunError: see `form_of`.
        """
        if loss_fn is self._function and form == self._asked:
            return
        self._form, self._function, self._asked = form_of(loss_fn, form), loss_fn, form

    @hookimpl
    def compute_outputs(self, run: Run, step: Step, batch: Batch) -> Any:
        """The predictions; None where the caller's function runs the model itself.

        In a validation they are also had for the figures, where the batch has targets.
        """
        del step
        if self._form == "predictions_targets" or (
            self.predicts and batch.targets is not None and not torch.is_grad_enabled()
        ):
            return run.active_model(batch.inputs)
        return None

    @hookimpl
    def compute_loss(
        self, run: Run, step: Step, batch: Batch, outputs: Any
    ) -> tuple[Tensor, float | Tensor]:
        """What the caller's function says.

        Raises:
            RunError: it needs targets and the batch has none, or it gives no single number.
        """
        del step
        assert self._function is not None, "no loss function was given"
        given = batch.given if isinstance(batch, CallersBatch) else batch
        if self._form == "batch":
            loss = self._function(given)
        elif self._form == "model_batch":
            loss = self._function(run.active_model, given)
        elif batch.targets is None:
            raise RunError(
                "loss_fn(predictions, targets) needs targets, and the batch has none: give batches "
                "as (input, target) or {'input': ..., 'target': ...}, or write loss_fn(batch)"
            )
        else:
            loss = self._function(outputs, batch.targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shown = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise RunError(f"loss_fn must give one number as a tensor, not {shown}")
        size = batch.size() if isinstance(batch, CallersBatch) else samples_in(batch.inputs)
        return loss.reshape(()), float(size)


class CallersOptimizer:
    """The caller's optimizer as it is."""

    info = PluginInfo(name="callers_optimizer", kind=Kind.OPTIMIZER, config=NoConfig)

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.config = NoConfig()
        self._optimizer = optimizer

    @hookimpl
    def make_optimizer(
        self, run: Run, parameters: Sequence[tuple[str, nn.Parameter]]
    ) -> torch.optim.Optimizer:
        """The optimizer, when it is one over the model that is trained.

        Raises:
            RunError: it steps tensors that the model does not have.
        """
        del run
        known = {id(parameter) for _, parameter in parameters}
        groups = self._optimizer.param_groups
        foreign = [value for group in groups for value in group["params"] if id(value) not in known]
        if foreign:
            shapes = ", ".join(str(tuple(value.shape)) for value in foreign[:3])
            raise RunError(
                f"the optimizer steps {len(foreign)} tensors that the model does not have (shapes "
                f"{shapes}): make it from model.parameters() of the model that is trained"
            )
        return self._optimizer


class Callbacks:
    """The caller's objects with `on_step_end` and `on_epoch_end`, told of plain values."""

    info = PluginInfo(name="callbacks", kind=Kind.OBSERVERS, config=NoConfig)

    def __init__(self, listeners: Sequence[Any]) -> None:
        self.config = NoConfig()
        self._steps = [one.on_step_end for one in listeners if hasattr(one, "on_step_end")]
        self._epochs = [one.on_epoch_end for one in listeners if hasattr(one, "on_epoch_end")]

    @hookimpl
    def on_step_end(self, run: Run, step: Step) -> None:
        """`on_step_end(step, metrics)`."""
        if self._steps:
            metrics = step_metrics(run, step)
            for listen in self._steps:
                listen(run.progress.step, metrics)

    @hookimpl
    def on_epoch_end(self, run: Run) -> None:
        """`on_epoch_end(epoch, metrics)`: finished epochs, the latest validation's figures."""
        for listen in self._epochs:
            listen(run.progress.epoch, dict(run.metrics.validation))


def step_metrics(run: Run, step: Step) -> dict[str, Any]:
    """What is known at the end of a step, read to the host: the latest validation's figures too.

    The step's own loss comes under `loss`, that of the validation under `val_loss`.
    """
    known = run.metrics.validation
    found: dict[str, Any] = {name: value for name, value in known.items() if name != "loss"}
    if "loss" in known:
        found["val_loss"] = known["loss"]
    found["loss"] = None if step.loss is None else float(step.loss)
    found["learning_rate"] = float(run.optimizer.param_groups[0]["lr"])
    found["step"] = run.progress.step
    if step.phase is not None:
        found["grokfast_phase"] = step.phase
    return found
