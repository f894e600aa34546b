"""What changes during a run: `Run` and `Step`; all else that plugins see is frozen."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from forge_kernel.contract.counting import IGNORE_INDEX, Counted, count

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from forge_kernel.config.pipeline import RunConfig
    from forge_kernel.contract.data import Data
    from forge_kernel.contract.strategy import Strategy

Goal = Literal["max", "min"]
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
    _count: tuple[Any, ...] | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def counted(self) -> Counted:
        """How much each target counts: what every loss and validator weighs by.

        Raises:
            RunError: the weights do not fit the targets.
        """
        known, targets = self._count, self.targets
        if (
            known is None
            or known[0] is not targets
            or known[1] is not self.weights
            or known[2:4] != (self.ignore_index, getattr(targets, "_version", 0))
        ):
            found = count(targets, self.weights, self.inputs, self.ignore_index)
            self._count = (*self._count_key(), found)
            return found
        answer: Counted = known[4]
        return answer

    def _count_key(self) -> tuple[Any, Any, int, int]:
        """What a count is of: it is taken anew when any of it is replaced or written to."""
        version = getattr(self.targets, "_version", 0)
        return self.targets, self.weights, self.ignore_index, version

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
        self._count = (*self._count_key(), counted)

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
    """How far the run is: finished optimizer steps, epoch, batches consumed in that epoch."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    skipped: int = 0  # windows dropped for a non-finite gradient
    rollbacks: int = 0
    seconds: float = 0.0  # of training, validation and saving, over all sessions of the run


@dataclass(frozen=True, slots=True)
class Rates:
    """Learning rate and momentum as factors of the configured ones, for all groups or for each."""

    learning_rate: float | tuple[float, ...] = 1.0
    momentum: float | tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class LogRecord:
    """The figures of a log interval; None is "not measured"."""

    step: int
    epoch: int
    time: float  # seconds since the epoch (1970)
    figures: Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that a reader of the run should know; `run.tell` makes it."""

    step: int  # finished optimizer steps
    name: str  # one word for programs, such as `capability_acquired`
    message: str  # one sentence for people
    facts: Mapping[str, float | int | str | bool | None]


class Meter(Protocol):
    """Figures over a whole validation set."""

    goals: Mapping[str, Goal]

    def reset(self) -> None:
        """Begin a pass."""
        ...

    def update(self, batch: Batch, outputs: Any, loss: Tensor, weight: float | Tensor) -> None:
        """Take in one batch, without reading a value back to the host."""
        ...

    def compute(self, add: Callable[[Tensor], Tensor]) -> Mapping[str, float]:
        """The figures; `add` sums a tensor over all processes."""
        ...


class Metrics:
    """Figures of the run: put as tensors at any time, read only when a log line is due."""

    def __init__(self) -> None:
        self._pending: dict[str, float | Tensor | None] = {}
        self.latest: dict[str, float | None] = {}
        self.validation: dict[str, float | None] = {}
        self.best: dict[str, float] = {}
        self.goals: dict[str, Goal] = {}

    def put(self, name: str, value: float | Tensor | None) -> None:
        """Set a figure; a tensor (0-d) is read later."""
        self._pending[name] = value

    def read(self) -> dict[str, float | None]:
        """Bring what was put since the last reading to the host; not finite becomes None.

        One transfer per device. What was not put anew is not in the answer, since it is of an
        earlier step; `latest` keeps it.
        """
        import torch

        found: dict[str, float | None] = {}
        tensors = {
            name: value for name, value in self._pending.items() if isinstance(value, torch.Tensor)
        }
        devices = {value.device for value in tensors.values()}
        for device in devices:
            names = [name for name, value in tensors.items() if value.device == device]
            stacked = torch.stack([tensors[name].detach().double().reshape(()) for name in names])
            self._pending.update(zip(names, stacked.tolist(), strict=True))
        for name, value in self._pending.items():
            number = None if value is None else float(value)
            found[name] = number if number is not None and math.isfinite(number) else None
        self._pending.clear()
        self.latest.update(found)
        return found

    def record_validation(self, figures: Mapping[str, float], *, best: bool = True) -> None:
        """Take in a validation's figures and keep the best of each.

        Args:
            figures: by name.
            best: False for a network that is not what will be exported.
        """
        self.validation = {
            name: value if math.isfinite(value) else None for name, value in figures.items()
        }
        for name, value in figures.items() if best else ():
            known = self.best.get(name)
            higher = self.goals.get(name, "min") == "max"
            if math.isfinite(value) and (
                known is None or (value > known if higher else value < known)
            ):
                self.best[name] = value

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        return {
            "latest": dict(self.latest),
            "validation": dict(self.validation),
            "best": dict(self.best),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state."""
        self._pending.clear()
        self.latest = dict(state["latest"])
        self.validation = dict(state["validation"])
        self.best = dict(state["best"])


