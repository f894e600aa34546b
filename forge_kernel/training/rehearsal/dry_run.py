"""Two samples through forward, loss and metrics, before anything of a run is kept.

    set-up -> two samples -> outputs -> loss -> metrics -> exporters, callbacks
                  |             |         |
                 NaN      the layer's   both shapes, the plugin
                           name

It is done as a validation is: without gradients, in evaluation mode, with random streams of its
own, so that the run that follows is the same to the bit.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from forge_kernel.config.document import Document
from forge_kernel.contract.answers import shown
from forge_kernel.contract.data import DataSpec
from forge_kernel.contract.values import Batch
from forge_kernel.errors import (
    INTERRUPTS,
    CheckpointError,
    Fault,
    FaultsError,
    OutOfMemoryError,
    PlanError,
)
from forge_kernel.training.guards.out_of_memory import ran_out, reported
from forge_kernel.training.rehearsal.placed_faults import Places, raised_in
from forge_kernel.training.session import Session
from forge_kernel.training.set_up import check_before_start

SAMPLES: Final = 2


def rehearse(session: Session, document: Document | None = None) -> None:
    """Set a run up and try it on two samples; nothing is trained.

    Args:
        session: not set up yet. It is closed when it is refused.
        document: the file that names its parts, for the places of faults.

    Raises:
        PlanError: what cannot work, each fault at its place.
        OutOfMemoryError: the memory does not suffice for two samples.
    """
    places = Places(session.plan.entries, document)
    try:
        _ = session.opened()
        faults = _faults_of_a_batch(session, places)
        faults += _faults_of(session, places)
    except INTERRUPTS:
        session.close()
        raise
    except BaseException as error:
        session.close()
        if ran_out(error):
            raise reported(session.run, error, ()) from error
        if not isinstance(error, Exception) and session.bus.blame(error.__traceback__) is None:
            raise  # nobody's, such as the end of the interpreter
        blamed = session.bus.blame(error.__traceback__)
        raise PlanError(places.faults_of(error, blamed)) from error
    if faults:
        session.close()
        raise PlanError(faults)


def unfit_change(
    error: Exception, session: Session, document: Document, settings: Sequence[str]
) -> Exception:
    """What a run that goes on with changed settings is refused for, at the change's place.

    Args:
        error: what opening it raised.
        session: that was to be opened.
        document: the run's configuration with the changes.
        settings: the changes, as `key=value`.
    """
    if isinstance(error, OutOfMemoryError | CheckpointError):
        return error
    blamed = session.bus.blame(error.__traceback__)
    faults = Places(session.plan.entries, document).faults_of(error, blamed)
    hint = f"the run was not changed; leave out what does not fit: --set {' --set '.join(settings)}"
    return PlanError([replace(fault, hints=(*fault.hints, hint)) for fault in faults])


def _faults_of(session: Session, places: Places) -> list[Fault]:
    """What exporters, callbacks and the disk say of the run."""
    try:
        check_before_start(session)
    except FaultsError as error:
        return places.faults_of(error, None)
    return []


def _faults_of_a_batch(session: Session, places: Places) -> list[Fault]:
    batch = _two_samples(session)
    if batch is None:
        return []
    faults = [*_not_finite(session, places, batch)]
    if faults:
        return faults
    return _Trial(session, places, batch).faults()


def _two_samples(session: Session) -> Batch | None:
    """The first samples of the order of epoch 0; None of data that would not give them again."""
    run, data = session.run, session.run.data
    if run.strategy.world_size > 1:
        return None
    take = getattr(data, "take", None)
    if take is not None:
        batch = take(0, range(min(SAMPLES, getattr(data.spec, "samples", None) or SAMPLES)))
    elif hasattr(data, "state_dict"):
        return None  # drawing from it moves it
    else:
        batch = next(iter(data.batches(0, 0)), None)
    if batch is None:
        return None
    taken = session.forward.to_device(batch)
    return taken.rows(slice(0, SAMPLES))


def _not_finite(session: Session, places: Places, batch: Batch) -> list[Fault]:
    """What in the samples is NaN or infinite."""
    label = next(e.label for e in session.plan.entries if "make_data" in e.hooks)
    return [
        places.fault(
            f"the {name} of the first samples hold values that are NaN or infinite",
            places.path_of(label),
            "mend or leave out such samples: nothing can be learned from them",
        )
        for name, value in (("inputs", batch.inputs), ("targets", batch.targets))
        if isinstance(value, Tensor)
        and value.is_floating_point()
        and not bool(torch.isfinite(value).all())
    ]


class _Trial:
    """The two samples through the model, and what is wrong there."""

    def __init__(self, session: Session, places: Places, batch: Batch) -> None:
        self._session, self._places, self._batch = session, places, batch

    def faults(self) -> list[Fault]:
        """What was raised, as faults; tried with the largest label and token that there are."""
        on_host = self._session.run.device.type == "cpu"  # others are lost by a wrong index
        spec = self._session.run.data.spec
        largest = _with_numbers(self._batch, spec, largest=True) if on_host else None
        error = self._error_of(largest or self._batch)
        if error is None:
            return []
        least = _with_numbers(self._batch, spec, largest=False)
        if largest is not None and least is not None and self._error_of(least) is None:
            return self._out_of_range(error, largest)
        return self._faults_of(error, self._batch)

    def _error_of(self, batch: Batch) -> Exception | None:
        try:
            with _without_compiling():
                self._session.validation.try_batch(batch)
        except Exception as error:
            if ran_out(error):
                raise
            return error
        return None

    def _out_of_range(self, error: Exception, batch: Batch) -> list[Fault]:
        """The samples fit, the largest label or token that the data has does not."""
        spec = self._session.run.data.spec
        layer = self._failing_layer(batch)
        if layer is not None:
            last = (spec.vocabulary or 0) - 1
            message = f"the data has tokens up to {last}, which {layer} does not know"
            hint = "give the model the data's vocabulary"
            path = self._path("make_model")
        else:
            outputs = self._outputs(batch)
            message = (
                f"the data has {spec.classes} classes (labels 0 to {(spec.classes or 0) - 1}), and "
                f"the model gives outputs of {_form(outputs)}: {_first_line(error)}"
            )
            hint = f"let the model give {spec.classes} outputs, or mend the labels"
            path = self._path("make_model")
        return [self._places.fault(message, path, hint)]

    def _faults_of(self, error: Exception, batch: Batch) -> list[Fault]:
        blamed = self._session.bus.blame(error.__traceback__)
        hook = blamed[1] if blamed is not None else ""
        data = (
            f"the data gives inputs of {_form(batch.inputs)} and targets of {_form(batch.targets)}"
        )
        if hook in ("compute_loss", "make_metrics"):
            label = blamed[0] if blamed is not None else ""
            if isinstance(error, FaultsError):
                return self._places.faults_of(error, blamed)
            outputs = self._outputs(batch)
            message = (
                f"{label} cannot compare outputs of {_form(outputs)} with targets of "
                f"{_form(batch.targets)}: {_first_line(error)}"
            )
            hints: tuple[str, ...] = (
                data,
                _mend(self._outputs(batch), batch, self._session.run.data.spec),
            )
            return [self._places.fault(message, self._places.path_of(label), *hints)]
        layer = self._failing_layer(batch)
        if layer is None or isinstance(error, FaultsError):
            return self._places.faults_of(error, blamed)
        message = f"{layer}: {_first_line(error)}"
        hints = (data, raised_in(error), "let the layer take what it is given, or the data give it")
        return [self._places.fault(message, self._path("make_model"), *hints)]

    def _path(self, hook: str) -> tuple[str | int, ...]:
        entry = next(entry for entry in self._session.plan.entries if hook in entry.hooks)
        return self._places.path_of(entry.label)

    def _outputs(self, batch: Batch) -> Any:
        """What the model gives, for a message; what was raised is told already."""
        try:
            with _without_compiling():
                return self._session.validation.try_outputs(batch)
        except Exception:  # noqa: BLE001  see above
            return None

    def _failing_layer(self, batch: Batch) -> str | None:
        """The innermost layer that raises, with the shape that it was given; None: none does."""
        watch = _LayerWatch(self._session.run.model)
        try:
            with watch, _without_compiling():
                _ = self._session.validation.try_outputs(batch)
        except Exception:  # noqa: BLE001  it is told by whoever asks
            return watch.open_layer()
        return None


class _LayerWatch:
    """Notes which layers of a model are being run, and what they were given."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._running: list[tuple[nn.Module, Any]] = []
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for module in self._names:
            self._handles.append(
                module.register_forward_pre_hook(
                    lambda module, given: self._running.append((module, given))
                )
            )
            self._handles.append(
                module.register_forward_hook(lambda module, given, answer: self._ended())
            )

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _ended(self) -> None:
        del self._running[-1]

    def open_layer(self) -> str | None:
        """The innermost that has begun and not ended, in words."""
        if not self._running:
            return None
        module, given = self._running[-1]
        name, about = self._names[module], module.extra_repr()
        what = f"{type(module).__name__}({about})" if about else type(module).__name__
        where = (
            f"the model's layer {name}, {what}," if name else f"the model, {type(module).__name__},"
        )
        shapes = " and ".join(_form(value) for value in given) or "nothing"
        return f"{where} was given {shapes}"


