"""A session driven from its start to its end, while its folder tells of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from forge_kernel.contract.result import RunResult
from forge_kernel.errors import INTERRUPTS, Ended, HangError, OutOfMemoryError, RunError
from forge_kernel.run_folder.folder import ENVIRONMENT
from forge_kernel.run_folder.record import RunRecord, environment
from forge_kernel.secrecy import without_secrets

if TYPE_CHECKING:
    from types import TracebackType

    from forge_kernel.training.session import Session


def recorded(
    session: Session, record: RunRecord, prepare: Callable[[Session], None] | None = None
) -> RunResult:
    """Drive a session while its folder is written; one that is not opened yet begins anew.

    Args:
        session: to drive.
        record: writes the folder.
        prepare: opens and looks at the session first; what it raises is not told in the folder.
    """
    assert session.run.folder is not None
    record.open(session.run.folder)
    try:
        record.state("initializing")
        if prepare is not None:
            prepare(session)
        return _drive(session, record)
    finally:
        record.close()


def _drive(session: Session, record: RunRecord) -> RunResult:
    """Take a session through its life; an error is told to everyone, then raised again."""
    from forge_kernel.storage.atomic_files import write_json
    from forge_kernel.training.events import pass_events

    folder = session.run.folder
    assert folder is not None
    try:
        for notice in session.settings.notices():
            record.event("notice", level="warning", notice=notice)
        if not session.is_set_up:
            session.opened()
        for problem in session.problems:
            record.event("checkpoint", level="warning", problem=problem)
        write_json(folder / ENVIRONMENT, environment(session.plan, session.run))
        session.start()
        with _watched(session, record):
            session.train()
        exports = session.finish()
        session.hand_over()
        result = result_of(session, exports, None)
        record.end(session.run, result)
        for listen in session.bus.calls("on_run_end"):
            listen(session.run, result)
        pass_events(session.run, session.bus)
        return result
    except BaseException as raised:
        error = _as_error(session, raised)
        _save_what_there_is(session, record, error)
        _tell_failure(session, record, error, _arose(raised))
        if error is raised:
            raise
        raise error from raised
    finally:
        session.close()


def _watched(session: Session, record: RunRecord) -> AbstractContextManager[None]:
    """Training under the watch that `run.hang_minutes` asks for."""
    from forge_kernel.training.guards.hang_watch import watched

    def inform(message: str) -> None:
        record.event("hang", level="error", message=message)

    def end(message: str) -> None:
        record.end(session.run, result_of(session, {}, HangError(message)))
        os.write(2, f"forge: {message}; the process is ended\n".encode())
        os._exit(HangError.exit_status)

    # a program that embeds the run is not ended
    ends = end if getattr(session.cancel, "owns_process", False) else None
    return watched(session, session.run.folder, inform, ends)


def _as_error(session: Session, error: BaseException) -> BaseException:
    """What to raise: a plugin that ends the program (`sys.exit`) has failed like any other."""
    from forge_kernel.training.guards.out_of_memory import reported

    if isinstance(error, Exception | KeyboardInterrupt | Ended):
        return reported(session.run, error, ())
    words = session.bus.blame_in_words(error.__traceback__)
    if words is None:
        return error
    what = f"{type(error).__name__}({error})"
    return RunError(f"{words} raised {what}: a plugin reports a failure by an Exception")


def _arose(error: BaseException) -> TracebackType | None:
    """The traceback down to where it began: that of memory is reported from the step."""
    first = error.__cause__ if isinstance(error, OutOfMemoryError) else None
    return (first or error).__traceback__


def _save_what_there_is(session: Session, record: RunRecord, error: BaseException) -> None:
    """Keep the last whole step of a run that fails, so that a resume loses nothing.

    Not of one that was ended at once by hand, nor where an update was cut: its weights are of no
    step.
    """
    run = session.run
    if not isinstance(error, Exception) or not session.is_set_up or run.strategy.world_size > 1:
        return
    step = run.progress.step
    if step in (0, session.saved_at) or session.optimizer_step.updating:
        return
    try:
        folder = session.save(last=True)
    except Exception as second:  # noqa: BLE001  the first error is the one to show
        record.event("emergency_save_failed", level="error", problem=repr(second))
        return
    if folder is not None:
        error.add_note(f"the weights of step {run.progress.step} are saved: forge resume")


def _tell_failure(
    session: Session, record: RunRecord, error: BaseException, trace: TracebackType | None
) -> None:
    """Name the plugin that raised, tell the listeners, write the result."""
    blamed = session.bus.blame(trace)
    step = session.run.progress.step + 1
    words = session.bus.blame_in_words(trace)
    if words is not None:
        error.add_note(f"raised by {words}, step {step}")
    record.event(
        "failed", level="error", error=repr(error), plugin=blamed, step=step, exc_info=error
    )
    record.end(session.run, result_of(session, {}, error))
    for listen in session.bus.calls("on_error"):
        try:
            listen(session.run, error)
        except INTERRUPTS:
            raise
        except BaseException as second:  # noqa: BLE001  the first error is the one to show
            record.event("on_error_failed", level="error", problem=repr(second))


def result_of(
    session: Session, exports: dict[str, str], error: BaseException | None = None
) -> RunResult:
    """What a session has come to, for a program that drives one.

    Args:
        session: finished, stopped or failed.
        exports: what `finish` gave.
        error: what it failed of.
    """
    run, metrics = session.run, session.run.metrics
    outcome = "failed" if error else "stopped" if session.cancelled else "completed"
    final: dict[str, float | None] = dict(metrics.latest)
    final.update({f"validation_{name}": value for name, value in metrics.validation.items()})
    message = without_secrets(f"{type(error).__name__}: {error}") if error else None
    return RunResult(
        outcome=outcome,  # type: ignore[arg-type]
        steps=run.progress.step,
        epochs=run.progress.epoch,
        seconds=round(session.seconds(), 3),
        stop_reason=session.stop_reason if error is None else "error",
        final=final,
        best=dict(metrics.best),
        exports=exports,
        failed_exports={
            name: without_secrets(f"{type(failed).__name__}: {failed}")
            for name, failed in session.failed_exports.items()
        },
        error=message,
        folder=run.folder,
        model=getattr(run, "model", None),
        training_model=session.training_model,
    )