@dataclass(frozen=True, slots=True)
class Request:
    """A wish of a plugin, served after all listeners."""

    what: RequestName
    reason: str = ""
    tag: str = ""


class Run:
    """What plugins see of a run; sealed after set-up (fields may then not be assigned)."""

    settings: RunConfig
    folder: Path | None  # None: nothing is written
    device: torch.device
    strategy: Strategy
    data: Data
    model: nn.Module  # the model in training
    active_model: nn.Module  # the model in use: during validation the evaluation model
    modules: dict[str, nn.Module]  # the model's companions by name
    parameters: dict[str, nn.Parameter]  # all of them by name, frozen ones too
    optimizer: Optimizer
    progress: Progress
    metrics: Metrics
    total_steps: int | None  # length of the whole run in optimizer steps, if known
    total_steps_before: int | None  # of a resumed run: its length when the checkpoint was saved
    seed: int  # start of what plugins draw; drawn itself when `settings.seed` is None
    quiet: bool  # observers that write to the screen keep silent

    _sealed = False

    def __init__(
        self,
        settings: RunConfig,
        folder: Path | None,
        strategy: Strategy,
        *,
        quiet: bool = False,
    ) -> None:
        self.settings = settings
        self.folder = folder
        self.strategy = strategy
        self.modules = {}
        self.parameters = {}
        self.progress = Progress()
        self.metrics = Metrics()
        self.total_steps = self.total_steps_before = None
        self.seed = secrets.randbits(32) if settings.seed is None else settings.seed
        self.quiet = quiet
        self.requests: list[Request] = []
        self.events: list[Event] = []

    def __setattr__(self, name: str, value: Any) -> None:
        if self._sealed and name != "active_model":
            raise AttributeError(f"run.{name} cannot be assigned: the run is sealed after set-up")
        object.__setattr__(self, name, value)

    def seal(self) -> None:
        """Refuse assignments from now on."""
        object.__setattr__(self, "_sealed", True)

    def request(self, what: RequestName, *, reason: str = "", tag: str = "") -> None:
        """Ask the loop for something; it is done after all listeners have been told.

        Args:
            what: `stop` the run, `save` a checkpoint, `restore` the weights of a checkpoint,
                `validate` now.
            reason: why, in a few words (`stop`).
            tag: for `save`, pins the checkpoint under this name so that rotation keeps it; for
                `restore`, names the pinned checkpoint.
        """
        if what not in ("stop", "save", "restore", "validate"):
            raise ValueError(f"run.request('{what}'): stop, save, restore or validate")
        self.requests.append(Request(what, reason, tag))

    def tell(self, name: str, message: str, **facts: float | int | str | bool | None) -> None:
        """Make something known (log, metrics file, screen); listeners hear it after the hook.

        Args:
            name: one word for programs.
            message: one sentence for people.
            facts: plain values, read already: a tensor has no place here.
        """
        self.events.append(Event(self.progress.step, name, message, facts))

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """All parameters by name, those of companion modules after the model's."""
        return self.parameters.items()
