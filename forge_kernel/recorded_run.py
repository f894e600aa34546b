"""A session driven from its start to its end, while its folder tells of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forge_kernel.contract.result import RunResult
from forge_kernel.errors import INTERRUPTS, Ended, RunError
from forge_kernel.run_folder.folder import ENVIRONMENT
from forge_kernel.run_folder.record import RunRecord, environment
from forge_kernel.secrecy import without_secrets

if TYPE_CHECKING:
    from forge_kernel.training.session import Session


def recorded(session: Session, record: RunRecord) -> RunResult:
    """Drive a session while its folder is written; one that is not opened yet begins anew."""
    assert session.run.folder is not None
    record.open(session.run.folder)
    try:
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
        record.state("initializing")
        for notice in session.settings.notices():
            record.event("notice", level="warning", notice=notice)
        if not session.is_set_up:
            session.opened()
        for problem in session.problems:
            record.event("checkpoint", level="warning", problem=problem)
        write_json(folder / ENVIRONMENT, environment(session.plan, session.run))
        session.start()
        session.train()
        exports = session.finish()
        session.hand_over()
        result = result_of(session, exports, None)
        record.end(session.run, result)
        for listen in session.bus.calls("on_run_end"):
            listen(session.run, result)
        pass_events(session.run, session.bus)
        return result
    except BaseException as error:
        raised = _as_error(session, error)
        _save_what_there_is(session, record, raised)
        _tell_failure(session, record, raised)
        if raised is error:
            raise
        raise raised from error
    finally:
        session.close()


def _as_error(session: Session, error: BaseException) -> BaseException:
    """What to raise: a plugin that ends the program (`sys.exit`) has failed like any other."""
    if isinstance(error, Exception | KeyboardInterrupt | Ended):
        return error
    words = session.bus.blame_in_words(error.__traceback__)
    if words is None:
        return error
    what = f"{type(error).__name__}({error})"
    return RunError(f"{words} raised {what}: a plugin reports a failure by an Exception")


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
        folder = session.save()
    except Exception as second:  # noqa: BLE001  the first error is the one to show
        record.event("emergency_save_failed", level="error", problem=repr(second))
        return
    if folder is not None:
        error.add_note(f"the weights of step {run.progress.step} are saved: forge resume")


def _tell_failure(session: Session, record: RunRecord, error: BaseException) -> None:
    """Name the plugin that raised, tell the listeners, write the result."""
    blamed = session.bus.blame(error.__traceback__)
    step = session.run.progress.step + 1
    words = session.bus.blame_in_words(error.__traceback__)
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
