"""Methods that make networks generalize sooner, side by side: steps and CPU seconds to 95 %.

Every method is a pipeline of `pipelines/grokking/` and has the same tuning budget: at most eight
settings, all on seed 100, those within one and a half times the best one's steps on seed 101 too
(three at most). What needed the fewest steps over both (the mean; not reached counts as the cap) is
run on seeds 0 to 4. Full precision and ternary are tuned apart. The best three and the two
yardsticks then run on division and addition, with the settings of multiplication.

Each run is a process of its own with one thread. Results are kept as JSON, a run an entry; what is
there is not run again, so the script goes on where it was stopped.

Spec: E14, K1
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grokking import Row, run_one

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "accelerators.json"
SEEDS = range(5)
TUNING_CAP, CAP = 1500, 4000
PRECISIONS = ("ternary", "fp32")
OTHER_TASKS = ("div", "add")


@dataclass(frozen=True)
class Method:
    """One line of the table and what is tuned of it: `--set` arguments, at most eight times."""

    name: str
    title: str
    grid: tuple[tuple[str, ...], ...]
    yardstick: bool = False


def _grid(*settings: str) -> tuple[tuple[str, ...], ...]:
    """One line of settings each, separated by blanks."""
    grid = tuple(tuple(line.split()) for line in settings)
    assert len(grid) <= 8, "the tuning budget is eight settings"
    return grid


LR, DECAY = "optimizer.with.lr=", "optimizer.with.weight_decay="
ALPHA, LAMBDA = "gradients[0].with.alpha=", "gradients[0].with.lambda_reg="
METHODS = [
    Method("adamw", "AdamW (the yardstick)", _grid(
        *(f"{LR}{lr} {DECAY}{decay}" for lr in ("1e-3", "2e-3", "3e-3", "4e-3") for decay in ("1.0", "2.0")),
    ), yardstick=True),
    Method("grokfast_adamw", "Grokfast, AdamW", _grid(
        *(f"{LR}{lr} {ALPHA}{alpha} {LAMBDA}{amount}" for lr, alpha, amount in (
            ("1e-3", "0.9", "2.0"), ("2e-3", "0.9", "1.0"), ("2e-3", "0.9", "2.0"), ("2e-3", "0.98", "0.5"),
            ("3e-3", "0.9", "0.25"), ("3e-3", "0.9", "0.5"), ("3e-3", "0.8", "0.5"), ("4e-3", "0.9", "0.5"),
        )),
    ), yardstick=True),
    Method("grokfast_adam", "Grokfast, Adam with L2 (the paper's optimizer)", _grid(
        *(f"{LR}{lr} {DECAY}{decay} {ALPHA}{alpha}" for lr in ("1e-3", "2e-3") for decay in ("0.005", "0.01") for alpha in ("0.95", "0.98")),
    )),
    Method("lion_row_norm", "Lion, rows within a norm", _grid(
        *(f"{LR}{lr} callbacks[0].with.max_norm={norm}" for lr in ("5e-4", "1e-3", "2e-3", "3e-3") for norm in ("1.0", "2.0")),
    )),
    Method("delayed_compression", "delayed compression, Adam", _grid(
        *(f"{LR}{lr} regularizers[0].with.strength={strength}" for lr in ("1e-3", "3e-3") for strength in ("1e-3", "3e-3", "1e-2", "3e-2")),
    )),
    Method("orthogonal_stablemax", "orthogonal gradients, StableMax, AdamW", _grid(
        *(f"{LR}{lr} {DECAY}{decay}" for lr in ("1e-3", "3e-3", "5e-3", "1e-2") for decay in ("0.0", "1.0")),
    )),
    Method("egalitarian", "egalitarian gradients, SGD", _grid(
        *(f"{LR}{lr} optimizer.with.momentum={momentum} {DECAY}{decay}" for lr, momentum, decay in (
            ("1e-2", "0", "0"), ("3e-2", "0", "0"), ("1e-1", "0", "0"), ("3e-3", "0.9", "0"),
            ("1e-2", "0.9", "0"), ("3e-2", "0", "1e-2"), ("1e-1", "0", "3e-3"), ("3e-2", "0.9", "0"),
        )),
    )),
    Method("muon", "Muon, AdamW for embeddings, head and vectors", _grid(
        *(f"{LR}{lr} {DECAY}{decay}" for lr in ("1e-2", "2e-2", "3e-2", "5e-2") for decay in ("0.3", "0.6")),
    )),
]  # fmt: skip


class Book:
    """The results on disk."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = (
            json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        )

    def run(
        self, method: Method, precision: str, settings: tuple[str, ...], seed: int, cap: int, task: str = "mul"
    ) -> dict[str, Any]:  # fmt: skip
        key = _key(method, precision, task, settings, seed)
        known = self.found.get(key)
        if known is not None and (known["reached"] or known["steps"] >= cap):
            return known
        exact = ("quantizer=null",) if precision == "fp32" else ()
        named = (*settings, *exact, f"data.with.operation={task}")
        row = Row(method.name, method.title, f"grokking/{method.name}", named, cap)
        try:
            figures = run_one(row, seed)
        except RuntimeError as error:
            if "not finite" not in str(error):
                raise
            figures = {"steps": cap, "reached": False, "cpu_seconds": None, "accuracy": None}
        stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        self.found = {**stored, key: figures}
        RESULTS.write_text(json.dumps(self.found, indent=1, sort_keys=True) + "\n")
        print(key, figures, flush=True)
        return figures

    def tuned(self, method: Method, precision: str) -> tuple[str, ...]:
        """The best settings of a method by the rule above; runs what is missing."""
        return chosen(
            method.grid,
            lambda settings, seed: _steps(
                self.run(method, precision, settings, seed, TUNING_CAP), TUNING_CAP
            ),
        )


