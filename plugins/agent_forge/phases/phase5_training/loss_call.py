"""The caller's loss function, batches, optimizer and callbacks as parts of a run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

import torch
from torch import Tensor, nn

from agent_forge.phases.phase5_training.loss_modules import face_loss, further_of, modules_of
from forge_kernel.api import Batch, Kind, PluginInfo, Run, RunError, Step, call_model, hookimpl
from forge_kernel.embedding import IGNORE_INDEX, LoaderData, NoConfig, batch_from, initial_rate

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
    needed = [
        item.name for item in parameters if item.kind in by_place and item.default is item.empty
    ]
    if len(needed) == 1:
        return "batch"
    if len(needed) == 2:
        is_model = needed[0].lower() in _MODELS or needed[1].lower() in _BATCHES
        return "model_batch" if is_model else "predictions_targets"
    raise RunError(f"a loss function takes one or two arguments, not {needed}: {mend}")


def moved(value: Any, device: torch.device) -> Any:
    """A batch of the caller's on a device: a tensor, or tensors in containers, two deep at most."""
    return _each_part(value, lambda part: _each_part(part, lambda leaf: _sent(leaf, device)))


def _each_part(value: Any, move: Callable[[Any], Any]) -> Any:
    """A container of its own class with each part moved; what is no container, moved itself."""
    if isinstance(value, Tensor):
        return move(value)
    if isinstance(value, Mapping):
        parts = {name: move(part) for name, part in value.items()}
        return parts if type(value) is dict else type(value)(parts)  # type: ignore[call-arg]
    if isinstance(value, list | tuple):
        result = [move(part) for part in value]
        return type(value)(*result) if hasattr(value, "_fields") else type(value)(result)
    return move(value)


