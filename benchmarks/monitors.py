"""Cost of all default monitors in a step, and how soon another process sees an event.

Cost: the showcase's network is trained by sessions that are alive at once, with and without the
monitors that its pipeline names (progress bar on a terminal, metrics file, resources, report, the
run folder's status and log; loss, accuracy, norm, rate and the figures of BitNet and Grokfast, a log
line every 20 steps). Rounds are interleaved; the figure is the ratio of
process CPU time of a round of steps, median over rounds. One thread.

Latency: another process trains and tells something now and then; this one looks at `status.json`,
reads the lines of `forge watch`, and listens to the live page. The figure is the time from the
telling to the seeing.

Spec: K4
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from forge_kernel.planning.catalog import Catalog
from forge_kernel.planning.pipeline_file import load_pipeline
from forge_kernel.planning.plan import plan
from forge_kernel.run_folder.record import RunRecord
from forge_kernel.run_folder.status import read_status
from forge_kernel.training.session import Session

torch.set_num_threads(1)
EVERY = 20  # steps between log lines, as in the showcase
SETTINGS = ["run.device=cpu", "run.validate_every=null", "run.save_every=null", "callbacks=[]",
            "run.max_steps=1000000"]  # fmt: skip
BARE = [
    "run.log_every=1000000", "observers=[]",
    "validators=[{use: classification, with: {in_training: false}}]",
]  # fmt: skip
NETWORKS = {"the showcase": "bitnet_grokfast", "a tiny network (smoke)": "smoke"}
GOAL = 1.02


class Terminal(io.StringIO):
    """A terminal that shows nobody anything, so that the bar is drawn in full."""

    def isatty(self) -> bool:
        return True


def subject(name: str, folder: Path | None) -> Callable[[int], None]:
    """A session; the returned function trains n more steps. With a folder: with its monitors."""
    settings = [*SETTINGS, *([f"run.log_every={EVERY}"] if folder else BARE)]
    record = RunRecord()
    if folder is not None:
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("forge: 1\n")
        record.open(folder)
    pipeline = load_pipeline(name, settings)
    plugins = [record] if folder is not None else []
    session = Session(plan(pipeline, Catalog.installed(), plugins=plugins), folder=folder)
    session.opened().start()
    data, progress = session.run.data, session.run.progress

    def endless() -> Any:
        epoch = 0
        while True:
            yield from data.batches(epoch, 0)
            epoch += 1

    batches = endless()

    def advance(steps: int) -> None:
        for _ in range(steps):
            session.step(next(batches))
            if folder is not None and progress.step % EVERY == 0:
                session.log()

    return advance


def cost(name: str, rounds: int, steps: int) -> dict[str, Any]:
    """Ratios to the session without monitors, and the microseconds of a step."""
    with tempfile.TemporaryDirectory() as place:
        stderr, sys.stderr = sys.stderr, Terminal()
        subjects = {
            "all default monitors": subject(name, Path(place) / "run"),
            "none again (the noise)": subject(name, None),
        }
        reference = subject(name, None)
        for advance in (*subjects.values(), reference):
            advance(2 * steps)
        ratios: dict[str, list[float]] = {label: [] for label in subjects}
        plain: list[float] = []
        gc.collect()
        gc.disable()
        for number in range(rounds):
            for label, advance in subjects.items():
                times = {}
                pair = [("own", advance), ("reference", reference)]
                for side, call in pair if number % 2 else reversed(pair):
                    begun = time.process_time()
                    call(steps)
                    times[side] = time.process_time() - begun
                ratios[label].append(times["own"] / times["reference"])
                plain.append(times["reference"] / steps)
            gc.collect()
        gc.enable()
        sys.stderr = stderr
    result: dict[str, Any] = {"step_us": 1e6 * statistics.median(plain)}
    for label, values in ratios.items():
        quarters = statistics.quantiles(values, n=4)
        result[label] = [statistics.median(values), quarters[0], quarters[2]]
    return result


TELLER = """
import sys, time
from pathlib import Path
from forge_kernel import load_pipeline
from forge_kernel.api import Kind, PluginInfo, hookimpl
from forge_kernel.training.loaders.in_memory import NoConfig
from forge_kernel.runner import run

