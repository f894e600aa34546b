"""The drive of a run: steps until its end, and between them what is due."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Protocol

from forge_kernel.contract.cancel import cancel_reason
from forge_kernel.contract.run import Run
from forge_kernel.contract.values import Batch, LogRecord, Request
from forge_kernel.errors import RunError
from forge_kernel.training.session_state import SessionState


class Actions(Protocol):
    """What may be due between two steps."""

    def validate(self) -> dict[str, float]:
        """A pass over the validation data."""

    def log(self) -> LogRecord:
        """Read the metrics and tell everyone."""

    def save(self, tags: tuple[str, ...] = ()) -> Path | None:
        """Commit a checkpoint."""

    def restore_weights(self, tag: str) -> None:
        """Put pinned weights into the model."""


class Driver:
    """Takes a session's steps, epoch by epoch.

    Args:
        session: set up.
        actions: what it can do.
    """

    def __init__(self, session: SessionState, actions: Actions) -> None:
        self.session, self.actions = session, actions
        self.run: Run = session.run
        self._several = session.run.strategy.world_size > 1
        self._next_due = 0
        self._deadline: float | None = None  # the next moment at which something is due
        self._save_at: float | None = None

    def train(self) -> None:
        """Step until the end, a request to stop, or a cancel."""
        validation = self.session.validation
        if not self._several:  # ranks decide together, at a step's edge
            validation.cancelled = self.session.cancel.is_set
        try:
            if validation.cut:  # when the checkpoint was written
                self.actions.validate()
                _ = self.run_due_actions()
            while not self.should_stop():
                self._train_epoch()
        finally:
            validation.cancelled = None

    def _train_epoch(self) -> None:
        """The rest of an epoch, from the place that `progress` tells."""
        progress, size = self.run.progress, self.run.settings.accumulate
        window: list[Batch] = []
        samples = 0
        stepped, drawn, start = progress.step, False, progress.place
        requests, cancelled, clock = self.run.requests, self.session.cancel.is_set, time.monotonic
        # between steps other threads' runs take their turn
        step = self.session.streams.holding(self.session.optimizer_step.take)
        # the place moves on when the window is through: who saves after an error goes on with it
        for batch in self.run.data.batches(progress.epoch, start):
            window.append(batch)
            if len(window) < size:
                continue
            try:
                step(window)
            except BaseException:
                self._place_of_counted_step(start + samples, window)
                raise
            for each in window:
                samples += each.samples
            progress.place = start + samples
            drawn = True
            window.clear()
            if (
                progress.step >= self._next_due
                or requests
                or cancelled()
                or (self._deadline is not None and clock() >= self._deadline)
            ) and not self.run_due_actions():
                return
        if window:
            try:
                step(window)
            except BaseException:
                self._place_of_counted_step(start + samples, window)
                raise
            progress.place = start + samples + sum(each.samples for each in window)
            drawn = True
        if not drawn and not start:
            raise RunError("the training data gave no batch: nothing can be trained")
        if self.session.optimizer_step.empty and drawn and not start and progress.step == stepped:
            raise RunError(self.session.optimizer_step.nothing_counts("in a whole epoch"))
        if not self.run_due_actions():
            return
        progress.epoch, progress.place = progress.epoch + 1, 0
        for listen in self.session.bus.calls("on_epoch_end"):
            listen(self.run)

    def _place_of_counted_step(self, place: int, window: list[Batch]) -> None:
        """Move the place on where somebody raised after the step was whole and counted."""
        progress = self.run.progress
        if progress.step == self.session.step_state.number:
            progress.place = place + sum(each.samples for each in window)

    def should_stop(self) -> bool:
        """Whether the run is at its end; says why in the session's `stop_reason`."""
        settings, progress, session = self.run.settings, self.run.progress, self.session
        if session.stop_reason:
            return True
        if settings.max_steps is not None and progress.step >= settings.max_steps:
            session.stop_reason = f"max_steps ({settings.max_steps})"
        elif settings.max_epochs is not None and progress.epoch >= settings.max_epochs:
            session.stop_reason = f"max_epochs ({settings.max_epochs})"
        elif settings.max_seconds is not None and session.clock.seconds() >= settings.max_seconds:
            session.stop_reason = f"max_seconds ({settings.max_seconds:g})"
        elif self.run.strategy.decide(int(session.cancel.is_set())):
            session.stop_reason = cancel_reason(session.cancel)
            session.cancelled = True
        return bool(session.stop_reason)

    def schedule(self) -> None:
        """The next step after which something is due by interval."""
        settings, step = self.run.settings, self.run.progress.step
        every = [settings.log_every, settings.validate_every, settings.save_every]
        due = [(step // interval + 1) * interval for interval in every if interval]
        if settings.max_steps is not None:
            due.append(settings.max_steps)
        self._next_due = step if self._several else min(due)  # ranks decide together, each step
        now = time.monotonic()
        moments = []
        if settings.max_seconds is not None:
            moments.append(now + settings.max_seconds - self.session.clock.seconds())
        if settings.save_minutes is not None and self.session.owned_store is not None:
            if self._save_at is None:
                self._save_at = now + 60 * settings.save_minutes
            moments.append(self._save_at)
        self._deadline = min(moments, default=None)

    def run_due_actions(self) -> bool:
        """Do what is due after a step: validate, log, save, serve requests, in this order.

        Returns:
            Whether training goes on.
        """
        settings, step = self.run.settings, self.run.progress.step
        every = settings.validate_every
        if every and step % every == 0 and step != self.session.validation.at:
            self.actions.validate()
        if step and step % settings.log_every == 0 and step != self.session.logged_at:
            self.actions.log()
        saves, tags = self.serve_requests()
        due = settings.save_every is not None and step % settings.save_every == 0
        late = self._save_at is not None and time.monotonic() >= self._save_at
        if self._several:
            late = bool(self.run.strategy.decide(int(late)))
        if saves or ((due or late) and step and step != self.session.saved_at):
            self.actions.save(tags)
        if late or step == self.session.saved_at:
            self._save_at = None  # counted anew
        self.schedule()
        return not self.should_stop()

    def serve_requests(self) -> tuple[bool, tuple[str, ...]]:
        """Serve what plugins asked for; saving is left to the caller, who does it last."""
        run = self.run
        tags: dict[str, None] = {}
        saves = False
        restores: list[Request] = []
        for _ in range(3):  # a validation may lead to further requests, but not for ever
            requests, run.requests[:] = list(run.requests), []
            for request in requests:
                if request.what == "validate" and run.progress.step != self.session.validation.at:
                    self.actions.validate()
                elif request.what == "save":
                    saves = True
                    tags.update({request.tag: None} if request.tag else {})
                elif request.what == "restore":
                    restores.append(request)
                elif request.what == "stop" and not self.session.stop_reason:
                    self.session.stop_reason = request.reason or "a plugin asked for it"
            if not run.requests:
                break
        if restores and saves:
            self.actions.save(tuple(tags))  # what is to be kept is kept before weights are replaced
            saves, tags = False, {}
        for request in restores:
            self.actions.restore_weights(request.tag)
        return saves, tuple(tags)
