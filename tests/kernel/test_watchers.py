"""What only watches cannot end a run, and what ends it loses no step."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
from kernel_parts import SgdPart, make_plugin
from torch import nn

from forge_kernel import resume, run
from forge_kernel.config.pipeline import PipelineConfig
from forge_kernel.contract.hookspecs import hookimpl
from forge_kernel.contract.plugin import Kind, PluginInfo
from forge_kernel.contract.run_config import RunConfig
from forge_kernel.errors import OwnershipError, RunError
from forge_kernel.planning.pipeline_file import load_pipeline
from forge_kernel.storage.checkpoint_store import CheckpointStore
from forge_kernel.testing.compare import differences
from forge_kernel.testing.trial import TrialLoss
from forge_kernel.training.guards.ownership import STREAMS
from forge_kernel.training.loaders.in_memory import NoConfig

PLAIN = ("exporters=null", "callbacks=null", "run.max_steps=9")


def smoke(*settings: str) -> Any:
    return load_pipeline("smoke", [*PLAIN, *settings])


def steps(folder: Path) -> list[int]:
    return CheckpointStore(folder / "checkpoints").steps()


WATCHED = {
    "on_batch": lambda self, run, step, batch: self.fail(),
    "on_step_end": lambda self, run, step: self.fail(),
    "on_log": lambda self, run, record: self.fail(),
    "on_validation": lambda self, run, metrics: self.fail(),
    "on_checkpoint": lambda self, run, folder: self.fail(),
    "on_epoch_end": lambda self, run: self.fail(),
    "on_event": lambda self, run, event: self.fail(),
    "on_run_end": lambda self, run, result: self.fail(),
    "log_metrics": lambda self, run, step: self.fail(),
}


ERRORS = [OSError(5, "Input/output error"), BrokenPipeError(), KeyError()]


@pytest.mark.parametrize(
    ("hook", "error"),
    [  # each hook with one error in turn; the other two are deep
        pytest.param(hook, error, marks=[pytest.mark.deep] * (at % len(ERRORS) != number))
        for at, hook in enumerate(WATCHED)
        for number, error in enumerate(ERRORS)
    ],
)
def test_an_observer_that_fails_ends_no_run(tmp_path: Path, hook: str, error: Any) -> None:
    """Red when an observer's error is raised: nothing of the run would be left."""
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise error

    function = WATCHED[hook]
    own = types.FunctionType(function.__code__, function.__globals__)  # it is named after the hook
    plugin = make_plugin("watcher", Kind.OBSERVERS, **{hook: own})
    plugin.fail = fail
    result = run(
        smoke("run.log_every=1", "run.validate_every=2", "run.save_every=1", "data.with.batch_size=256"),
        plugins=[plugin], output_dir=tmp_path / "r", quiet=True,
    )  # fmt: skip
    assert (result.outcome, result.steps) == ("completed", 9)
    assert calls
    if hook not in ("on_event", "on_epoch_end"):
        log = (tmp_path / "r" / "forge.log").read_text()
        assert log.count("watcher failed in ") == 1, log


@pytest.mark.parametrize("hook", ["on_gradients", "on_weights", "on_log"])
def test_an_observer_that_ends_the_program_ends_no_run(tmp_path: Path, hook: str) -> None:
    """Red when `sys.exit` passes, or an observer between gradients and weights cuts the update."""
    functions: dict[str, Any] = {
        "on_gradients": lambda self, run, step: sys.exit(0),
        "on_weights": lambda self, run, step: sys.exit(0),
        "on_log": lambda self, run, record: sys.exit(0),
    }
    plugin = make_plugin("watcher", Kind.OBSERVERS, **{hook: functions[hook]})
    result = run(smoke("run.log_every=1"), plugins=[plugin], output_dir=tmp_path / "r", quiet=True)
    assert (result.outcome, result.steps) == ("completed", 9)
    assert f"watcher failed in {hook}: SystemExit" in (tmp_path / "r" / "forge.log").read_text()


def test_a_plugin_that_ends_the_program_has_failed(tmp_path: Path) -> None:
    """Red when `forge run` ends with the plugin's own exit status, 0 for instance."""

    def on_step_end(self: Any, run: Any, step: Any) -> None:
        if step.number == 5:
            sys.exit(0)

    plugin = make_plugin("culprit", Kind.CALLBACKS, on_step_end=on_step_end)
    words = r"culprit \(handed in\) in on_step_end \(.*\) raised SystemExit"
    with pytest.raises(RunError, match=words):
        run(smoke(), plugins=[plugin], output_dir=tmp_path / "r", quiet=True)
    assert json.loads((tmp_path / "r/result.json").read_text())["outcome"] == "failed"


