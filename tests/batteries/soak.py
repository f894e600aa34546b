"""A long run with everything that watches: memory, files and threads do not grow with its steps."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import psutil
from battery import Battery, Trial
from plugin_run import scratch

from forge_kernel import run
from forge_kernel.api import Kind, PluginInfo, hookimpl
from forge_kernel.planning.pipeline_file import load_pipeline
from forge_kernel.training.loaders.in_memory import NoConfig

INTERVAL: Final = 1000  # steps
WARM_UP: Final = 2  # intervals in which caches fill
LIMIT: Final = 1e6  # bytes in an interval
SETTINGS: Final = (
    "run.log_every=10", "run.validate_every=500", "run.save_every=500", "run.threads=1",
    "exporters=null", "callbacks=null", "data.with.batch_size=16",
    "observers=[{use: metrics_jsonl}, {use: csv}, {use: resources}, {use: progress_bar}, {use: html_report}]",
)  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """What a process holds."""

    memory: int
    files: int
    threads: int


class Looker:
    """Looks at the process after each interval."""

    info = PluginInfo(name="looker", kind=Kind.OBSERVERS, config=NoConfig)
    config = NoConfig()

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.process = psutil.Process()

    @hookimpl
    def on_step_end(self, run: Any, step: Any) -> None:
        if run.progress.step % INTERVAL == 0:
            gc.collect()
            files, threads = self.process.num_fds(), threading.active_count()
            self.seen.append(Seen(self.process.memory_info().rss, files, threads))


def trials(draw: random.Random, count: int) -> Iterator[Trial]:
    looker = Looker()
    settings = (f"run.max_steps={INTERVAL * (count + WARM_UP)}", f"run.seed={draw.randrange(999)}")
    with scratch() as folder:
        run(
            load_pipeline("smoke", [*settings, *SETTINGS]), plugins=[looker],
            output_dir=folder / "run", quiet=True,
        )  # fmt: skip
    first, later = looker.seen[WARM_UP - 1], looker.seen[WARM_UP:]
    for number, seen in enumerate(later, 1):
        growth = (seen.memory - first.memory) / number
        wrong = ""
        if growth > LIMIT:
            wrong = f"memory grows by {growth / 1e6:.2f} MB in {INTERVAL} steps"
        elif (seen.files, seen.threads) != (first.files, first.threads):
            wrong = f"{seen.files} files and {seen.threads} threads, {first} at first"
        yield Trial(f"{number * INTERVAL} steps", wrong, {"MB in 1,000 steps": growth / 1e6})


BATTERY = Battery(
    name="soak",
    promise="below 1 MB in 1,000 steps, no file and no thread more",
    ci=3,
    deep=20,
    trials=trials,
)
