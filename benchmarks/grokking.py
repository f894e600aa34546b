"""Steps and CPU seconds to 95 % validation accuracy on multiplication modulo 97.

Each run is a pipeline of this repository with a few settings changed, in a process of its own with
one thread; CPU seconds are that process's, from the first step to the last. Results are kept as
JSON, one entry a run, and runs that are there already are not repeated; the table of
`docs/results.md` is written from them.

Spec: E14, K1
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "grokking.json"
SEEDS = range(5)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    title: str
    pipeline: str
    settings: tuple[str, ...] = ()
    max_steps: int = 4000
    seeds: tuple[int, ...] = tuple(SEEDS)


def _adamw(rate: str, *, fp32: bool, filtered: str | None) -> tuple[str, ...]:
    settings = [f"optimizer.with.lr={rate}"]
    settings += ["quantizer=null", "exporters=[{use: state_dict}]"] if fp32 else []
    if filtered is None:
        settings.append("gradients=[]")
    else:
        alpha, amount = filtered.split("/")
        settings += [f"gradients[0].with.alpha={alpha}", f"gradients[0].with.lambda_reg={amount}"]
    return tuple(settings)


ROWS = [
    Row("ternary_showcase", "**ternary, AdamW 2e-3, filter 0.9 / 1 (the showcase)**", "bitnet_grokfast"),
    Row("ternary_2e3", "ternary, AdamW 2e-3, no filter", "bitnet_grokfast", _adamw("2e-3", fp32=False, filtered=None)),
    Row("ternary_1e3_filter", "ternary, AdamW 1e-3, filter 0.9 / 2", "bitnet_grokfast", _adamw("1e-3", fp32=False, filtered="0.9/2.0")),
    Row("ternary_1e3", "ternary, AdamW 1e-3, no filter", "bitnet_grokfast", _adamw("1e-3", fp32=False, filtered=None)),
    Row("ternary_3e3", "ternary, AdamW 3e-3 (tuned rate), no filter", "bitnet_grokfast", _adamw("3e-3", fp32=False, filtered=None)),
    Row("fp32_2e3_filter", "fp32, AdamW 2e-3, filter 0.9 / 1", "bitnet_grokfast", _adamw("2e-3", fp32=True, filtered="0.9/1.0")),
    Row("fp32_2e3", "fp32, AdamW 2e-3, no filter", "bitnet_grokfast", _adamw("2e-3", fp32=True, filtered=None)),
    Row("fp32_1e3", "fp32, AdamW 1e-3, no filter", "bitnet_grokfast", _adamw("1e-3", fp32=True, filtered=None)),
    Row("fp32_3e3", "**fp32, AdamW 3e-3 (tuned rate), no filter: the honest baseline**", "bitnet_grokfast", _adamw("3e-3", fp32=True, filtered=None)),
    Row("paper_ema", "the paper repeated: fp32, its network and random numbers, Adam, L2 0.005, EMA 0.98 / 2", "grokfast_paper"),
    Row("paper_ma", "the same with MA 100 / 5, L2 0.01", "grokfast_paper",
        ("gradients[0].with.filter=ma", "gradients[0].with.lambda_reg=5.0", "optimizer.with.weight_decay=0.01"), seeds=(0,)),
]  # fmt: skip

_CHILD = """
import json, sys, time
from forge_kernel import load_pipeline, run
began = []
def watch(event):
    if event["event"] == "start":
        began.append(time.process_time())
result = run(load_pipeline(sys.argv[1], sys.argv[3:]), output_dir=sys.argv[2], on_progress=watch, quiet=True)
reached = result.stop_reason.startswith("accuracy")
print(json.dumps({
    "steps": result.steps, "reached": reached, "cpu_seconds": round(time.process_time() - began[0], 2),
    "accuracy": result.final["validation_accuracy"],
}))
"""


def run_one(row: Row, seed: int) -> dict[str, object]:
    """One run in a fresh process; its figures."""
    settings = [
        *row.settings,
        f"run.seed={seed}",
        f"run.max_steps={row.max_steps}",
        "run.save_every=null",
        "observers=[]",
    ]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", _CHILD, row.pipeline, f"{folder}/run", *settings]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{row.name}, seed {seed}: {done.stderr[-2000:]}")
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


def table(results: dict[str, dict[str, object]]) -> str:
    """The table as Markdown."""
    lines = [
        "| run | steps to 95 %, seeds 0, 1, ... | median | CPU s, median |",
        "|---|---|---|---|",
    ]
    for row in ROWS:
        result = [results.get(f"{row.name}/{seed}") for seed in row.seeds]
        if not any(result):
            continue
        shown, reached = [], []
        for item in result:
            if item is None:
                shown.append("-")
            elif item["reached"]:
                shown.append(str(item["steps"]))
                reached.append(item)
            else:
                shown.append(f"not in {item['steps']}")
        complete = all(item is not None for item in result)
        missed = len(shown) - len(reached)
        steps = [float(str(item["steps"])) for item in reached] + [float("inf")] * missed
        median = statistics.median(steps) if complete else float("inf")
        whole = complete and not missed
        spent = [float(str(item["cpu_seconds"])) for item in reached]
        seconds = f"{statistics.median(spent):.0f}" if whole else "-"
        lines.append(
            f"| {row.title} | {' / '.join(shown)} | "
            f"{f'{median:.0f}' if median != float('inf') else '-'} | "
            f"{seconds} |"
        )
    lines += [
        "",
        "Published, same task: Adam without decay 39,890 steps (arXiv 2405.20233, one run); "
        "AdamW with decay 0.01 35,040 (median of 200 seeds, the cliptogrok repository).",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="names of rows")
    parser.add_argument("--seeds", nargs="*", type=int)
    parser.add_argument("--table", action="store_true", help="print the table, run nothing")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not options.table:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        for row in ROWS:
            if options.only and row.name not in options.only:
                continue
            for seed in row.seeds:
                key = f"{row.name}/{seed}"
                if key in results or (options.seeds and seed not in options.seeds):
                    continue
                results[key] = run_one(row, seed)
                print(key, results[key], flush=True)
                stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
                stored.update(results)
                RESULTS.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
