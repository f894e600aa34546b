"""Runs that stand still in a drawn place of a drawn hook, under the watch that is asked for."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from battery import Battery, Trial
from kernel_parts import make_plugin
from plugin_run import parts, scratch, small_run

from forge_kernel import resume
from forge_kernel.api import Kind
from forge_kernel.errors import HangError
from forge_kernel.storage.checkpoint_store import CheckpointReader

STEPS: Final = 6
MINUTES: Final = 0.005
END: Final = 60.0  # seconds, after which it goes on by itself: unseen by the watch


def asleep() -> None:
    time.sleep(END)


def locked() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire(timeout=END)


def listening() -> None:
    left, right = socket.socketpair()
    left.settimeout(END)
    with left, right:
        left.recv(1)


def reading() -> None:
    here, there = os.pipe()
    ends = threading.Timer(END, os.write, (there, b"x"))
    ends.start()
    try:
        os.read(here, 1)
    finally:
        ends.cancel()
        os.close(here)
        os.close(there)


def waiting() -> None:
    process = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({END})"])
    try:
        process.wait()
    finally:
        process.kill()
        process.wait()


def counting() -> None:
    end = time.monotonic() + END
    while time.monotonic() < end:
        pass


KINDS: Final = (asleep, locked, listening, reading, waiting, counting)
HOOKS: Final = ("on_batch", "on_step_end", "on_log", "on_validation", "on_checkpoint")


def sleeper(hook: str, at: int, hang: Any) -> Any:
    """A callback that stands still in one hook, in one step."""

    def look(run: Any) -> None:
        step = run.progress.step + (hook == "on_batch")
        if step >= at:
            hang()

    def on_batch(self: Any, run: Any, step: Any, batch: Any) -> None:
        look(run)

    def on_step_end(self: Any, run: Any, step: Any) -> None:
        look(run)

    def on_log(self: Any, run: Any, record: Any) -> None:
        look(run)

    def on_validation(self: Any, run: Any, metrics: Any) -> None:
        look(run)

    def on_checkpoint(self: Any, run: Any, folder: Any) -> None:
        look(run)

    return make_plugin("sleeper", Kind.CALLBACKS, **{hook: locals()[hook]})


def attempt(folder: Path, plugin: Any, **settings: Any) -> Any:
    torch.manual_seed(5)
    return small_run([plugin], folder, max_steps=STEPS, save_every=2, **settings)


def idle() -> Any:
    return sleeper("on_batch", STEPS + 9, asleep)


def verdict(folder: Path, straight: Any, hook: str, at: int, hang: Any) -> str:
    """What went otherwise than promised, or nothing."""
    began = time.monotonic()
    outcome = attempt(folder, sleeper(hook, at, hang), hang_minutes=MINUTES)
    seconds = time.monotonic() - began
    if not isinstance(outcome.error, HangError):
        return f"not ended by the watch: {outcome.words[:200]}"
    if "sleeper" not in outcome.words or hook not in outcome.words:
        return f"nobody is named: {outcome.words[:200]}"
    if hang.__name__ not in (folder / "stacks.txt").read_text(encoding="utf-8"):
        return "where it stood is not in stacks.txt"
    if seconds > END:
        return f"ended after {seconds:.0f} s"
    step = CheckpointReader(folder / "checkpoints").newest()[0].step
    if step < at - 1:
        return f"kept step {step}, {at - 1} was whole"
    resumed = resume(folder, ["run.hang_minutes=null"], plugins=parts([idle()]), quiet=True)
    pairs = zip(resumed.model.parameters(), straight.model.parameters(), strict=True)
    return "" if all(torch.equal(a, b) for a, b in pairs) else "resumed to other weights"


def trials(draw: random.Random, count: int) -> Iterator[Trial]:
    with scratch() as place:
        straight = attempt(place / "straight", idle()).result
        for _ in range(count):
            hook, hang = draw.choice(HOOKS), draw.choice(KINDS)
            at = 2 if hook in ("on_validation", "on_checkpoint") else draw.randint(2, STEPS - 1)
            with scratch() as folder:
                wrong = verdict(folder / "run", straight, hook, at, hang)
            yield Trial(f"{hang.__name__} in {hook}, step {at}", wrong)


BATTERY = Battery(
    name="hangs",
    promise="told with plugin, hook and stacks, the last whole step kept, resumed to the bit",
    ci=24,
    deep=200,
    trials=trials,
)
