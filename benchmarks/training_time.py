"""Training time to the same accuracy: half of the baseline's, and what each part brings.

The baseline is the fp32 network with AdamW, tuned; every other recipe had the same tuning budget
(`benchmarks/accelerators.py`, whose choice is used here) and runs in the same loop on the same
data to 95 % validation accuracy. CPU seconds of the training process, one thread, recipes
interleaved seed by seed, so that the machine's moods meet all alike; the ratio is the median over
the seeds of the recipe's seconds by the baseline's. Results are kept as JSON; runs that are there
are not repeated.

Spec: K1
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerators
from grokking import Row, run_one

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "training_time.json"
SEEDS = range(5)
CAP = 4000


@dataclass(frozen=True)
class Recipe:
    """One line of the table."""

    name: str
    title: str
    method: str
    precision: str  # of the weights, as the tuning names it
    arithmetic: str = "exact"
    autocast: str = "fp32"


RECIPES = [
    Recipe("baseline", "fp32, AdamW at its tuned rate: the baseline", "adamw", "fp32"),
    Recipe("filter", "fp32, Grokfast filter and AdamW, tuned together", "grokfast_adamw", "fp32"),
    Recipe("bf16", "bf16 (autocast), AdamW", "adamw", "fp32", autocast="bf16"),
    Recipe("muon", "fp32, Muon", "muon", "fp32"),
    Recipe("muon_bf16", "bf16 (autocast), Muon", "muon", "fp32", autocast="bf16"),
    Recipe("ternary", "ternary, AdamW", "adamw", "ternary"),
    Recipe("ternary_filter", "ternary, Grokfast filter and AdamW, tuned together", "grokfast_adamw", "ternary"),
    Recipe("ternary_int8", "ternary in int8 arithmetic, AdamW", "adamw", "ternary", "int8"),
    Recipe("ternary_int8_bf16", "ternary in int8, bf16 on the way back, AdamW", "adamw", "ternary", "int8_bf16_backward"),
    Recipe("ternary_muon", "ternary, Muon", "muon", "ternary"),
    Recipe("ternary_muon_int8", "ternary in int8 arithmetic, Muon", "muon", "ternary", "int8"),
    Recipe("ternary_muon_int8_bf16", "ternary in int8, bf16 on the way back, Muon", "muon", "ternary", "int8_bf16_backward"),
]  # fmt: skip


def settings_of(recipe: Recipe) -> tuple[str, ...]:
    """What the tuning found, and the arithmetic."""
    result = json.loads(accelerators.RESULTS.read_text())
    method = next(each for each in accelerators.METHODS if each.name == recipe.method)
    chosen = accelerators.known_choice(result, method, recipe.precision)
    if chosen is None:
        raise SystemExit(f"{recipe.method} is not tuned: run benchmarks/accelerators.py first")
    quantizer = (
        "quantizer=null"
        if recipe.precision == "fp32"
        else f"quantizer.with.arithmetic={recipe.arithmetic}"
    )
    return (*chosen, quantizer, f"run.precision={recipe.autocast}")


def ratios(found: dict[str, dict[str, Any]], name: str) -> list[float] | None:
    """CPU seconds by the baseline's, seed by seed; None when a run is missing or fell short."""
    pairs = [(found.get(f"{name}/{seed}"), found.get(f"baseline/{seed}")) for seed in SEEDS]
    if any(item is None or two is None or not item["reached"] for item, two in pairs):
        return None
    return [item["cpu_seconds"] / two["cpu_seconds"] for item, two in pairs if item and two]


def table(found: dict[str, dict[str, Any]]) -> list[str]:
    """The table as Markdown."""
    lines = [
        "| recipe | steps, seeds 0 - 4 | CPU s, median | ms a step | time by the baseline's |",
        "|---|---|---|---|---|",
    ]
    for recipe in RECIPES:
        runs = [found[key] for seed in SEEDS if (key := f"{recipe.name}/{seed}") in found]
        share = ratios(found, recipe.name)
        if len(runs) < len(SEEDS):
            continue
        steps = " / ".join(str(each["steps"]) if each["reached"] else "never" for each in runs)
        seconds = statistics.median(each["cpu_seconds"] for each in runs)
        step = statistics.median(each["cpu_seconds"] / each["steps"] * 1e3 for each in runs)
        shown = "-" if share is None else (
            f"**{statistics.median(share):.2f}** ({min(share):.2f} - {max(share):.2f})"
        )  # fmt: skip
        lines.append(f"| {recipe.title} | {steps} | {seconds:.0f} | {step:.0f} | {shown} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="names of recipes")
    options = parser.parse_args()
    result = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for seed in SEEDS:
        for recipe in RECIPES:
            key = f"{recipe.name}/{seed}"
            if key in result or (options.only and recipe.name not in options.only):
                continue
            row = Row(
                recipe.name, recipe.title, f"grokking/{recipe.method}", settings_of(recipe), CAP
            )
            result[key] = run_one(row, seed)
            print(key, result[key], flush=True)
            RESULTS.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    print("\n".join(table(result)))


if __name__ == "__main__":
    main()