def _with_numbers(batch: Batch, spec: DataSpec, *, largest: bool) -> Batch | None:
    """The samples with the largest label and token that the data has, or with the least alone.

    Returns:
        None: they have neither labels nor tokens.
    """
    targets, inputs = batch.targets, batch.inputs
    changed: dict[str, Any] = {}
    if _counts_up(targets) and spec.classes and not (
        targets.ndim > 1 and targets.shape[-1] == spec.classes  # a number for each class
    ):  # fmt: skip
        changed["targets"] = _with_last(targets, spec.classes - 1 if largest else None)
    if _counts_up(inputs) and spec.vocabulary:
        changed["inputs"] = _with_last(inputs, spec.vocabulary - 1 if largest else None)
    return replace(batch, **changed) if changed else None


def _counts_up(value: Any) -> bool:
    """Whether a value is whole numbers of at least 32 bits."""
    return (
        isinstance(value, Tensor)
        and value.dtype in (torch.int32, torch.int64)
        and bool(value.numel())
    )


def _with_last(values: Tensor, number: int | None) -> Tensor:
    """A copy whose last value is another; None: all are 0."""
    if number is None:
        return torch.zeros_like(values)
    changed = values.clone(memory_format=torch.contiguous_format)
    changed.view(-1)[-1] = number
    return changed


def _form(value: Any) -> str:
    """Shape and kind of numbers: `shape (2, 64) float32`."""
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return shown(value)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _mend(outputs: Any, batch: Batch, spec: DataSpec) -> str:
    """What to change where outputs and targets do not meet."""
    targets = batch.targets
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return "let the model give one tensor, or choose the loss that reads what it gives"
    if targets.is_floating_point() and outputs.shape != targets.shape:
        return "let the model give as many numbers as the targets have, or choose another loss"
    if not targets.is_floating_point() and spec.classes and outputs.shape[-1] != spec.classes:
        return f"let the model give {spec.classes} outputs, one for each class"
    return "choose the loss for such targets: classes are whole numbers, amounts are fractions"


def _without_compiling() -> AbstractContextManager[Any]:
    """Compiled parts run plainly: two samples are not worth a compilation."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]
