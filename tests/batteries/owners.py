"""One owner, many readers: readers beside a run, two resumptions at once, clocks that step."""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import small_run
from battery import Battery, Trial

from forge_kernel.errors import ConfigError
from forge_kernel.run_folder.status import read_status
from forge_kernel.runner import export, resume, run
from forge_kernel.trained_model import trained_model

LIMIT = 60.0  # seconds, after which what was to happen is taken not to happen
AT_ONCE = 5


class LiveRun:
    """A run in another process that saves each step until it is told to stop."""

    def __init__(self, place: Path) -> None:
        self.folder = place / "live"
        text = small_run.write_pipeline(place).read_text(encoding="utf-8")
        pipeline = place / "long.yaml"
        pipeline.write_text(text.replace(f"max_steps: {small_run.STEPS}", "max_steps: 1000000"))

        def work() -> int:
            return small_run.forge("run", pipeline, "-q", "--output-dir", self.folder)

        self.process = small_run.Process(work, place / "live-output")
        self.ended: int | None = None  # how, when that was seen before anybody stopped it
        end = time.monotonic() + LIMIT
        while not list(self.folder.glob("checkpoints/step-*/manifest.json")):
            assert time.monotonic() < end, "the run did not begin"
            time.sleep(0.02)

    def step(self) -> int:
        """Where it is."""
        return int(read_status(self.folder).data.get("step", 0))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """It writes nothing meanwhile."""
        os.kill(self.process.pid, signal.SIGSTOP)
        # it goes on until the system has stopped it
        _, status = os.waitpid(self.process.pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            self.ended = os.waitstatus_to_exitcode(status)
        try:
            yield
        finally:
            if self.ended is None:
                os.kill(self.process.pid, signal.SIGCONT)

    def stopped(self) -> str:
        """Stop it; what is wrong with how it ended."""
        if self.ended is not None:
            return f"the run ended by itself, with {self.ended}"
        os.kill(self.process.pid, signal.SIGTERM)
        code = self.process.wait()
        if code != 128 + signal.SIGTERM:
            return f"the run ended with {code}"
        steps = [line["step"] for line in small_run.metrics(self.folder) if "accuracy" not in line]
        logged = [step for step in steps if steps.count(step) > 2]
        result = json.loads((self.folder / "result.json").read_text(encoding="utf-8"))
        if result["outcome"] != "stopped" or logged:
            return f"outcome {result['outcome']}, steps logged too often: {logged[:5]}"
        return ""


def tree(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Files and folders with inode, size and time, but for exports, which readers may write."""
    result = {}
    for path in folder.rglob("*"):
        if "exports" not in path.parts and path != folder / "owner.json":
            about = path.stat()
            result[str(path)] = (about.st_ino, about.st_size, about.st_mtime_ns)
    return result


READERS: dict[str, Callable[[Path], object]] = {
    "trained_model": trained_model,
    "export": lambda folder: export(folder, "state_dict"),
    "status": read_status,
    "forge status": lambda folder: small_run.forge("status", folder),
    "forge report": lambda folder: small_run.forge(
        "report", folder, "--output", folder.parent / "report.html"
    ),
}


def reader(live: LiveRun, draw: random.Random, place: Path) -> Trial:
    """Someone who reads the run's folder: while it trains, or while it stands still."""
    name = draw.choice(list(READERS))
    still = draw.random() < 0.5

    def work() -> int:
        READERS[name](live.folder)
        return 0

    with live.paused() if still else contextlib.nullcontext():
        before = tree(live.folder) if still else {}
        code = small_run.forked(work, place / "output")
        after = tree(live.folder) if still else {}
    wrong = ""
    if code:
        wrong = f"it ended with {code}: {(place / 'output').read_text(encoding='utf-8')[-300:]}"
    elif before != after:
        wrong = f"it changed {sorted(set(before.items()) ^ set(after.items()))[:3]}"
    return Trial(f"{name} beside a run that {'stands still' if still else 'trains'}", wrong)


class Pair:
    """Two that resume one folder at the same moment; whoever trains waits until the other ended."""

    def __init__(self, base: Path, folder: Path) -> None:
        shutil.copytree(base, folder)
        self._folder = folder
        start_read, start_write = os.pipe()
        self._go_read, self._go_write = os.pipe()

        def waiting(_: object) -> None:
            select.select([self._go_read], [], [], LIMIT)

        def work() -> int:
            os.read(start_read, 1)  # both at once
            try:
                resume(folder, ["run.max_steps=8"], on_progress=waiting, quiet=True)
            except ConfigError as error:
                return 2 if "is being written by process" in str(error) else 97
            return 0

        self._processes = [small_run.Process(work) for _ in range(2)]
        os.write(start_write, b"12")
        os.close(start_write)
        os.close(start_read)

    def problem(self) -> str:
        """What is wrong with how the two ended."""
        first, code = self._first_to_end()
        os.write(self._go_write, b"1")  # stays there for whoever looks
        codes = [code] if first is not None else []
        codes += [one.wait() for one in self._processes if one is not first]
        os.close(self._go_write)
        os.close(self._go_read)
        if sorted(codes) != [0, 2]:
            return f"they ended with {codes}"
        step, _ = small_run.weights(self._folder)
        return "" if step == 8 else f"the end is step {step}"

    def _first_to_end(self) -> tuple[small_run.Process | None, int]:
        end = time.monotonic() + LIMIT
        while time.monotonic() < end:
            for process in self._processes:
                pid, status = os.waitpid(process.pid, os.WNOHANG)
                if pid:
                    return process, os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        return None, 0


def pairs(base: Path, place: Path, count: int) -> Iterator[Trial]:
    """Some pairs at a time."""
    for start in range(0, count, AT_ONCE):
        numbers = range(start, min(count, start + AT_ONCE))
        begun = [Pair(base, place / f"pair-{number}") for number in numbers]
        for pair in begun:
            yield Trial("two resumptions at once", pair.problem())


def clock(live: LiveRun, dead: Path, draw: random.Random) -> Trial:
    """The state of a live run and of a killed one by a clock that is some days off."""
    off = draw.choice((-1, 1)) * draw.uniform(0.5, 2.0) * 86400

    def work() -> int:
        from forge_kernel.run_folder import status

        real = time.time
        status.time.time = lambda: real() + off  # type: ignore[attr-defined]
        here, gone = read_status(live.folder).condition, read_status(dead).condition
        print(here, gone)
        return 0 if here in ("running", "silent") and gone == "gone" else 97

    code = small_run.forked(work)
    return Trial(f"a clock {off / 86400:+.1f} days off", f"code {code}" if code else "")


def killed_run(place: Path) -> Path:
    """The folder of a run that was killed."""
    live = LiveRun(place)
    live.process.kill()
    live.process.wait()
    return live.folder.rename(place / "dead")


def trials(draw: random.Random, count: int) -> Iterator[Trial]:
    """Of ten: five readers, three pairs, two clocks."""
    small_run.loaded()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        base = place / "base"
        run(small_run.write_pipeline(place), output_dir=base, quiet=True)
        two, three = round(count * 0.2), round(count * 0.3)
        yield from pairs(base, place, three)
        dead = killed_run(place)
        live = LiveRun(place)
        try:
            for _ in range(two):
                yield clock(live, dead, draw)
            for _ in range(max(0, count - two - three - 1)):
                step = live.step()
                yield reader(live, draw, place)
                if live.ended is not None:
                    break
                if live.step() < step:
                    yield Trial("the run beside readers", "it went back")
        finally:
            wrong = live.stopped()
        yield Trial("the run beside readers", wrong)


BATTERY = Battery(
    name="owners",
    promise="readers change and disturb nothing, one of two resumptions wins, no clock misleads",
    ci=100,
    deep=400,
    trials=trials,
)