def test_what_one_listener_is_told_the_next_one_is_told_too(tmp_path: Path) -> None:
    """Red when a listener can write into the metrics that the next one gets."""
    seen: list[float] = []

    def writes(self: Any, run: Any, record: Any) -> None:
        record.metrics["loss"] = -1.0

    def reads(self: Any, run: Any, record: Any) -> None:
        seen.append(record.metrics["loss"])

    plugins = [
        make_plugin("writer", Kind.OBSERVERS, on_log=named(writes, "on_log")),
        make_plugin("reader", Kind.OBSERVERS, on_log=named(reads, "on_log")),
    ]
    run(smoke("run.log_every=1"), plugins=plugins, output_dir=tmp_path / "r", quiet=True)
    assert len(seen) == 9
    assert min(seen) > 0


def named(function: Any, name: str) -> Any:
    """The function under a hook's name."""
    function.__name__ = name
    return function


@pytest.mark.parametrize(
    ("works_at", "last", "told"),
    [((), 10, 1), ((10,), 20, 2), ((10, 12, 22), 30, 4)],
)
def test_an_observer_that_fails_again_and_again_is_left_alone(
    tmp_path: Path, works_at: tuple[int, ...], last: int, told: int
) -> None:
    """After ten failures in a row; the first of each row is told."""
    calls: list[int] = []

    def on_step_end(self: Any, run: Any, step: Any) -> None:
        calls.append(step.number)
        if step.number not in works_at:
            raise OSError("gone")

    plugin = make_plugin("watcher", Kind.OBSERVERS, on_step_end=on_step_end)
    run(smoke("run.max_steps=30"), plugins=[plugin], output_dir=tmp_path / "r", quiet=True)
    assert calls == list(range(1, last + 1))
    assert (tmp_path / "r" / "forge.log").read_text().count("watcher failed in on_step_end") == told


def test_an_observer_that_cannot_begin_is_told_at_once(tmp_path: Path) -> None:
    """Nothing is lost yet: whoever asked for it wants to know."""

    def on_run_start(self: Any, run: Any) -> None:
        raise OSError("no such place")

    plugin = make_plugin("watcher", Kind.OBSERVERS, on_run_start=on_run_start)
    with pytest.raises(OSError, match="no such place"):
        run(smoke(), plugins=[plugin], output_dir=tmp_path / "r", quiet=True)


@pytest.mark.parametrize("hook", ["on_batch", "on_step_end", "on_log"])
def test_an_error_after_the_first_step_keeps_the_last_whole_step(tmp_path: Path, hook: str) -> None:
    """Red when nothing is saved, or what is saved is of a step that was cut."""

    def make(fails: bool) -> Any:
        def fail_at(number: int) -> None:
            if fails and number == 6:
                raise ArithmeticError("planned")

        def on_batch(self: Any, run: Any, step: Any, batch: Any) -> None:
            fail_at(step.number)

        def on_log(self: Any, run: Any, record: Any) -> None:
            fail_at(record.step)

        def on_step_end(self: Any, run: Any, step: Any) -> None:
            fail_at(step.number)

        chosen = {"on_batch": on_batch, "on_step_end": on_step_end, "on_log": on_log}[hook]
        return make_plugin("culprit", Kind.CALLBACKS, **{hook: chosen})

    settings = ("run.log_every=1", "data.with.batch_size=8", "observers=null")
    straight = tmp_path / "straight"
    run(smoke(*settings), plugins=[make(False)], output_dir=straight, quiet=True)
    with pytest.raises(ArithmeticError, match="planned") as error:
        run(smoke(*settings), plugins=[make(True)], output_dir=tmp_path / "r", quiet=True)
    assert "forge resume" in "\n".join(error.value.__notes__)
    assert steps(tmp_path / "r") == [5 if hook == "on_batch" else 6]
    resume(tmp_path / "r", quiet=True, plugins=[make(False)])
    left, right = (CheckpointStore(p / "checkpoints").path(9) for p in (straight, tmp_path / "r"))
    assert differences(left, right) == []


@pytest.mark.parametrize("hook", ["on_gradients", "on_weights"])
def test_an_update_that_is_cut_is_not_kept(tmp_path: Path, hook: str) -> None:
    """Red when weights or memories between two steps are saved as those of one."""

    def cut(self: Any, run: Any, step: Any) -> None:
        if step.number == 6:
            raise ArithmeticError("planned")

    plugin = make_plugin("culprit", Kind.CALLBACKS, **{hook: cut})
    with pytest.raises(ArithmeticError):
        run(smoke("run.save_every=4"), plugins=[plugin], output_dir=tmp_path / "r", quiet=True)
    assert steps(tmp_path / "r") == [4]


