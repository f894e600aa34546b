"""Published figures come from the files that the benchmarks wrote, none is typed by hand."""

from __future__ import annotations

import json
import statistics
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


def test_the_papers_pipeline_reproduces_the_paper() -> None:
    found = json.loads((ROOT / "docs/results/grokking.json").read_text())
    runs = [found[f"paper_ema/{seed}"] for seed in range(5)]
    assert all(run["reached"] for run in runs)
    assert statistics.median(run["steps"] for run in runs) <= 1100
    assert found["paper_ma/0"]["steps"] <= 900
