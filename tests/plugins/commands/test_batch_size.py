"""The batch-size finder: what is tried, what is recommended, and that nothing is left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from forge_kernel.cli import main
from forge_plugins.batch_sizes.measurement import Measurement, recommended, search


def script(rates: dict[int, float | str]) -> Any:
    def measure(size: int) -> Measurement:
        rate = rates[size]
        if isinstance(rate, str):
            return Measurement(size, rate)  # type: ignore[arg-type]
        return Measurement(size, "measured", rate, size / rate, 1000 * size)

    return measure


@pytest.mark.parametrize(
    ("rates", "tried", "best"),
    [
        ({1: 10.0, 2: 20.0, 4: 40.0, 8: "memory"}, [1, 2, 4, 8], 4),
        ({1: 10.0, 2: 20.0, 4: "data"}, [1, 2, 4], 2),
        ({1: 10.0, 2: 20.0, 4: 20.2, 8: 20.4, 16: 99.0}, [1, 2, 4, 8], 2),
        ({1: 10.0, 2: 9.0, 4: 30.0, 8: 20.0, 16: 20.0}, [1, 2, 4, 8, 16], 4),
        ({1: "memory"}, [1], None),
    ],
)
def test_sizes_double_until_nothing_is_gained(
    rates: dict[int, float | str], tried: list[int], best: int | None
) -> None:
    """Planted faults: the largest size for the smallest of the fastest; an end at one idle size."""
    found = list(search(script(rates), 1))
    assert [each.batch_size for each in found] == tried
    chosen = recommended(found)
    assert (None if chosen is None else chosen.batch_size) == best


def test_it_ends_at_the_largest_size_asked_for() -> None:
    rates: dict[int, float | str] = {size: float(size) for size in (3, 6, 12, 24)}
    assert [each.batch_size for each in search(script(rates), 3, 20)] == [3, 6, 12]


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """In this process: its trials, processes of their own, need not import torch each."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["forge", "batch-size", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return subprocess.CompletedProcess(arguments, ended.value.code or 0, *capfd.readouterr())

    return run


@pytest.mark.spec("K9")
def test_the_command_measures_until_the_samples_end(command: Command) -> None:
    done = command("smoke", "--smallest", "1024", "--seconds", "0", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["key"] == "data.with.batch_size"
    assert found["recommended"] == 1024
    first, last = found["sizes"]
    assert (first["batch_size"], first["outcome"]) == (1024, "measured")
    assert first["samples_per_second"] == pytest.approx(1024 / first["step_seconds"])
    assert first["peak_bytes"] > 50 * 2**20
    assert (last["batch_size"], last["outcome"], last["step_seconds"]) == (2048, "data", None)


@pytest.mark.spec("K9")
def test_a_trial_beyond_the_memory_is_ended_and_leaves_no_process_behind(
    command: Command,
) -> None:
    """Planted fault: the child goes on when the limit is reached."""
    before = {process.pid for process in psutil.process_iter()}
    done = command("smoke", "--memory", "0.1")
    assert done.returncode == 3
    assert "16  not enough memory" in done.stdout
    left = [
        process.pid
        for process in psutil.process_iter()
        if process.pid not in before and "batch_sizes" in " ".join(_words(process))
    ]
    assert left == []


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_a_pipeline_that_does_not_train_says_why(command: Command) -> None:
    done = command("smoke", "--set", "model={use: python_class}", "--largest", "16")
    assert done.returncode == 3
    assert "does not train with data.with.batch_size=16" in done.stderr


def test_a_key_that_is_no_setting_is_refused_before_anything_is_tried(command: Command) -> None:
    done = command("smoke", "--key", "data.with.batchsize")
    assert done.returncode == 2
    assert "did you mean" in done.stderr
