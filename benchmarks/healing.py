"""A network trained in full precision, then made ternary: how near it comes, three seeds.

`pipelines/small_llm.yaml` trains a Llama of 0.3 M weights for 300 steps; `pipelines/heal_llm.yaml`
heals it in 150, half of them. Each row leaves one part of that recipe out; the plain estimator has
the same steps, rate and schedule, and neither blend nor teacher. The figure is validation
perplexity, beside that of the network in full precision that the row of the same seed began with;
that network has not converged, so the last row says what the further steps alone give it.
Each run is a process of its own with one thread; results are kept as JSON and runs that are there
already are not repeated.

Spec: D12
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "healing.json"
SEEDS: Final = (0, 1, 2)
STEPS: Final = 300
BLEND: Final = "quantizer={use: bitnet, with: {warmup_start: 5, warmup_steps: 50}}"
PLAIN_LOSS: Final = "loss={use: language_model}"
ROWS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "recipe": ("the recipe of heal_llm", ()),
    "no_start": ("without steps in full precision first", ("quantizer.with.warmup_start=0",)),
    "no_blend": ("without the blend", ("quantizer={use: bitnet}",)),
    "no_teacher": ("without the teacher", (PLAIN_LOSS,)),
    "no_decay": (
        "without the decay of the rate",
        ("schedule={use: linear_warmup, with: {warmup_steps: 10}}",),
    ),
    "plain": (
        "plain estimator: neither blend nor teacher",
        ("quantizer={use: bitnet}", PLAIN_LOSS),
    ),
    "trained_on": ("not ternary: fp32 trained on", ("quantizer=null", PLAIN_LOSS)),
}

_CHILD = """
import json, sys, time
from forge_kernel import load_pipeline, run
began = []
def watch(event):
    if event["event"] == "start":
        began.append(time.process_time())
result = run(load_pipeline(sys.argv[1], sys.argv[3:]), output_dir=sys.argv[2], on_progress=watch, quiet=True)
print(json.dumps({"perplexity": result.final["validation_perplexity"], "steps": result.steps, "cpu_seconds": round(time.process_time() - began[0], 2)}))
"""


def _process(pipeline: str, folder: str, *settings: str) -> dict[str, Any]:
    """One run in a process of its own."""
    common = ("run.device=cpu", "run.save_every=100000", "run.validate_every=100000", "observers=[]")  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, pipeline, folder, *common, *settings],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{pipeline} {settings}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


class Results:
    """What has been measured; each run is on the disk as soon as it is over."""

    def __init__(self) -> None:
        self.runs: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        self._lock = Lock()

    def take(self, name: str, result: dict[str, Any]) -> None:
        """Keep a run's result."""
        with self._lock:
            self.runs[name] = result
            print(name, result, flush=True)
            RESULTS.write_text(json.dumps(self.runs, indent=1, sort_keys=True) + "\n")


def run_seed(seed: int, results: Results) -> None:
    """The network in full precision, then every row that begins with it."""
    missing = [name for name in ROWS if f"{name}/{seed}" not in results.runs]
    if not missing:
        return
    with tempfile.TemporaryDirectory() as place:
        first = f"{place}/first"
        base = _process("small_llm", first, f"run.seed={seed}", f"run.max_steps={STEPS}")
        results.take(f"fp32/{seed}", base)
        model = f"{first}/exports/transformers"
        for name in missing:
            settings = (
                f"run.seed={seed}", f"run.max_steps={STEPS // 2}", f"model.with.path={model}",
                f"data.with.tokenizer_file={model}", BLEND, "schedule.with.warmup_steps=10",
                "exporters=[]", *ROWS[name][1],
            )  # fmt: skip
            results.take(f"{name}/{seed}", _process("heal_llm", f"{place}/{name}", *settings))


def whole_seeds(results: dict[str, Any]) -> list[int]:
    """The seeds of which every row has been run."""
    return [seed for seed in SEEDS if all(f"{name}/{seed}" in results for name in ("fp32", *ROWS))]


def table(results: dict[str, Any]) -> list[str]:
    """As Markdown: perplexities by seed, and the median ratio to full precision."""
    seeds = whole_seeds(results)
    if not seeds:
        return []
    lines = [
        f"| validation perplexity | seeds {', '.join(map(str, seeds))} | by that of fp32, median | CPU s |",
        "|---|---|---|---|",
    ]
    titles = {"fp32": f"fp32, {STEPS} steps"} | {
        name: f"{STEPS // 2} further steps, {title}" for name, (title, _) in ROWS.items()
    }
    for name, title in titles.items():
        runs = [results[f"{name}/{seed}"] for seed in seeds]
        shares = [
            run["perplexity"] / results[f"fp32/{seed}"]["perplexity"]
            for run, seed in zip(runs, seeds, strict=True)
        ]
        shown = " / ".join(f"{item['perplexity']:.3f}" for item in runs)
        seconds = statistics.median(item["cpu_seconds"] for item in runs)
        lines.append(f"| {title} | {shown} | {statistics.median(shares):.3f} | {seconds:.0f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=1, help="seeds at the same time")
    options = parser.parse_args()
    results = Results()
    with ThreadPoolExecutor(options.workers) as pool:
        for future in [pool.submit(run_seed, seed, results) for seed in SEEDS]:
            future.result()
    print("\n".join(table(results.runs)))


if __name__ == "__main__":
    main()
