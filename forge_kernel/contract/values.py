"""Values that hooks are given: batches, steps, progress, records, events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from forge_kernel.contract.counting import IGNORE_INDEX, Counted, count, samples_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


RequestName = Literal["stop", "save", "restore", "validate"]


@dataclass(slots=True)
class Batch:
    """One micro-batch.

    Args:
        inputs: what the model reads, first dimension = samples.
        targets: what the loss compares with, or None.
        weights: weight of each sample in the loss, shape (samples,), or None for equal weights.
        positions: which positions of the sequence (second dimension) the loss reads, as an index
            of that dimension; models and validators need compute no others. None: all.
        ignore_index: the integer target that counts for nothing; the kernel sets it to
            `run.ignore_index`.
    """

    inputs: Any
    targets: Any = None
    weights: Tensor | None = None
    positions: slice | Tensor | None = None
    ignore_index: int = field(default=IGNORE_INDEX, kw_only=True)
    _count: tuple[Any, Any, Any, int, Counted] | None = field(
        default=None, init=False, repr=False, compare=False
    )

    @property
    def samples(self) -> int:
        """How many samples it holds; an empty one has 1, so that a place moves on with each."""
        known = self._count
        if known is not None and known[0] is self.targets:  # each step counts it
            return known[4].samples or 1
        shape = getattr(self.targets, "shape", None)
        return int(shape[0] if shape else samples_of(self.inputs)) or 1

    def rows(self, chosen: slice) -> Batch:
        """The batch of some of its samples; what is no tensor with a first dimension stays."""
        samples = self.samples

        def cut(value: Any) -> Any:
            shape = getattr(value, "shape", None)
            return value[chosen] if shape and shape[0] == samples else value

        def all_cut(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: cut(part) for name, part in value.items()}
            if isinstance(value, list | tuple):
                return type(value)(cut(part) for part in value)
            return cut(value)

        return replace(
            self,
            inputs=all_cut(self.inputs),
            targets=all_cut(self.targets),
            weights=None if self.weights is None else cut(self.weights),
        )

    @property
    def counted(self) -> Counted:
        """How much each target counts: what every loss and validator weighs by.

        Raises:
            RunError: the weights do not fit the targets.
        """
        targets, weights, ignore_index = self.targets, self.weights, self.ignore_index
        known, version = self._count, getattr(targets, "_version", 0)
        # what a count is of: it is taken anew when any of it is replaced or written to
        if known is not None:
            of, by, without, at, answer = known
            if of is targets and by is weights and without == ignore_index and at == version:
                return answer
        taken = count(targets, weights, self.inputs, ignore_index)
        self._count = (targets, weights, ignore_index, version, taken)
        return taken

    def as_numbers(self) -> Batch:
        """The batch with targets that are numbers, all of which count, even if they are whole."""
        targets = self.targets
        if not hasattr(targets, "is_floating_point") or targets.is_floating_point():
            return self
        return replace(self, targets=targets.float())

    def counted_as(self, counted: Counted, device: torch.device) -> None:
        """Take over the count of the same batch on the host, where counting waits for nothing."""
        weights = counted.weights
        if weights is not None and weights.device != device:
            counted = replace(counted, weights=weights.to(device, non_blocking=True))
        version = getattr(self.targets, "_version", 0)
        self._count = (self.targets, self.weights, self.ignore_index, version, counted)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""

        def moved(value: Any) -> Any:
            return value.to(device, non_blocking=True) if hasattr(value, "to") else value

        def all_moved(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: moved(part) for name, part in value.items()}
            return moved(value)

        return Batch(
            all_moved(self.inputs),
            all_moved(self.targets),
            moved(self.weights),
            moved(self.positions),
            ignore_index=self.ignore_index,
        )


@dataclass(slots=True)
class Step:
    """The optimizer step in progress.

    `number` counts from 1; `logs` says that this step ends a log interval; `loss` is the weighted
    mean over the window so far (0-d, on the device); `losses` the means of the loss's named terms
    over the whole window, and `parameters` and `gradients` those that have a gradient, in one
    order, from `on_gradients` on.
    """

    number: int = 1
    phase: str | None = None
    logs: bool = False
    loss: Tensor | None = None
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    parameters: list[nn.Parameter] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)


@dataclass(slots=True)
class Progress:
    """How far the run is: finished optimizer steps, epoch, place in that epoch.

    A place is a count of samples in the epoch's order, over all processes: it does not depend on
    how samples are cut into batches.
    """

    step: int = 0
    epoch: int = 0
    place: int = 0
    skipped: int = 0  # windows dropped for a non-finite gradient
    rollbacks: int = 0
    seconds: float = 0.0  # of training, validation and saving, over all sessions of the run


@dataclass(frozen=True, slots=True)
class ScheduleFactors:
    """Rate, momentum and weight decay as factors of the configured ones, for all groups or each."""

    learning_rate: float | tuple[float, ...] = 1.0
    momentum: float | tuple[float, ...] | None = None
    weight_decay: float | tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class LogRecord:
    """The metrics of a log interval; None is "not measured"."""

    step: int
    epoch: int
    time: float  # seconds since the epoch (1970)
    metrics: Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that a reader of the run should know; `run.emit_event` makes it."""

    step: int  # finished optimizer steps
    name: str  # one word for programs, such as `capability_acquired`
    message: str  # one sentence for people
    facts: Mapping[str, float | int | str | bool | None]


@dataclass(frozen=True, slots=True)
class Request:
    """A wish of a plugin, served after all listeners."""

    what: RequestName
    reason: str = ""
    tag: str = ""
