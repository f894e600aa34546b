"""Validation figures of low-bit networks beside fp32 at equal steps, three seeds.

Text: the pipeline `char_llama_gguf`, 200 steps, validation loss. Digits: the pipeline `digits_npy`,
accuracy. Every row has the same settings but for the quantizer; the distilled row's teacher is the
fp32 row of the same seed. On the text, fp32 and ternary are first tried at four rates each, on a
seed of its own (`--rates`), and fp32 has a row at the best of them. Each run is a process of its own
with one thread; results are kept as JSON and runs that are there already are not repeated.

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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "quality.json"
SEEDS = (0, 1, 2)
RATES = ("1e-3", "2e-3", "4e-3", "8e-3")
RATES_SEED = 100


@dataclass(frozen=True)
class Task:
    """What is trained, and the figure that is compared."""

    title: str
    pipeline: str
    figure: str
    settings: tuple[str, ...]


TASKS = {
    "text": Task(
        "text, validation loss", "char_llama_gguf", "loss",
        ("run.max_steps=200", "run.validate_every=200"),
    ),
    "digits": Task("digits, accuracy", "digits_npy", "accuracy", ("callbacks=[]",)),
}  # fmt: skip

NORMS = '["*.o_proj", "*.down_proj", "*.attention.output", "*.contract", "*layers.2"]'
TEACHER = "quantizer=null"
ROWS = {
    "fp32": ("fp32", (TEACHER,)),
    "fp32_own_rate": ("fp32 at its own rate", (TEACHER, "optimizer.with.lr=RATE")),
    "ternary": ("ternary (1.58 bits)", ("quantizer={use: bitnet}",)),
    "ternary_warmup": (
        "ternary, blended in over 50 steps",
        ("quantizer={use: bitnet, with: {warmup_steps: 50}}",),
    ),
    "ternary_sub_norm": (
        "ternary, a norm before each output projection (SubLN)",
        (f"quantizer={{use: bitnet, with: {{sub_norm: {NORMS}}}}}",),
    ),
    "ternary_distilled": (
        "ternary, half of the loss from the fp32 network",
        ("quantizer={use: bitnet}", "loss={use: distillation, with: {teacher: TEACHER}}"),
    ),
    "ternary_int8": (
        "ternary, int8 arithmetic",
        ("quantizer={use: bitnet, with: {arithmetic: int8}}",),
    ),
    "binary": ("binary (1 bit)", ("quantizer={use: bitnet, with: {weight_bits: 1}}",)),
}

_CHILD = """
import json, sys, time
from forge_kernel import load_pipeline, run
began = []
def watch(event):
    if event["event"] == "start":
        began.append(time.process_time())
result = run(load_pipeline(sys.argv[1], sys.argv[3:]), output_dir=sys.argv[2], on_progress=watch, quiet=True)
found = {name.removeprefix("validation_"): value for name, value in result.final.items() if name.startswith("validation_")}
print(json.dumps({"figures": found, "cpu_seconds": round(time.process_time() - began[0], 2)}))
"""


def run_one(task: Task, settings: tuple[str, ...], seed: int) -> dict[str, object]:
    """One run in fresh processes (the teacher first, where one is asked for); its figures."""
    with tempfile.TemporaryDirectory() as folder:
        if any("TEACHER" in setting for setting in settings):
            _ = _process(task, (TEACHER,), seed, f"{folder}/teacher")
            settings = tuple(item.replace("TEACHER", f"{folder}/teacher") for item in settings)
        return _process(task, settings, seed, f"{folder}/run")


def _process(task: Task, settings: tuple[str, ...], seed: int, folder: str) -> dict[str, object]:
    common = (f"run.seed={seed}", "run.save_every=100000", "observers=[]", "exporters=[]")
    command = [sys.executable, "-c", _CHILD, task.pipeline, folder]
    done = subprocess.run(
        [*command, *task.settings, *settings, *common],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{task.pipeline} {settings}, seed {seed}: {done.stderr[-2000:]}")
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


def table(results: dict[str, dict[str, object]]) -> list[str]:
    """The tables as Markdown: a row's figures by seed, and its median beside that of fp32."""
    lines: list[str] = []
    for key, task in TASKS.items():
        lines += ["", f"| {task.title} | seeds {', '.join(map(str, SEEDS))} | median | against fp32 | CPU s |", "|---|---|---|---|---|"]  # fmt: skip
        base: float | None = None
        for name, (title, _) in ROWS.items():
            result = [
                results[f"{key}/{name}/{seed}"]
                for seed in SEEDS
                if f"{key}/{name}/{seed}" in results
            ]
            if len(result) < len(SEEDS):
                continue
            values = [float(item["figures"][task.figure]) for item in result]  # type: ignore[index]
            median = statistics.median(values)
            base = median if name == "fp32" else base
            seconds = statistics.median(float(str(item["cpu_seconds"])) for item in result)
            beside = "-" if base is None else f"{100 * (median / base - 1):+.1f} %"
            shown = " / ".join(f"{value:.4g}" for value in values)
            lines.append(f"| {title} | {shown} | {median:.4g} | {beside} | {seconds:.0f} |")
    return lines


def best_rate(results: dict[str, dict[str, object]], row: str) -> str | None:
    """The rate of the least validation loss on the text; None: not all were tried."""
    tried = {rate: results.get(f"text/{row}@{rate}/{RATES_SEED}") for rate in RATES}
    if None in tried.values():
        return None
    return min(RATES, key=lambda rate: tried[rate]["figures"]["loss"])  # type: ignore[index]


def rates_table(results: dict[str, dict[str, object]]) -> list[str]:
    """The tried rates as Markdown; nothing where not all were tried."""
    if best_rate(results, "fp32") is None or best_rate(results, "ternary") is None:
        return []
    lines = ["", f"| text, validation loss, seed {RATES_SEED} | lr {' | '.join(RATES)} |", "|---|" + "---|" * len(RATES)]  # fmt: skip
    for row in ("fp32", "ternary"):
        losses = [results[f"text/{row}@{rate}/{RATES_SEED}"]["figures"]["loss"] for rate in RATES]  # type: ignore[index]
        lines.append(f"| {ROWS[row][0]} | {' | '.join(f'{loss:.3f}' for loss in losses)} |")
    return lines


def _plan(results: dict[str, dict[str, object]], rates: bool) -> Iterator[tuple[str, Task, tuple[str, ...], int]]:  # fmt: skip
    """Name, task, settings and seed of each run."""
    if rates:
        for row in ("fp32", "ternary"):
            for rate in RATES:
                setting = (*ROWS[row][1], f"optimizer.with.lr={rate}")
                yield f"text/{row}@{rate}/{RATES_SEED}", TASKS["text"], setting, RATES_SEED
        return
    for seed in SEEDS:
        for key, task in TASKS.items():
            for row, (_, settings) in ROWS.items():
                rate = best_rate(results, "fp32") if key == "text" else None
                if any("RATE" in setting for setting in settings) and rate is None:
                    continue
                filled = tuple(item.replace("RATE", str(rate)) for item in settings)
                yield f"{key}/{row}/{seed}", task, filled, seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="task/row")
    parser.add_argument("--rates", action="store_true", help="only try the rates, on the text")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for entry, task, settings, seed in _plan(results, options.rates):
        if entry in results or (options.only and entry.rsplit("/", 1)[0] not in options.only):
            continue
        results[entry] = run_one(task, settings, seed)
        print(entry, results[entry], flush=True)
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    print("\n".join([*table(results), *rates_table(results)]))


if __name__ == "__main__":
    main()
