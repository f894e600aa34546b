"""Room on the disk: looked for before the first step, and what a save does that finds none."""

from __future__ import annotations

import errno
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch

from forge_kernel.errors import CheckpointError, RunError
from forge_kernel.storage.checkpoint_store import CheckpointStore, Snapshot
from forge_kernel.training.events import pass_events
from forge_kernel.training.session_state import SessionState

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
# Rust's writers (safetensors) tell the number in a text alone
_TEXTS: Final = tuple(f"os error {number}" for number in _FULL)
_POLL_SECONDS: Final = 2.0
_CAUSES: Final = 20


def is_full(error: BaseException) -> bool:
    """Whether an error, or what it came from, says that a disk or a quota is full."""
    return any(
        (isinstance(cause, OSError) and cause.errno in _FULL)
        or any(text in str(cause) for text in _TEXTS)
        for cause in _causes(error)
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    for _ in range(_CAUSES):
        if cause is None:
            return
        yield cause
        cause = cause.__cause__


def try_checkpoint(session: SessionState) -> None:
    """Before the first step: reserve the bytes of one checkpoint, and commit a small one.

    Raises:
        RunError: checkpoints cannot be kept there; nothing was trained.
    """
    store = session.owned_store
    if store is None:
        return
    size = checkpoint_bytes(session)
    try:
        with _hidden_folder(store.folder) as place:
            reserve(place / "room", size)
            trial = CheckpointStore(place)
            step = session.run.progress.step
            _ = trial.load(trial.save(Snapshot(step, {"trial": torch.zeros(1)}, {}, {})))
    except (OSError, CheckpointError) as error:
        raise RunError(
            f"checkpoints cannot be kept in {store.folder}: {error}. One takes {in_words(size)} at "
            f"least, and {_free(store.folder)} are free there. Make room, or name another folder "
            "for the run: nothing was trained"
        ) from error


@contextmanager
def _hidden_folder(checkpoints: Path) -> Iterator[Path]:
    """A folder for the time of a trial; if the process is killed, cleared as an unfinished save."""
    place = checkpoints / f".step-0.partial-{uuid.uuid4().hex[:8]}"
    place.mkdir(parents=True)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def checkpoint_bytes(session: SessionState) -> int:
    """What a checkpoint takes at least: that of the newest one, else the model's tensors.

    What an optimizer will remember is not known before its first step.
    """
    store, run = session.store, session.run
    steps = store.steps() if store is not None else []
    if store is not None and steps:
        return sum(file.stat().st_size for file in store.path(steps[-1]).glob("*"))
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.numel() * tensor.element_size()
        for tensor in run.strategy.model_state(run).values()
    }
    return sum(storages.values())


def reserve(file: Path, size: int) -> None:
    """Take room for so many bytes; the file is left there.

    Raises:
        OSError: there is no such room.
    """
    with file.open("wb") as stream:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(stream.fileno(), 0, max(1, size))
            return
    if shutil.disk_usage(file.parent).free < size:  # macOS, Windows: no quota is seen
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))


def in_words(size: int) -> str:
    """A number of bytes as people say it."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"


def _free(folder: Path) -> str:
    for place in (folder, *folder.parents):
        if place.is_dir():
            return in_words(shutil.disk_usage(place).free)
    return "unknown bytes"


def saved_as_room_allows(
    session: SessionState, save: Callable[[], Path], *, last: bool
) -> Path | None:
    """Save; on a full disk do what `run.on_disk_full` says.

    Args:
        session: that saves.
        save: commits the checkpoint.
        last: the run ends with it: there is no later one that could take its place.

    Returns:
        The checkpoint; None when it was left out.

    Raises:
        CheckpointError: it could not be written, and the policy is not to go on without it.
    """
    try:
        return save()
    except CheckpointError as error:
        policy = session.settings.on_disk_full
        if policy == "stop" or not is_full(error):
            raise
        if policy == "skip":
            if last:
                raise
            _tell(session, error, "The run goes on without it (run.on_disk_full: skip).")
            return None
        return _paused(session, save, error)


def _paused(session: SessionState, save: Callable[[], Path], error: CheckpointError) -> Path:
    """Try again until there is room, the patience is at its end, or somebody asks to stop."""
    minutes, step = session.settings.pause_minutes, session.run.progress.step
    _tell(
        session, error, f"The run waits up to {minutes:g} minutes for room (run.on_disk_full: "
        "pause).",
    )  # fmt: skip
    size, end = checkpoint_bytes(session), time.monotonic() + 60 * minutes
    for _ in range(1 + round(60 * minutes / _POLL_SECONDS)):
        left = end - time.monotonic()
        if left <= 0 or session.cancel.is_set():
            break
        time.sleep(min(_POLL_SECONDS, left))
        try:
            _look_for_room(session, size)
            result = save()
        except (OSError, CheckpointError) as again:
            if not is_full(again):
                raise
            continue
        session.run.emit_event("disk_room", f"There is room again: step {step} is saved.")
        pass_events(session.run, session.bus)
        return result
    raise error


def _look_for_room(session: SessionState, size: int) -> None:
    """Whether a save has a chance, without writing one."""
    store = session.owned_store
    assert store is not None
    with _hidden_folder(store.folder) as place:
        reserve(place / "room", size)


def _tell(session: SessionState, error: CheckpointError, what: str) -> None:
    steps = session.store.steps() if session.store is not None else []
    newest = f"the newest checkpoint is of step {steps[-1]}" if steps else "there is none yet"
    message = f"The disk is full: {error}; {newest}. {what}"
    session.run.emit_event("disk_full", message, policy=session.settings.on_disk_full)
    pass_events(session.run, session.bus)
