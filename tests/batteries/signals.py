"""Signals at drawn instants of a run, one or two: what was trained is saved, and resumes to the bit."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
from battery import Battery, Trial
from forked import without_waiting
from plugin_run import scratch

from forge_kernel.cli import main
from forge_kernel.storage.checkpoint_store import CheckpointStore
from forge_kernel.training import session as session_module
from forge_kernel.training.forward_pass import ForwardPass
from forge_kernel.training.optimizer_step import OptimizerStep
from forge_kernel.training.session import Session

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
STEPS: Final = 9
SETTINGS: Final = (
    f"run.max_steps={STEPS}", "run.accumulate=2", "run.validate_every=3", "run.save_every=1",
    "run.log_every=1", "run.threads=1", "data.with.batch_size=8",
    "observers=[{use: metrics_jsonl}, {use: progress_bar}]",
)  # fmt: skip
LONGEST: Final = 60.0  # seconds until a child counts as hung
PLACES: Final[dict[str, tuple[Any, str]]] = {
    "set-up": (session_module, "build"),
    "a micro-batch": (OptimizerStep, "accumulate"),
    "the update": (OptimizerStep, "update"),
    "validation": (ForwardPass, "validation_loss"),
    "logging": (Session, "log"),
    "a save": (CheckpointStore, "save"),
    "the export": (Session, "export"),
    "the end": (Session, "hand_over"),
}
"""Functions before or after whose n-th call the signal comes, beside instants of the clock."""


def forked(work: Callable[[], None], output: Path) -> int:
    """A child that works with its output in a file; its pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        with output.open("ab") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), write_through=True)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True)
        work()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001  what a process would end with
        import traceback

        traceback.print_exc()
        status = 71
    finally:
        os._exit(status)


def command(*arguments: str) -> Callable[[], None]:
    def work() -> None:
        sys.argv = ["forge", *arguments]
        main()

    return work


def ended(pid: int) -> int | None:
    """How a child ended, as a shell has it; None: it hangs, and is killed."""
    limit = time.monotonic() + LONGEST
    while time.monotonic() < limit:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def begun(folder: Path) -> Callable[[], None]:
    settings = itertools.chain.from_iterable(("--set", setting) for setting in SETTINGS)
    return command("run", "smoke", "--output-dir", str(folder), "-q", *settings)


def begin(folder: Path, before: Callable[[], None] = lambda: None) -> int:
    def work() -> None:
        os.fsync = without_waiting  # it is not the power that fails here
        before()
        begun(folder / "r")()

    return forked(work, folder / "said")


def weights(folder: Path) -> str:
    store = CheckpointStore(folder / "r" / "checkpoints")
    model = store.load(store.path(STEPS)).model
    digest = hashlib.sha256()
    for name in sorted(model):
        digest.update(name.encode() + model[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


@functools.cache
def undisturbed() -> tuple[str, float]:
    """The weights of a run without a signal, and its seconds; children find all imported."""
    quietly = contextlib.redirect_stdout(io.StringIO())
    with scratch() as folder, contextlib.suppress(SystemExit), quietly:
        begun(folder / "here")()
    with scratch() as folder:
        started = time.monotonic()
        assert ended(begin(folder)) == 0, (folder / "said").read_text()
        return weights(folder), time.monotonic() - started


def signalling(place: str, call: int, numbers: list[int], *, after: bool) -> None:
    """Let a function of the product send signals to its own process at one of its calls."""
    owner, name = PLACES[place]
    original = getattr(owner, name)
    calls = itertools.count(1)

    @functools.wraps(original)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        due = next(calls) == call
        if due and not after:
            send(numbers)
        answer = original(*arguments, **named)
        if due and after:
            send(numbers)
        return answer

    setattr(owner, name, wrapped)


def send(numbers: list[int]) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def wrong_end(status: int | None, folder: Path, numbers: list[int]) -> str:
    """What is otherwise than promised of how it ended and what is kept."""
    said = (folder / "said").read_text(errors="replace")
    if status is None:
        return "it hangs"
    if status not in (0, *(128 + number for number in numbers)):
        return f"exit status {status}: {said[-600:]}"
    if "Traceback" in said:
        return f"a traceback: {said[-600:]}"
    result = folder / "r" / "result.json"
    known = json.loads(result.read_text()) if result.is_file() else {}
    store = folder / "r" / "checkpoints"
    steps = CheckpointStore(store).steps() if store.is_dir() else []
    trained = known.get("steps", 0)
    if status and f"forge: {signal.Signals(status - 128).name}: " not in said:
        return f"nothing was said: {said[-300:]}"
    if max(steps, default=0) < trained - (len(numbers) > 1):
        return f"{trained} steps were trained, the checkpoints are of {steps}"
    if status == 0 and known.get("outcome") != "completed":
        return f"exit status 0 of a run that is {known.get('outcome')}"
    return ""


def wrong_resume(folder: Path) -> str:
    """The run that goes on must end like the one that no signal came to."""
    checkpoints = folder / "r" / "checkpoints"
    if not (checkpoints.is_dir() and CheckpointStore(checkpoints).steps()):
        return ""
    if ended(forked(command("resume", str(folder / "r"), "-q"), folder / "again")) != 0:
        return f"no resume: {(folder / 'again').read_text()[-600:]}"
    return "" if weights(folder) == undisturbed()[0] else "the resumed run has other weights"


def trials(draw: random.Random, count: int) -> Iterator[Trial]:
    """Signals in turn; places, instants and second signals drawn."""
    _, seconds = undisturbed()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    for number in itertools.islice(itertools.cycle(heard), count):
        numbers = [number, draw.choice(heard)] if draw.random() < 0.3 else [number]
        place, call = draw.choice(["an instant", *PLACES]), 0
        name = " then ".join(signal.Signals(one).name for one in numbers)
        with scratch() as folder:
            if place == "an instant":
                moments = sorted(draw.uniform(0.05, 1.0) * seconds for _ in numbers)
                pid = begin(folder)
                began = time.monotonic()
                for moment, one in zip(moments, numbers, strict=True):
                    time.sleep(max(0.0, began + moment - time.monotonic()))
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, one)
                name = f"{name} after {moments[0] / seconds:.2f} of a run"
            else:
                call = draw.randint(1, 2 if place in ("set-up", "the export", "the end") else 9)
                call = 1 if place in ("set-up", "the export", "the end") else call
                after = draw.random() < 0.5
                pid = begin(
                    folder, functools.partial(signalling, place, call, numbers, after=after)
                )
                name = f"{name} {'after' if after else 'before'} call {call} of {place}"
            began = time.monotonic()
            status = ended(pid)
            latency = time.monotonic() - began
            wrong = wrong_end(status, folder, numbers) or wrong_resume(folder)
            steps = {"a micro-batch": (call + 1) // 2, "the update": call}.get(place, STEPS)
            if status == 0 and steps <= STEPS - 2:
                wrong = f"asked in step {steps}, it went on to its end"
            yield Trial(name, wrong, {"seconds until the end": latency})


BATTERY = Battery(
    "signals",
    "saved, at most one step lost, 128 + n, and resumed to the bit",
    ci=60,
    deep=600,
    trials=trials,
)