def test_a_checkpoint_comes_with_the_time_as_well(tmp_path: Path) -> None:
    """Red when only steps count: a slow step loses hours."""
    seen: list[int] = []

    def on_checkpoint(self: Any, run: Any, folder: Any) -> None:
        seen.append(run.progress.step)

    def slow(self: Any, run: Any, step: Any) -> None:
        time.sleep(0.02)

    plugins = [
        make_plugin("seen", Kind.OBSERVERS, on_checkpoint=on_checkpoint),
        make_plugin("slow", Kind.CALLBACKS, on_step_end=slow),
    ]
    run(smoke("run.save_minutes=0.0003"), plugins=plugins, output_dir=tmp_path / "a", quiet=True)
    assert seen == list(range(1, 10))
    seen.clear()
    run(smoke("run.save_minutes=null"), plugins=plugins, output_dir=tmp_path / "b", quiet=True)
    assert seen == [9]
    left, right = (CheckpointStore(tmp_path / x / "checkpoints").path(9) for x in "ab")
    assert differences(left, right) == []


def begun(folder: Path, *, until: str) -> Any:
    """A run without end in another process; `until`: "steps" or "set-up"."""
    with (folder.parent / "stderr").open("wb") as stderr:
        process = forked.Popen(
            [
                sys.executable, "-m", "forge_kernel", "run", "smoke", "--output-dir", str(folder),
                "--quiet", "--set", "run.max_steps=1000000", "--set", "exporters=null",
            ],
            stdout=subprocess.DEVNULL, stderr=stderr,
        )  # fmt: skip
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        status = folder / "status.json"
        if until == "set-up" and folder.is_dir():
            return process
        try:
            if json.loads(status.read_text())["step"]:
                return process
        except (OSError, ValueError):
            pass
        time.sleep(0.01)
    raise AssertionError("it did not begin")


def heard(name: str) -> None:
    """Under nohup a hang-up is ignored, here and in each process that is started from here."""
    if signal.getsignal(getattr(signal, name)) is signal.SIG_IGN:
        pytest.skip(f"{name} is ignored where these tests were started (nohup)")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_saves_and_stops(tmp_path: Path, name: str) -> None:
    """Red when a signal has its usual meaning: death without a word."""
    number = getattr(signal, name)
    heard(name)
    process = begun(tmp_path / "r", until="steps")
    try:
        process.send_signal(number)
        assert process.wait(timeout=120) == 128 + number
    finally:
        process.kill()
    result = json.loads((tmp_path / "r/result.json").read_text())
    assert result["outcome"] == "stopped"
    assert steps(tmp_path / "r")[-1] == result["steps"]
    assert f"forge: {name}: stopping" in (tmp_path / "stderr").read_text()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_before_the_first_step_is_told_in_one_line(tmp_path: Path, name: str) -> None:
    number = getattr(signal, name)
    heard(name)
    process = subprocess.Popen(
        [sys.executable, "-m", "forge_kernel", "run", "smoke", "--output-dir", "r"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
    )  # fmt: skip
    end = time.monotonic() + 60
    while not (tmp_path / "r").is_dir() and time.monotonic() < end:
        time.sleep(0.002)
    process.send_signal(number)
    said = process.communicate(timeout=120)[0]
    if "stopping after this step" in said:
        pytest.skip("it was in its steps already")
    assert process.returncode == 128 + number
    assert "Traceback" not in said
    assert f"forge: {name}: ended" in said


def test_a_reader_that_goes_away_ends_no_run(tmp_path: Path) -> None:
    """`forge run ... 2>&1 | head -1`: red when the bar's broken pipe ends the training."""
    read, write = os.pipe()
    process = forked.Popen(
        [
            sys.executable, "-m", "forge_kernel", "run", "smoke", "--output-dir",
            str(tmp_path / "r"), "--set", "run.max_steps=60", "--set", "run.log_every=1",
        ],
        stdout=write, stderr=write,
    )  # fmt: skip
    os.close(write)
    assert os.read(read, 10)
    os.close(read)
    assert process.wait(timeout=120) == 0
    assert json.loads((tmp_path / "r/result.json").read_text())["outcome"] == "completed"


def trespass(what: str, run: Any) -> None:
    import torch

    if what == "module modes":
        run.model.eval()
    elif what == "progress":
        run.progress.skipped += 1
    elif what == "grad mode":
        torch.set_grad_enabled(False)
    elif what == "python's random stream":
        random.random()
    elif what == "numpy's random stream":
        np.random.rand()
    elif what == "torch's random stream":
        torch.rand(1)
    elif what == "the optimizer's groups":
        run.optimizer.param_groups[0]["weight_decay"] = 0.75
    elif what == "the optimizer's state":
        for memory in run.optimizer.state.values():
            memory["exp_avg"].add_(1.0)
    else:
        os.chdir(os.pardir)


TRESPASSES = [
    "module modes", "progress", "grad mode", "the working folder", "the optimizer's groups",
    "the optimizer's state", *sorted(STREAMS),
]  # fmt: skip


@pytest.mark.parametrize("what", TRESPASSES)
@pytest.mark.parametrize("hook", ["on_step_end", "on_log"])
def test_the_checked_mode_names_who_leaves_a_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, hook: str
) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    functions = {
        "on_step_end": lambda self, run, step: trespass(self.what, run),
        "on_log": lambda self, run, record: trespass(self.what, run),
    }
    plugin = make_plugin("culprit", Kind.CALLBACKS, **{hook: functions[hook]})
    plugin.what = what
    try:
        with pytest.raises(OwnershipError, match=f"culprit wrote {what} in {hook}"):
            run(
                smoke("run.checked=true", "run.log_every=1"),
                plugins=[plugin], output_dir=tmp_path / "r", quiet=True,
            )  # fmt: skip
    finally:
        torch.set_grad_enabled(True)


