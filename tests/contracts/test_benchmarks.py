"""Scripts of benchmarks/ that measure nothing here still say so, and average as they claim."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a device to measure")
def test_without_a_device_utilization_is_said_to_be_unmeasured_and_no_metric_is_given() -> None:
    """Red when memory in use or a constant takes the counter's place."""
    done = subprocess.run(
        [sys.executable, "benchmarks/utilization.py"], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "there is no CUDA device" in done.stderr
    assert "not measured" in done.stderr
    assert done.stdout == ""


def test_utilization_is_weighed_by_time_over_the_span_alone() -> None:
    share = script("utilization").busy_share
    samples = [(0.0, 100.0), (1.0, 50.0), (3.0, 100.0), (4.0, 0.0)]
    assert share(samples, 0.0, 4.0) == pytest.approx((0.5 + 2.0 + 0.0) / 4)
    assert share(samples, 1.0, 3.0) == pytest.approx(1.0)
    assert share(samples, 0.5, 1.5) == pytest.approx((0.25 + 0.5) / 1.0)
    assert share(samples, 0.0, 8.0) is None  # half of it was not sampled
    assert share([], 0.0, 1.0) is None


def test_the_workload_of_utilization_is_a_pipeline_that_can_be_planned() -> None:
    from forge_kernel.planning.pipeline_file import load_pipeline
    from forge_kernel.planning.plan import plan

    plan(load_pipeline("char_llama_gguf", [*script("utilization").SETTINGS, "run.max_epochs=2"]))


def test_events_are_read_off_whatever_line_they_come_in() -> None:
    seen = script("monitors").Seen()
    seen.take("step 7: number 3 at 100.5")
    assert seen.seconds.keys() == {3}
    before = dict(seen.seconds)
    seen.take('{"message": "number 3 at 100.5"}')  # the first sight counts
    assert seen.seconds == before
