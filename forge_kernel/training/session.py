"""A run in this process: set up, stepped, validated, saved, finished.

    opened -> start -> train (steps, and what is due between them) -> finish -> close
      |         |         |                                               |
      |    check, seal   take_up / restore_weights / roll back        save, log, validate, export
    set_up, and for a run that goes on: restore

`OptimizerStep` steps, `Validation` validates, `Driver` says what is next, `snapshot` collects what
a checkpoint holds; `Session` is what a program sees of them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from forge_kernel.config.pipeline import PipelineConfig
from forge_kernel.contract.run_config import RunConfig
from forge_kernel.contract.values import Batch, LogRecord
from forge_kernel.errors import RunError
from forge_kernel.planning.catalog import Catalog
from forge_kernel.planning.plan import plan
from forge_kernel.storage.checkpoint_store import Snapshot
from forge_kernel.training.driver import Driver
from forge_kernel.training.events import pass_events
from forge_kernel.training.exports import write_exports
from forge_kernel.training.guards.disk_room import saved_as_room_allows
from forge_kernel.training.guards.finite_check import non_finite_names
from forge_kernel.training.guards.ownership import still_training, training_modules
from forge_kernel.training.session_state import SessionState
from forge_kernel.training.set_up import build, check_before_start, emit_notices
from forge_kernel.training.snapshot import (
    differences,
    load_pinned_weights,
    load_snapshot,
    may_be_kept,
    need_finite_weights,
    take_snapshot,
)


class Session(SessionState):
    """One run in this process: `with Session(plan) as session: session.step(batch)`.

    The arguments are those of `SessionState`.
    """

    _driver: Driver

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

    def opened(self, *, resume: bool | Snapshot = False) -> Session:
        """Set up, and brought to where the run stands: the one way to a session that is not `with`.

        Args:
            resume: True: take up the newest intact checkpoint of the run folder (`problems` tells
                what is to be known of it); a snapshot: take up that.

        Raises:
            RunError, PluginError: a device or a part is missing or wrong.
            CheckpointError: there is no intact checkpoint.
        """
        try:
            self.set_up()
            if isinstance(resume, Snapshot):
                self.take_up(resume)
            elif resume:
                self.problems = self.restore()
        except BaseException:
            self.close()
            raise
        return self

    def set_up(self) -> Session:
        """Build everything that the plan names, in life-cycle order; nothing is trained.

        Raises:
            RunError, PluginError: a device or a part is missing or wrong.
        """
        with self.streams:
            build(self)
        self._driver = Driver(self, self)
        return self

    def start(self) -> None:
        """Seal the run and tell everyone; also after a restore."""
        self.need_set_up()
        check_before_start(self)
        self.run.seal()
        self.never_finite = frozenset(non_finite_names(self.run.strategy.model_state(self.run)))
        self.trains = training_modules(self.run)
        self.clock.start()
        self._driver.schedule()
        self.optimizer_step.open()
        for listen in self.bus.calls("on_run_start"):
            listen(self.run)
        emit_notices(self)
        pass_events(self.run, self.bus)
        rolls_back = self.settings.non_finite == "rollback"
        if rolls_back and self.store is not None and not self.store.steps():
            self.save()

    def __enter__(self) -> Session:
        self.opened().start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the other processes; may be called again."""
        if not self.closed:
            self.closed = True
            self.run.strategy.finish()

    # -- steps --------------------------------------------------------------------------------

    def outputs(self, batch: Batch) -> Any:
        """What the model gives for a batch."""
        return self.forward.outputs(batch)

    def accumulate(self, batch: Batch, *, last: bool = True) -> Tensor:
        """One micro-step: forward and backward.

        Args:
            batch: the micro-batch.
            last: whether it ends the window; spread over processes, gradients are then brought
                into step.

        Returns:
            The micro-batch's mean loss (0-d, detached, on the device).
        """
        self.need_set_up()
        with self.streams:
            return self.optimizer_step.accumulate(batch, last=last)

    def update(self) -> bool:
        """End the window: gradients to weights.

        Returns:
            Whether the weights were changed; False for a window that was dropped.

        Raises:
            NonFiniteError: a gradient was not finite and the policy is to stop.
            RunError: there is no open window.
        """
        self.need_set_up()
        if self.optimizer_step.window.count == 0:
            raise RunError("update() without a micro-batch: call accumulate(batch) first")
        with self.streams:
            return self.optimizer_step.update()

    def step(self, *batches: Batch) -> Tensor:
        """One optimizer step over a window of micro-batches.

        Returns:
            The window's mean loss (0-d, detached, on the device).
        """
        self.need_set_up()
        if not batches:
            raise RunError("step() without a batch: hand in the micro-batches of the step")
        with self.streams:
            self.optimizer_step.take(batches)
        assert self.step_state.loss is not None
        return self.step_state.loss

    def train(self) -> None:
        """Step until the end, a request to stop, or a cancel."""
        self._driver.train()

    def run_due_actions(self) -> bool:
        """Do what is due after a step: validate, log, save, serve requests, in this order.

        Returns:
            Whether training goes on.
        """
        return self._driver.run_due_actions()

    # -- what is due --------------------------------------------------------------------------

    def validate(self) -> dict[str, float]:
        """One pass over the validation data; model modes are left as they were.

        Returns:
            The metrics over the whole set; empty when there is no validation data.
        """
        self.need_set_up()
        return self.validation.pass_over()

    def log(self) -> LogRecord:
        """Read the metrics and tell everyone; the only place where metrics reach the host."""
        run, step = self.run, self.step_state
        run.metrics.put("loss", step.loss)
        run.metrics.put("learning_rate", float(run.optimizer.param_groups[0]["lr"]))
        if run.progress.skipped:
            run.metrics.put("skipped_steps", run.progress.skipped)
        if self.forward.autocast is torch.float16:
            run.metrics.put("loss_scale", self.loss_scale.value)
        for answer in self.bus.calls("log_metrics"):
            for name, value in answer(run, step).items():
                run.metrics.put(name, value)
        self.trains = still_training(run, self.trains)
        progress = run.progress
        metrics = MappingProxyType(run.metrics.read())  # listeners are told the same
        record = LogRecord(progress.step, progress.epoch, time.time(), metrics)
        self.logged_at = progress.step
        for listen in self.bus.calls("on_log"):
            listen(run, record)
        return record

    def seconds(self) -> float:
        """Seconds of training so far, over all sessions of the run."""
        return self.clock.seconds()

    # -- saving and restoring -----------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Everything that the run needs to go on."""
        return take_snapshot(self)

    def take_up(self, snapshot: Snapshot, *, random: bool = True) -> None:
        """Bring the run to the state of a snapshot.

        Args:
            snapshot: what `snapshot` gave.
            random: also the random streams and the place in the data.

        Raises:
            RunError: it is of another model or of other plugins.
        """
        load_snapshot(self, snapshot, random=random)

    def save(self, tags: tuple[str, ...] = (), *, last: bool = False) -> Path | None:
        """Commit a checkpoint; None for a run without a folder, or one that is only read.

        Args:
            tags: names to pin it under.
            last: the run ends with it, so that it is not left out when the disk is full.

        Raises:
            NonFiniteError: weights or memories are not finite: nothing is written. Under the policy
                `rollback` the run goes back instead, under `off` it goes on.
            CheckpointError: it could not be written; on a full disk as `run.on_disk_full` says.
        """
        if self.owned_store is None:
            return None
        snapshot = self.snapshot()
        if not may_be_kept(self, snapshot):
            return None
        commit = partial(self.owned_store.save, snapshot, tags)
        folder = saved_as_room_allows(self, commit, last=last)
        if folder is None:
            return None
        self.saved_at = self.run.progress.step
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
        self.saved_at = snapshot.step
        return [*problems, *differences(self, snapshot)]

    def restore_weights(self, tag: str) -> None:
        """Put the weights of a pinned checkpoint into the model; see `load_pinned_weights`.

        Raises:
            RunError: nothing is pinned under the tag.
        """
        load_pinned_weights(self, tag)

    # -- the end ------------------------------------------------------------------------------

    def finish(self) -> dict[str, str]:
        """Keep, log, validate and export the result, once for each.

        The checkpoint comes first, so that a resumed run does not see what only an ended one does.
        A cancelled run is kept and not exported.

        Returns:
            Folders written by exporters, by name.
        """
        step = self.run.progress.step
        if step != self.saved_at:
            self.save(last=True)
        if self.settings.non_finite != "off":
            need_finite_weights(self, step)
        if self.cancelled:
            return {}
        if step and step != self.logged_at:
            self.log()
        if step != self.validation.at:
            self.validate()
            saves, tags = self._driver.serve_requests()
            if saves:
                self.save(tags, last=True)
            if self.validation.at < 0:  # weights were restored meanwhile
                self.validate()
        self.clock.accumulate_elapsed()
        reasons = self.validation.unfinished()
        if reasons:
            self.run.emit_event(
                "unfinished",
                f"The run has ended before its network was finished ({'; '.join(reasons)}): its "
                "metrics are not those of what is exported.",
            )
            pass_events(self.run, self.bus)
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
        for notify in self.bus.calls("on_weights_changed"):
            notify(run)

    def evaluation_model(self) -> nn.Module:
        """The model that validation and export use."""
        return self.validation.evaluation_model()

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
            run.emit_event("export_failed", f"The export {name} failed: {error}", export=name)
        pass_events(run, self.bus)
        return written