def test_an_observer_owns_nothing_where_others_may_write(tmp_path: Path) -> None:
    """Red when the hook alone decides: an observer of the gradients could write them."""

    def on_gradients(self: Any, run: Any, step: Any) -> None:
        step.gradients[0].mul_(2.0)

    plugin = make_plugin("culprit", Kind.OBSERVERS, on_gradients=on_gradients)
    with pytest.raises(OwnershipError, match="culprit wrote gradients in on_gradients"):
        run(smoke("run.checked=true"), plugins=[plugin], output_dir=tmp_path / "r", quiet=True)


def test_modules_left_in_evaluation_mode_are_told_once_without_the_checked_mode(
    tmp_path: Path,
) -> None:
    """Red when nobody looks: the run trains on without dropout."""

    def on_validation(self: Any, run: Any, metrics: Any) -> None:
        run.model.eval()

    plugin = make_plugin("culprit", Kind.CALLBACKS, on_validation=on_validation)
    run(
        smoke("run.log_every=1", "run.validate_every=3"),
        plugins=[plugin], output_dir=tmp_path / "r", quiet=True,
    )  # fmt: skip
    log = (tmp_path / "r" / "forge.log").read_text()
    assert log.count("modules are in evaluation mode since training began") == 1
    run(smoke("run.log_every=1"), output_dir=tmp_path / "s", quiet=True)
    assert "evaluation mode" not in (tmp_path / "s" / "forge.log").read_text()


def test_a_signal_in_a_validation_does_not_wait_for_its_end(tmp_path: Path) -> None:
    """Red when a validation is not left; and when the run that goes on does not make up for it."""
    batches: list[int] = []

    class Stop:
        info = PluginInfo(name="stop", kind=Kind.CALLBACKS, config=NoConfig)
        config = NoConfig()

        def __init__(self, at: int) -> None:
            self.at, self.asked = at, False

        def is_set(self) -> bool:
            return self.asked

        @hookimpl
        def compute_outputs(self, run: Any, step: Any, batch: Any) -> Any:
            if not run.active_model.training:
                batches.append(run.progress.step)
                self.asked = self.asked or len(batches) == self.at
            return run.active_model(batch.inputs)

    generator = torch.Generator().manual_seed(1)
    data = [(torch.randn(4, 5, generator=generator), torch.arange(4) % 3) for _ in range(6)]
    settings = RunConfig(max_steps=9, validate_every=3, log_every=3, device="cpu")

    def parts(plugin: Any) -> dict[str, Any]:
        torch.manual_seed(2)
        plugins = [SgdPart(0.1), TrialLoss(), plugin]
        return {"model": nn.Linear(5, 3), "data": (data, data), "plugins": plugins, "quiet": True}

    pipeline = PipelineConfig(run=settings)
    run(pipeline, **parts(Stop(-1)), output_dir=tmp_path / "whole")
    assert batches.count(3) == len(data)
    batches.clear()
    stop = Stop(2)
    result = run(pipeline, **parts(stop), output_dir=tmp_path / "r", cancel=stop)
    assert (result.outcome, result.steps) == ("stopped", 3)
    assert batches == [3, 3]
    assert steps(tmp_path / "r") == [3]
    batches.clear()
    resume(tmp_path / "r", **parts(Stop(-1)))
    assert batches.count(3) == len(data)
    left, right = (CheckpointStore(tmp_path / x / "checkpoints").path(9) for x in ("whole", "r"))
    assert differences(left, right) == []