class Teller:
    info = PluginInfo(name="teller", kind=Kind.CALLBACKS, config=NoConfig)
    config = NoConfig()
    due = time.monotonic() + 3.0
    count = 0

    @hookimpl
    def on_step_end(self, run, step):
        time.sleep(0.005)
        if time.monotonic() >= self.due:
            self.due = time.monotonic() + 0.731
            run.emit_event("told", f"number {self.count} at {time.time():.6f}")
            self.count += 1
        if Path("end").exists():
            run.request("stop", reason="enough")

run(load_pipeline("smoke", ["run.max_steps=100000000", "run.log_every=1000000",
                            "run.validate_every=null", "run.save_every=null", "exporters=[]"]),
    output_dir="run", quiet=True, plugins=[Teller()])
"""
_TOLD = re.compile(r"number (\d+) at ([\d.]+)")


class Seen:
    """When each event was first seen, since it was told."""

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}

    def take(self, text: str) -> None:
        for number, message in _TOLD.findall(text):
            self.seconds.setdefault(int(number), time.time() - float(message))


def follow_status(folder: Path, seen: Seen, over: threading.Event) -> None:
    while not over.is_set():
        seen.take(json.dumps(read_status(folder).data.get("events", [])))
        time.sleep(0.002)


def follow_lines(stream: Any, seen: Seen) -> None:
    for line in stream:
        seen.take(line)


def follow_page(address: str, seen: Seen) -> None:
    with urllib.request.urlopen(f"{address}events", timeout=60) as stream:
        for line in stream:
            seen.take(line.decode())


def latency(events: int) -> dict[str, list[float]]:
    """Seconds until an event is seen: median and longest, by how one looks."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        process = subprocess.Popen([sys.executable, "-c", TELLER], cwd=folder)
        while not (folder / "run/status.json").is_file():
            time.sleep(0.05)
            assert process.poll() is None, "the run did not begin"
        command = [sys.executable, "-m", "forge_kernel", "watch", "run"]
        watch = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
        served = subprocess.Popen(
            [*command, "--serve"], cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
            text=True,
        )  # fmt: skip
        said = served.stderr.readline()  # type: ignore[union-attr]
        address = re.search(r"http://\S+/", said)
        assert address, said
        seen = {name: Seen() for name in ("`status.json`", "`forge watch`", "the live page")}
        over = threading.Event()
        threads = [
            threading.Thread(
                target=follow_status, args=(folder / "run", seen["`status.json`"], over)
            ),
            threading.Thread(target=follow_lines, args=(watch.stdout, seen["`forge watch`"])),
            threading.Thread(target=follow_page, args=(address[0], seen["the live page"])),
        ]
        for thread in threads:
            thread.start()
        while min(len(item.seconds) for item in seen.values()) < events + 1:
            time.sleep(0.1)
            assert process.poll() is None, "the run ended early"
        (folder / "end").touch()
        over.set()
        for item in (process, watch, served):
            item.wait(120)
        for thread in threads:
            thread.join(30)
    result = {}
    for name, item in seen.items():
        # what was told before it was looked at is no latency
        values = [item.seconds[number] for number in sorted(item.seconds)][-events:]
        result[name] = [statistics.median(values), max(values)]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--events", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    costs = {
        title: cost(name, options.rounds, EVERY * (1 if name == "bitnet_grokfast" else 10))
        for title, name in NETWORKS.items()
    }
    for title, result in costs.items():
        print(f"\n{title}: a step without monitors takes {result['step_us']:.0f} us of CPU time")
        for label, value in result.items():
            if label != "step_us":
                print(f"  {label:<26} {value[0]:5.3f}   {value[1]:5.3f} - {value[2]:5.3f}")
    print(f"  (goal for the showcase: at most {GOAL:.2f})")
    seen = latency(options.events)
    print("\nseconds until another process sees an event (median, longest; goal: below 1)\n")
    for name, (median, longest) in seen.items():
        print(f"  {name:<16} {median:6.3f}  {longest:6.3f}")
    if options.json:
        data = {"cost": costs, "latency": seen}
        options.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
