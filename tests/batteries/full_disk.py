"""A disk that fills and has room again at drawn moments, under each policy."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from battery import Battery, Trial
from plugin_run import scratch, small_run

from forge_kernel.api import Kind, PluginInfo, hookimpl
from forge_kernel.errors import CheckpointError, RunError
from forge_kernel.storage.checkpoint_store import CheckpointReader
from forge_kernel.training.guards import disk_room
from forge_kernel.training.loaders.in_memory import NoConfig

STEPS: Final = 8
POLICIES: Final = ("stop", "pause", "skip")


class Disk:
    """The system's calls that take room fail below one folder's checkpoints while it is full."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.number, self.full = str(folder), number, False

    def refuse(self, descriptor: int) -> None:
        place = os.readlink(f"/proc/self/fd/{descriptor}")
        if self.full and place.startswith(self.folder) and "checkpoints" in place:
            raise OSError(self.number, os.strerror(self.number))

    @contextlib.contextmanager
    def mounted(self) -> Iterator[None]:
        """For the time of a run."""
        fsync, allocate, poll = os.fsync, os.posix_fallocate, disk_room._POLL_SECONDS

        def fsync_or_not(descriptor: int) -> None:
            self.refuse(descriptor)
            fsync(descriptor)

        def allocate_or_not(descriptor: int, offset: int, size: int) -> None:
            self.refuse(descriptor)
            allocate(descriptor, offset, size)

        os.fsync, os.posix_fallocate = fsync_or_not, allocate_or_not
        disk_room._POLL_SECONDS = 0.01  # type: ignore[misc]
        try:
            yield
        finally:
            os.fsync, os.posix_fallocate = fsync, allocate
            disk_room._POLL_SECONDS = poll  # type: ignore[misc]


class Filler:
    """Fills the disk after one step and empties it after another; at step 0 before the run."""

    info = PluginInfo(name="filler", kind=Kind.CALLBACKS, config=NoConfig)
    config = NoConfig()

    def __init__(self, disk: Disk, fills: int, empties: int, *, waits: bool) -> None:
        self.disk, self.fills, self.empties, self.waits = disk, fills, empties, waits
        disk.full = fills == 0

    @hookimpl
    def on_step_end(self, run: Any, step: Any) -> None:
        number = run.progress.step
        if number == self.fills:
            self.disk.full = True
            if self.waits:  # whoever waits at the next save sees room a moment later
                threading.Timer(0.1, self._empty).start()
        elif number == self.empties:
            self._empty()

    def _empty(self) -> None:
        self.disk.full = False


def verdict(folder: Path, disk: Disk, policy: str, fills: int, empties: int) -> str:
    """What went otherwise than promised, or nothing."""
    waits = policy == "pause"
    filler = Filler(disk, fills, STEPS + 1 if waits else empties, waits=waits)
    torch.manual_seed(5)
    with disk.mounted():
        outcome = small_run(
            [filler], folder, max_steps=STEPS, save_every=2, validate_every=None,
            on_disk_full=policy, pause_minutes=0.1, keep_checkpoints=9,
        )  # fmt: skip
    steps = CheckpointReader(folder / "checkpoints").steps()
    for step in steps:
        _ = CheckpointReader(folder / "checkpoints").load(folder / "checkpoints" / f"step-{step}")
    if fills == 0:
        early = isinstance(outcome.error, RunError) and "cannot be kept" in str(outcome.error)
        return "" if early and not steps else f"not seen before the first step: {outcome.words}"
    due = [step for step in range(2, STEPS + 1, 2) if fills <= step < empties]  # on a full disk
    ends = json.loads((folder / "result.json").read_text())["outcome"]
    if policy == "pause" or not due:
        return "" if (ends, steps) == ("completed", [2, 4, 6, 8]) else f"{ends}, kept {steps}"
    if policy == "stop" or STEPS in due:
        first = due[0] if policy == "stop" else STEPS
        kept = [step for step in (2, 4, 6) if step < first and step not in due]
        right = (
            isinstance(outcome.error, CheckpointError) and [s for s in steps if s in kept] == kept
        )
        return "" if right and ends == "failed" else f"{ends}, kept {steps}, {outcome.words[:200]}"
    wanted = [step for step in (2, 4, 6, 8) if step not in due]
    return "" if (ends, steps) == ("completed", wanted) else f"{ends}, kept {steps} of {wanted}"


def trials(draw: random.Random, count: int) -> Iterator[Trial]:
    for number in range(count):
        policy = POLICIES[number % len(POLICIES)]
        code = draw.choice([errno.ENOSPC, errno.EDQUOT])
        fills = draw.randrange(STEPS)
        empties = draw.randrange(fills + 1, STEPS + 2)  # the last: never
        with scratch() as place:
            folder = place / "run"
            wrong = verdict(folder, Disk(place, code), policy, fills, empties)
        what = f"{errno.errorcode[code]} from step {fills} to {empties}, {policy}"
        yield Trial(what, wrong)


BATTERY = Battery(
    name="full-disk",
    promise="seen before the first step, else run.on_disk_full obeyed and what was saved is whole",
    ci=60,
    deep=600,
    trials=trials,
)
