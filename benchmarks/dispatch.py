"""What one event costs: the compiled bus beside a live pluggy call, with 0, 1 and 10 listeners.

Microseconds of CPU time for each event, medians of interleaved rounds, the empty loop subtracted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pluggy

from forge_kernel.config.pipeline import PipelineConfig
from forge_kernel.contract import hookspecs
from forge_kernel.contract.hookspecs import hookimpl
from forge_kernel.contract.plugin import Kind, PluginInfo
from forge_kernel.contract.run_config import RunConfig
from forge_kernel.planning.plan import Plan, Planned
from forge_kernel.training.loaders.in_memory import NoConfig

EVENTS = 20_000


class Listener:
    """Listens to one event and does nothing."""

    info = PluginInfo(name="listener", kind=Kind.OBSERVERS, config=NoConfig)

    @hookimpl
    def on_step_end(self, run: object, step: object) -> None:
        """Do nothing."""


def compiled(listeners: list[Listener]) -> Callable[[], float]:
    from forge_kernel.training.bus import Bus

    entries = tuple(
        Planned(
            path=("live", "observers", index),
            info=Listener.info,
            plugin=Listener,
            config=None,
            origin="bench",
            hooks=("on_step_end",),
            instance=instance,
        )
        for index, instance in enumerate(listeners)
    )
    bus = Bus(Plan(PipelineConfig(run=RunConfig(max_steps=1)), entries))
    calls = bus.calls("on_step_end")

    def run() -> float:
        begin = time.process_time()
        for _ in range(EVENTS):
            for listen in calls:
                listen(None, None)
        return time.process_time() - begin

    return run


def live(listeners: list[Listener]) -> Callable[[], float]:
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    for index, instance in enumerate(listeners):
        manager.register(instance, name=str(index))
    hook = manager.hook.on_step_end

    def run() -> float:
        begin = time.process_time()
        for _ in range(EVENTS):
            hook(run=None, step=None)
        return time.process_time() - begin

    return run


def empty() -> float:
    begin = time.process_time()
    for _ in range(EVENTS):
        pass
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    for count in (0, 1, 10):
        ours, theirs = (
            compiled([Listener() for _ in range(count)]),
            live([Listener() for _ in range(count)]),
        )
        mine, others, ratios = [], [], []
        for _ in range(options.rounds):
            base = empty()
            a, b = ours() - base, theirs() - base
            mine.append(a)
            others.append(b)
            ratios.append(b / max(a, 1e-9))
        results[str(count)] = {
            "compiled_us": statistics.median(mine) / EVENTS * 1e6,
            "pluggy_us": statistics.median(others) / EVENTS * 1e6,
            "ratio": statistics.median(ratios),
        }
    print("listeners   compiled us   live pluggy us   ratio")
    for name, row in results.items():
        print(
            f"{name:>9}   {row['compiled_us']:11.3f}   {row['pluggy_us']:14.3f}   "
            f"{row['ratio']:5.1f}"
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