def _sent(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    return value.to(device) if hasattr(value, "to") else value


@dataclass(slots=True)
class CallersBatch(Batch):
    """A batch that keeps the form in which the caller's loader gave it."""

    given: Any = None

    @classmethod
    def of(cls, given: Any) -> CallersBatch:
        """Inputs and targets where the form tells them, else the whole as inputs."""
        further = further_of(given)
        named = (
            {key: part for key, part in given.items() if key not in further} if further else given
        )
        try:
            known = batch_from(named)
        except RunError:
            return cls(given, None, None, None, given)
        return cls(known.inputs, known.targets, known.weights, known.positions, given)

    def rows(self, chosen: slice) -> CallersBatch:
        """The batch of some of its samples, in the form in which it was given."""
        samples = self.samples

        def cut(value: Any) -> Any:
            shape = getattr(value, "shape", None)
            return value[chosen] if shape and shape[0] == samples else value

        parts = _each_part(self.given, lambda part: _each_part(part, cut))
        return CallersBatch.of(parts)

    def to(self, device: torch.device) -> CallersBatch:
        """The batch on a device, once for all its parts."""
        return CallersBatch.of(moved(self.given, device))


@dataclass(slots=True)
class Before:
    """Steps and epochs that were made before a run began, with the same loop."""

    steps: int = 0
    epochs: int = 0


class CallersData(LoaderData):
    """The caller's loaders as data of a run; batches keep the form in which they came.

    Args:
        training: an iterable of batches, begun anew for each epoch.
        validation: likewise.
        before: epochs that count in what the loader is told.
    """

    def __init__(
        self,
        training: Iterable[Any],
        validation: Iterable[Any] = (),
        before: Before | None = None,
    ) -> None:
        super().__init__(training, validation, convert=CallersBatch.of)
        self.before = before or Before()

    def batches(self, epoch: int, place: int) -> Iterator[Batch]:
        """One pass from a place on; the loader hears the epoch over all runs."""
        return super().batches(self.before.epochs + epoch, place)

    def place_after(self, epoch: int, batches: int) -> int:
        """The place after so many batches; the loader hears the epoch over all runs."""
        return super().place_after(self.before.epochs + epoch, batches)


class CallersLoss:
    """The caller's loss function, in whichever form it is written.

    A batch counts with its targets, but for those that the function itself passes over (its
    `ignore_index`, -100 unless it has one); without targets, with its samples. A loss of this
    package is handed, in training, `model`, `inputs` and what else a batch that is a mapping holds
    by name.

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
        self._ignored = IGNORE_INDEX
        self._function: LossFunction | None = None
        self._asked: str | None = None
        self._form: Form = "predictions_targets"
        self._needs: Mapping[str, str] | None = None  # None: no loss of this package
        self._companions: dict[str, nn.Module] | None = None  # None: not in a run yet
        self._model: nn.Module | None = None
        if loss_fn is not None:
            self.use(loss_fn, form)

    def use(self, loss_fn: LossFunction, form: str | None = None) -> None:
        """Call this function from now on; its form is found once.

        Raises:
            RunError: see `form_of`; or it brings parameters or averages that the run, begun with
                another function, does not know.
        """
        if loss_fn is self._function and form == self._asked:
            return
        result = form_of(loss_fn, form)
        loss = face_loss(loss_fn)
        needs = None if loss is None else loss.needs()
        if self._companions is not None and self._model is not None:
            known = {id(item) for item in self._companions.values()}
            if any(id(item) not in known for item in modules_of(loss_fn, self._model).values()):
                raise RunError(
                    "this loss has parameters or averages of its own, and the training began with "
                    "another one: give it from the first step on"
                )
        self._form, self._function, self._asked, self._needs = result, loss_fn, form, needs
        ignored = getattr(loss_fn, "ignore_index", None)
        self._ignored = ignored if isinstance(ignored, int) else IGNORE_INDEX

    @hookimpl
    def make_modules(self, run: Run) -> Mapping[str, nn.Module]:
        """What the function brings; trained, saved and restored with the model."""
        self._model = run.model
        self._companions = {} if self._function is None else modules_of(self._function, run.model)
        return self._companions

    @hookimpl
    def compute_outputs(self, run: Run, step: Step, batch: Batch) -> Any:
        """The predictions; None where the caller's function runs the model itself.

        In a validation they are also had for the metrics, where the batch has targets.
        """
        del step
        batch.ignore_index = self._ignored  # what the caller's function passes over counts nothing
        if self._form == "predictions_targets" or (
            self.predicts and batch.targets is not None and not torch.is_grad_enabled()
        ):
            return call_model(run.active_model, batch)
        return None

    @hookimpl
    def compute_loss(self, run: Run, step: Step, batch: Batch, outputs: Any) -> Tensor:
        """What the caller's function says: the mean over the targets that count.

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
            loss = self._function(outputs, batch.targets, **self._further(run, batch, given))
        if isinstance(loss, Mapping):
            loss = loss.get("total_loss")  # of `LossManager.compute_total_loss`
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shown = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise RunError(f"loss_fn must give one number as a tensor, not {shown}")
        return loss.reshape(())

    def _further(self, run: Run, batch: Batch, given: Any) -> dict[str, Any]:
        """What a loss of this package is handed by name; in a validation nothing.

        Raises:
            RunError: a setting needs what the batch does not hold.
        """
        if self._needs is None or not torch.is_grad_enabled():
            return {}
        result = {**further_of(given), "model": run.active_model, "inputs": batch.inputs}
        for name, setting in self._needs.items():
            if name not in result:
                raise RunError(
                    f"LossConfig.{setting} needs {name}, which the batch does not hold: give "
                    f"batches as {{'input': ..., 'target': ..., '{name}': ...}}, or set it to 0"
                )
        return result


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

        What the model's companions have to be trained (the learned weights of a loss) joins it, at
        its first group's rate and without decay, where the caller has not given it himself.

        Raises:
            RunError: it steps tensors that neither the model nor the loss has.
        """
        known = {id(parameter) for _, parameter in parameters}
        groups = self._optimizer.param_groups
        foreign = [value for group in groups for value in group["params"] if id(value) not in known]
        if foreign:
            shapes = ", ".join(str(tuple(value.shape)) for value in foreign[:3])
            raise RunError(
                f"the optimizer steps {len(foreign)} tensors that the model does not have (shapes "
                f"{shapes}): make it from model.parameters() of the model that is trained, and "
                "from loss.parameters() where the loss has some"
            )
        stepped = {id(value) for group in groups for value in group["params"]}
        own = [value for module in run.modules.values() for value in module.parameters()]
        missing = [value for value in own if value.requires_grad and id(value) not in stepped]
        if missing:
            group: dict[str, Any] = {"params": missing, "lr": initial_rate(groups[0])}
            if "weight_decay" in groups[0]:
                group["weight_decay"] = 0.0  # it would draw learned weights towards equal ones
            self._optimizer.add_param_group(group)
        return self._optimizer


class Callbacks:
    """The caller's objects with `on_step_end` and `on_epoch_end`, told of plain values.

    Args:
        listeners: the objects.
        before: what the counts go on from; part of the run's state.
    """

    info = PluginInfo(name="callbacks", kind=Kind.OBSERVERS, config=NoConfig)

    def __init__(self, listeners: Sequence[Any], before: Before | None = None) -> None:
        self.config = NoConfig()
        self.before = before or Before()
        self._steps = [item.on_step_end for item in listeners if hasattr(item, "on_step_end")]
        self._epochs = [item.on_epoch_end for item in listeners if hasattr(item, "on_epoch_end")]

    @hookimpl
    def on_step_end(self, run: Run, step: Step) -> None:
        """`on_step_end(step, metrics)`."""
        if self._steps:
            done = self.before.steps + run.progress.step
            metrics = {**step_metrics(run, step), "step": done}
            for listen in self._steps:
                listen(done, metrics)

    @hookimpl
    def on_epoch_end(self, run: Run) -> None:
        """`on_epoch_end(epoch, metrics)`: finished epochs, the latest validation's metrics."""
        for listen in self._epochs:
            listen(self.before.epochs + run.progress.epoch, dict(run.metrics.validation))

    def state_dict(self) -> dict[str, Any]:
        """What the counts go on from."""
        return {"steps": self.before.steps, "epochs": self.before.epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the counts of the run that is taken up."""
        self.before.steps, self.before.epochs = int(state["steps"]), int(state["epochs"])


def step_metrics(run: Run, step: Step) -> dict[str, Any]:
    """What is known at the end of a step, read to the host: the latest validation's metrics too.

    The step's own loss comes under `loss`, that of the validation under `val_loss`.
    """
    known = run.metrics.validation
    result: dict[str, Any] = {name: value for name, value in known.items() if name != "loss"}
    if "loss" in known:
        result["val_loss"] = known["loss"]
    result["loss"] = None if step.loss is None else float(step.loss)
    result["learning_rate"] = float(run.optimizer.param_groups[0]["lr"])
    result["step"] = run.progress.step
    if step.phase is not None:
        result["grokfast_phase"] = step.phase
    return result