def chosen(
    grid: Sequence[tuple[str, ...]], steps: Callable[[tuple[str, ...], int], float]
) -> tuple[str, ...]:
    """The settings that the rule at the top of this file chooses.

    Args:
        grid: the settings that are tried.
        steps: of settings and a seed.
    """
    first = {settings: steps(settings, 100) for settings in grid}
    best = min(first.values())
    near = sorted(
        (count, order) for order, count in enumerate(first.values()) if count <= 1.5 * best
    )
    finalists = [grid[order] for _, order in near[:3]]
    return min(finalists, key=lambda settings: first[settings] + steps(settings, 101))


def _steps(figures: dict[str, Any], cap: int) -> float:
    return float(figures["steps"]) if figures["reached"] else float(cap)


def median_steps(figures: list[dict[str, Any]]) -> float:
    """Over the seeds; not reached is endless."""
    return statistics.median(
        float(each["steps"]) if each["reached"] else float("inf") for each in figures
    )


def known_choice(
    found: dict[str, dict[str, Any]], method: Method, precision: str
) -> tuple[str, ...] | None:
    """What was chosen, when all the tuning runs that it takes are there."""

    def steps(settings: tuple[str, ...], seed: int) -> float:
        return _steps(found[_key(method, precision, "mul", settings, seed)], TUNING_CAP)

    try:
        return chosen(method.grid, steps)
    except KeyError:
        return None


def _key(method: Method, precision: str, task: str, settings: tuple[str, ...], seed: int) -> str:
    return f"{method.name}/{precision}/{task}/{' '.join(settings)}/{seed}"


def table(found: dict[str, dict[str, Any]], precision: str, task: str) -> list[str]:
    """The table of one precision and task as Markdown; methods that were not run are left out."""
    rows: list[tuple[float, str]] = []
    for method in METHODS:
        settings = known_choice(found, method, precision)
        if settings is None:
            continue
        runs = [found.get(_key(method, precision, task, settings, seed)) for seed in SEEDS]
        whole = [each for each in runs if each is not None]
        if len(whole) < len(runs):
            continue
        shown = " / ".join(str(each["steps"]) if each["reached"] else "never" for each in whole)
        median = median_steps(whole)
        spent = [each["cpu_seconds"] for each in whole if each["reached"]]
        seconds = f"{statistics.median(spent):.0f}" if len(spent) == len(whole) else "-"
        words = ", ".join(_short(each) for each in settings)
        steps = f"{median:.0f}" if median != float("inf") else "not in 4000"
        rows.append((median, f"| {method.title} | {words} | {shown} | {steps} | {seconds} |"))
    if not rows:
        return []
    head = "| method | settings found | steps to 95 %, seeds 0 - 4 | median | CPU s, median |"
    return [
        head,
        "|---|---|---|---|---|",
        *(row for _, row in sorted(rows, key=lambda row: row[0])),
    ]


def _short(setting: str) -> str:
    name, _, value = setting.partition("=")
    return f"{name.rpartition('.')[2]} {value}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="names of methods")
    parser.add_argument("--precision", nargs="*", default=PRECISIONS)
    parser.add_argument("--tasks", action="store_true", help="division and addition too")
    options = parser.parse_args()
    book = Book()
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    methods = [each for each in METHODS if not options.only or each.name in options.only]
    for precision in options.precision:
        medians: dict[str, float] = {}
        tuned = {method.name: book.tuned(method, precision) for method in methods}
        for seed in SEEDS:  # seeds outside, so that the machine's moods meet all methods alike
            for method in methods:
                _ = book.run(method, precision, tuned[method.name], seed, CAP)
        for method in methods:
            runs = [book.run(method, precision, tuned[method.name], seed, CAP) for seed in SEEDS]
            medians[method.name] = median_steps(runs)
        if not options.tasks:
            continue
        best = sorted(medians, key=medians.__getitem__)[:3]
        for method in methods:
            if method.name not in best and not method.yardstick:
                continue
            for task in OTHER_TASKS:
                for seed in SEEDS:
                    _ = book.run(method, precision, tuned[method.name], seed, CAP, task)


if __name__ == "__main__":
    main()
