"""What changes during a run: `Run` and `Step`; all else that plugins see is frozen."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from forge_kernel.contract.metrics import MetricStore
from forge_kernel.contract.values import Event, Progress, Request, RequestName
from forge_kernel.secrecy import without_secrets

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.optim import Optimizer

    from forge_kernel.contract.data import Data
    from forge_kernel.contract.run_config import RunConfig
    from forge_kernel.contract.strategy import Strategy


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
    metrics: MetricStore
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
        self.metrics = MetricStore()
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

    def emit_event(self, name: str, message: str, **facts: float | int | str | bool | None) -> None:
        """Make something known (log, metrics file, screen); listeners hear it after the hook.

        Args:
            name: one word for programs.
            message: one sentence for people.
            facts: plain values, read already: a tensor has no place here.
        """
        shown = {
            key: without_secrets(value) if isinstance(value, str) else value
            for key, value in facts.items()
        }
        known = MappingProxyType(shown)  # what one listener wrote, the next would believe
        self.events.append(Event(self.progress.step, name, without_secrets(message), known))

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """All parameters by name, those of companion modules after the model's."""
        return self.parameters.items()
