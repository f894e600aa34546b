"""A sweep: its runs begun, watched and taken in, until none is left or the budget is spent."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from forge_kernel.embedding import RunFolder, write_json
from forge_kernel.errors import INTERRUPTS, ConfigError, Fault
from forge_kernel.run_folder import owner
from forge_kernel.run_folder.folder import LOG
from forge_plugins.sweeps import worker as workers
from forge_plugins.sweeps.outcome import Goal, Row, outcome
from forge_plugins.sweeps.search import Search
from forge_plugins.sweeps.variant import Job, Variant

FILE: Final = "sweep.json"
_PAUSE_SECONDS: Final = 0.02
_LOOK_SECONDS: Final = 0.5  # between two looks at the validations of runs that may be ended
_MOST_ROUNDS: Final = 10**10  # of the loop: years
_REFUSED: Final = 2
_NOTES: Final[Mapping[str | None, str]] = {"failed": "failed", "stopped": "not finished"}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a sweep may take; None: no bound.

    Args:
        runs: that are begun or gone on with, in this call.
        seconds: after which no run is begun and those in training are stopped and saved.
        workers: processes at a time.
        threads: of one operation in each.
    """

    runs: int | None = None
    seconds: float | None = None
    workers: int = 1
    threads: int = 1


@dataclass(slots=True)
class _Tried:
    """A configuration and what its runs have come to."""

    variant: Variant
    jobs: list[Job]
    done: set[str] = field(default_factory=set)  # folders
    ended_early: bool = False
    learned: bool = False


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a sweep is of.

    Args:
        file: the pipeline.
        folder: of the sweep, with a run folder for each run.
        seeds: of each configuration; of `None` the file's own.
        goal: by which runs are compared.
        about: what the sweep is, as `sweep.json` keeps it.
        pruned: names of run folders that were ended early before.
    """

    file: str
    folder: Path
    seeds: Sequence[int | None]
    goal: Goal
    about: Mapping[str, Any]
    pruned: Sequence[str] = ()


class Sweep:
    """The runs of a sweep.

    Args:
        asked: what it is of.
        search: gives the configurations.
        budget: what it may take.
        tell: hears a line for each run that ends.
    """

    def __init__(
        self, asked: Asked, search: Search, budget: Budget, tell: Callable[[str], None]
    ) -> None:
        self._file, self._folder, self._seeds = asked.file, asked.folder, asked.seeds
        self._goal, self._about, self._pruned = asked.goal, asked.about, set(asked.pruned)
        self._search, self._budget, self._tell = search, budget, tell
        self._tried: list[_Tried] = []
        self._waiting: deque[Job] = deque()
        self._running: dict[str, tuple[workers.Worker, Job]] = {}
        self._begun = 0
        self._accepted = bool(asked.pruned)
        self._stopping = ""  # why
        self._looked = 0.0

    @property
    def stopped(self) -> str:
        """Why it ended before its last run; empty when it did not."""
        return self._stopping

    def run(self) -> None:
        """Train what is to be trained.

        Raises:
            ConfigError: the first run was refused, with what was wrong.
        """
        start = time.monotonic()
        try:
            for _ in range(_MOST_ROUNDS):
                self._fill(start)
                if not self._running:
                    break
                self._take_ended()
                self._prune()
                time.sleep(_PAUSE_SECONDS)
        except INTERRUPTS:
            self._stop("interrupted")
            self._wait()
            raise
        except BaseException:
            self._stop("failed")
            self._wait()
            raise

    def rows(self) -> list[Row]:
        """Each configuration with the values of its runs."""
        return [self._row(tried) for tried in self._tried]

    def folders(self) -> list[Path]:
        """The run folders that there are, in the order of the configurations."""
        return [
            self._folder / job.folder
            for tried in self._tried
            for job in tried.jobs
            if (self._folder / job.folder / "config.yaml").is_file()
        ]

    def _row(self, tried: _Tried) -> Row:
        values, notes = [], []
        for job in tried.jobs:
            folder = self._folder / job.folder
            ended = outcome(folder)
            value = self._goal.value(folder) if ended == "completed" else None
            values += [] if value is None else [value]
            if job.folder in self._pruned:
                notes.append("ended early")
            elif ended != "completed":
                notes.append(
                    {"failed": "failed", "stopped": "not finished"}.get(str(ended), "not run")
                )
            elif value is None:
                notes.append(f"no {self._goal.metric}")
        said = ", ".join(f"{notes.count(note)} {note}" for note in dict.fromkeys(notes))
        return Row(tried.variant, tuple(values), len(tried.jobs), f"({said})" if said else "")

    # -- runs -------------------------------------------------------------------------------------

    def _fill(self, start: float) -> None:
        """Begin runs while there are processes for them, and the budget lasts."""
        seconds = self._budget.seconds
        if seconds is not None and time.monotonic() - start >= seconds and not self._stopping:
            self._stop(f"--max-seconds {seconds:g} are over")
        for _ in range(_MOST_ROUNDS):
            if self._stopping or len(self._running) >= self._budget.workers:
                return
            job = self._next()
            if job is None:
                return
            folder = self._folder / job.folder
            if job.folder in self._pruned or outcome(folder) in ("completed", "failed"):
                self._accepted = True
                self._ended(job)
            elif folder.is_dir() and owner.look(folder)[0] == "held":
                self._waiting.append(job)  # of a sweep that was killed; it stops at its next step
                time.sleep(_LOOK_SECONDS)
            elif self._budget.runs is not None and self._begun >= self._budget.runs:
                self._stopping = f"--max-runs {self._budget.runs} are begun"
            else:
                self._begin(job, folder)

    def _next(self) -> Job | None:
        if self._waiting:
            return self._waiting.popleft()
        variant = self._search.next()
        if variant is None:
            return None
        jobs = [Job(variant, seed) for seed in self._seeds]
        self._tried.append(_Tried(variant, jobs))
        self._write()
        self._waiting.extend(jobs)
        return self._waiting.popleft()

    def _begin(self, job: Job, folder: Path) -> None:
        self._begun += 1
        file = self._file

        def work(cancel: workers.OrphanStops) -> int:
            return workers.train(file, job.settings, folder, cancel)

        self._running[job.folder] = (workers.begin(work, folder, self._budget.threads), job)

    def _take_ended(self) -> None:
        for name, (process, job) in list(self._running.items()):
            status = process.ended()
            if status is None:
                continue
            del self._running[name]
            said = process.output.read_text(encoding="utf-8", errors="replace").strip()
            if status == _REFUSED and not self._accepted:
                raise ConfigError([Fault(said or "the first run was refused")])
            if status != _REFUSED:
                self._accepted = True
            if not said:
                process.output.unlink()
            self._tell(self._line(job, status, said, time.monotonic() - process.begun))
            self._ended(job)

    def _line(self, job: Job, status: int, said: str, seconds: float) -> str:
        """One line for a run that has ended, with what it printed where it failed."""
        value = self._goal.value(self._folder / job.folder)
        shown = "" if value is None else f": {self._goal.metric} {value:.4g}"
        seed = "" if job.seed is None else f", seed {job.seed}"
        how = {0: "", 130: " (stopped)"}.get(status, f" (failed, exit status {status})")
        if job.folder in self._pruned:
            how = " (ended early)"
        line = f"{job.variant.label}{seed}{shown}{how}, {seconds:.1f} s"
        return (
            line if status in (0, 130) or not said else f"{line}\n  " + said.replace("\n", "\n  ")
        )

    def _ended(self, job: Job) -> None:
        """Take a run in; when it was its configuration's last, tell the search."""
        tried = self._tried[job.variant.number]
        tried.done.add(job.folder)
        if len(tried.done) == len(tried.jobs) and not tried.learned and not self._stopping:
            tried.learned = True
            early = any(each.folder in self._pruned for each in tried.jobs)
            self._search.learn(tried.variant, self._row(tried).median, pruned=early)

    # -- ended early ------------------------------------------------------------------------------

    def _prune(self) -> None:
        """Look now and then at the validations of runs, and end those that are far behind."""
        now = time.monotonic()
        if self._stopping or now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        for name, (process, job) in self._running.items():
            tried = self._tried[job.variant.number]
            if tried.ended_early or job is not tried.jobs[0]:  # one of its seeds is judged
                continue
            values = validations(self._folder / name, self._goal.metric)
            if self._search.is_behind(job.variant, values):
                tried.ended_early = True
                self._pruned.update(each.folder for each in tried.jobs)
                self._write()
                for other in tried.jobs:
                    if other.folder in self._running:
                        self._running[other.folder][0].stop()
                process.stop()

    # -- the end ----------------------------------------------------------------------------------

    def _stop(self, why: str) -> None:
        self._stopping = self._stopping or why
        for process, _ in self._running.values():
            process.stop()

    def _wait(self) -> None:
        """Until all have saved what they have."""
        for _ in range(_MOST_ROUNDS):
            self._running = {
                name: pair for name, pair in self._running.items() if pair[0].ended() is None
            }
            if not self._running:
                return
            time.sleep(_PAUSE_SECONDS)

    def _write(self) -> None:
        variants = [dict(tried.variant.values) for tried in self._tried]
        write_json(
            self._folder / FILE,
            {**self._about, "variants": variants, "pruned": sorted(self._pruned)},
        )


def validations(folder: Path, metric: str) -> dict[int, float]:
    """The values of a metric by step, of a run in training."""
    result: dict[int, float] = {}
    try:
        lines = RunFolder(folder).text(LOG).splitlines()
    except OSError:
        return result
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:  # it is being written
            continue
        if isinstance(event, dict) and event.get("event") == "validation":
            value = event.get("metrics", {}).get(metric)
            if isinstance(value, int | float):
                result[int(event["step"])] = float(value)
    return result
