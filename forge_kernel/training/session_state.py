"""What a session holds: the run, its parts, and where it stands."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from torch import nn

from forge_kernel.contract.cancel import Cancel
from forge_kernel.contract.plugin import Kind
from forge_kernel.contract.run import Run
from forge_kernel.contract.run_config import RunConfig
from forge_kernel.contract.strategy import Strategy
from forge_kernel.contract.values import Step
from forge_kernel.errors import PluginError, RunError
from forge_kernel.planning.plan import Plan
from forge_kernel.storage.checkpoint_store import CheckpointReader, CheckpointStore
from forge_kernel.training.bus import Bus
from forge_kernel.training.clock import Clock
from forge_kernel.training.forward_pass import ForwardPass
from forge_kernel.training.guards.ownership import OwnershipGuard
from forge_kernel.training.loaders.random_streams import RunStreams
from forge_kernel.training.loss_scale import LossScale
from forge_kernel.training.one_process import OneProcess
from forge_kernel.training.optimizer_step import OptimizerStep
from forge_kernel.training.validation import Validation

_STRATEGY: Final = tuple(name for name in vars(OneProcess) if not name.startswith("_"))


class SessionState:
    """Base of `Session`: what its parts share.

    Args:
        plan: what runs, in which order.
        folder: the run folder; None: nothing is written (no checkpoints, no exports).
        strategy: how the run is spread; one process otherwise.
        cancel: asked at each step's edge whether to stop.
        about: facts kept in each checkpoint.
        config: the filled configuration as YAML, kept in each checkpoint with its digest.
        quiet: observers that write to the screen keep silent.
        reads: the folder is only read: the session cannot save.

    Attributes:
        loss_scale, forward, validation, optimizer_step: there once the session is set up.
        logged_at, saved_at: steps.
        problems: what is to be known of the checkpoint that the session was opened at.
    """

    loss_scale: LossScale
    forward: ForwardPass
    validation: Validation
    optimizer_step: OptimizerStep

    def __init__(
        self,
        plan: Plan,
        *,
        folder: Path | None = None,
        strategy: Strategy | None = None,
        cancel: Cancel | None = None,
        about: Mapping[str, Any] | None = None,
        config: str = "",
        quiet: bool = False,
        reads: bool = False,
    ) -> None:
        settings = plan.pipeline.run
        if settings.non_finite == "rollback" and folder is None:
            raise RunError("run.non_finite 'rollback' needs a run folder to roll back from")
        self.plan = plan
        self.settings: RunConfig = settings
        self.cancel: Cancel = cancel or threading.Event()
        self.about = dict(about or {})
        self.config = config
        guard = OwnershipGuard() if settings.checked else None
        self.bus = Bus(plan, guard, self._observer_failed)
        self.run = Run(settings, folder, strategy or self._planned_strategy(), quiet=quiet)
        if guard is not None:
            guard.run = self.run
        self.store: CheckpointReader | None = None
        if folder is not None and reads:
            self.store = CheckpointReader(folder / "checkpoints")
        elif folder is not None:
            self.store = CheckpointStore(folder / "checkpoints", settings.keep_checkpoints)
        self.stop_reason = ""
        self.cancelled = self.closed = self.is_checked = False
        self.problems: list[str] = []
        self.rolled_back_to: int | None = None  # step
        self.trains: frozenset[str] = frozenset()  # modules in training mode when it began
        self.never_finite: frozenset[str] = frozenset()  # tensors of the model, from the start on
        self.logged_at = self.saved_at = -1  # steps
        self.clock = Clock(self.run.progress)
        self.training_model: nn.Module | None = None  # see `Session.hand_over`
        self.failed_exports: dict[str, BaseException] = {}  # what each one failed of
        self.step_state = Step()
        self.streams = RunStreams(takes_turns=self.run.strategy.world_size == 1)

    def _planned_strategy(self) -> Strategy:
        """The plan's strategy plugin, or one process."""
        for entry in self.plan.entries:
            if entry.info.kind is Kind.STRATEGY:
                result = self.bus.instances[entry.path]
                missing = [name for name in _STRATEGY if not hasattr(result, name)]
                if missing:
                    raise PluginError(f"{entry.label} is no strategy: it lacks {missing}")
                return result  # type: ignore[no-any-return]
        return OneProcess()

    def _observer_failed(self, label: str, hook: str, error: BaseException) -> None:
        """Tell once what an observer failed of; the run goes on."""
        why = f"{type(error).__name__}: {error}"
        self.run.emit_event(
            "observer_failed", f"{label} failed in {hook}: {why}. The run goes on.", hook=hook
        )

    @property
    def owned_store(self) -> CheckpointStore | None:
        """The checkpoints, where this session may write them."""
        return self.store if isinstance(self.store, CheckpointStore) else None

    @property
    def is_set_up(self) -> bool:
        """Whether the parts are there."""
        return "optimizer_step" in self.__dict__  # the last to be built

    def need_set_up(self) -> None:
        """Refuse what needs the parts before they are there.

        Raises:
            RunError: the session is not set up.
        """
        if not self.is_set_up:
            raise RunError("the session is not set up: call opened() and start(), or use `with`")
