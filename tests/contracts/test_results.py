"""Published metrics come from the files that the benchmarks wrote, none is typed by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_and_the_readme_say_what_the_benchmarks_wrote() -> None:
    """Mend with: python benchmarks/results.py."""
    done = subprocess.run(
        [sys.executable, "benchmarks/results.py", "--check"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_showcase_reached_its_target_on_all_five_seeds() -> None:
    found = json.loads((ROOT / "docs/results/grokking.json").read_text())
    runs = [found[f"ternary_showcase/{seed}"] for seed in range(5)]
    assert all(run["reached"] and run["accuracy"] >= 0.95 for run in runs)


def test_the_papers_pipeline_reaches_its_target_on_all_five_seeds() -> None:
    found = json.loads((ROOT / "docs/results/grokking.json").read_text())
    assert all(found[f"paper_ema/{seed}"]["reached"] for seed in range(5))
    assert found["paper_ma/0"]["reached"]


def test_the_page_admits_where_the_filter_does_not_help() -> None:
    """The sentence is computed: it follows the metrics whichever way they fall."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import results
    finally:
        sys.path.pop(0)
    run = {"reached": True, "cpu_seconds": 1.0}
    metrics = {
        f"{name}/{seed}": {**run, "steps": steps}
        for name, steps in (("ternary_showcase", 900), ("ternary_2e3", 600))
        for seed in range(5)
    }
    assert "0.67 x: it does not help" in "\n".join(results.reading(metrics))
    for seed in range(5):
        metrics[f"ternary_showcase/{seed}"]["steps"] = 300
    assert "2.00 x: it helps" in "\n".join(results.reading(metrics))
