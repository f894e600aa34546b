"""A battery: one question about reliability, asked many times with drawn inputs."""

from __future__ import annotations

import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Trial:
    """What one try showed: `wrong` says what went otherwise than promised ("" for nothing)."""

    what: str
    wrong: str = ""
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Battery:
    """`trials(draw, count)` gives at most `count` trials; every draw comes from `draw` alone, so
    that a seed repeats them. `promise` is what has to hold in each, `ci` and `deep` are the
    numbers of trials of the two sizes."""

    name: str
    promise: str
    ci: int
    deep: int
    trials: Callable[[random.Random, int], Iterator[Trial]]


@dataclass
class Outcome:
    """What a run of a battery showed, as the line on the screen and the JSON file have it."""

    battery: str
    promise: str
    seed: int
    asked: int
    tried: int = 0
    seconds: float = 0.0
    cut_short: bool = False
    wrong: list[dict[str, str]] = field(default_factory=list)
    figures: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def line(self) -> str:
        verdict = f"{len(self.wrong)} wrong" if self.wrong else "none wrong"
        short = f" of {self.asked} (time limit)" if self.cut_short else ""
        figures = "".join(
            f", {name} median {seen['median']:.4g} max {seen['max']:.4g}"
            for name, seen in self.figures.items()
        )
        return (
            f"{self.battery}: {self.tried}{short} tried, {verdict} ({self.promise}), "
            f"seed {self.seed}, {self.seconds:.0f} s{figures}"
        )

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        body: dict[str, Any] = {**vars(self), "machine": platform.machine()}
        text = json.dumps(body, indent=1, sort_keys=True) + "\n"
        (folder / f"{self.battery}.json").write_text(text, encoding="utf-8")


def run_battery(battery: Battery, *, seed: int, count: int, seconds: float) -> Outcome:
    """Try `count` times or until `seconds` are over; the limit ends the battery, it judges nothing."""
    outcome = Outcome(battery.name, battery.promise, seed, count)
    figures: dict[str, list[float]] = {}
    began = time.monotonic()
    for trial in battery.trials(random.Random(f"{battery.name}:{seed}"), count):
        outcome.tried += 1
        if trial.wrong:
            outcome.wrong.append({"what": trial.what, "wrong": trial.wrong})
        for name, value in trial.figures.items():
            figures.setdefault(name, []).append(value)
        if time.monotonic() - began > seconds:
            outcome.cut_short = outcome.tried < count
            break
    outcome.seconds = time.monotonic() - began
    for name, values in figures.items():
        outcome.figures[name] = {"median": statistics.median(values), "max": max(values)}
    return outcome
