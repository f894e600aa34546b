"""A run that stands still: told where, saved, and ended."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
from kernel_parts import make_plugin

from forge_kernel import resume, run
from forge_kernel.contract.plugin import Kind
from forge_kernel.errors import HangError
from forge_kernel.planning.pipeline_file import load_pipeline
from forge_kernel.storage.checkpoint_store import CheckpointReader

PLAIN = ("run.max_steps=9", "observers=null", "exporters=null")


def smoke(*settings: str) -> Any:
    return load_pipeline("smoke", [*PLAIN, *settings])


def asleep() -> None:
    time.sleep(600)


def locked() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def listening() -> None:
    left, right = socket.socketpair()
    with left, right:
        left.recv(1)


def waiting() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        process.wait()
    finally:
        process.kill()
        process.wait()


def counting() -> None:
    while True:
        pass


def joining() -> None:
    thread = threading.Thread(target=time.sleep, args=(600,), daemon=True)
    thread.start()
    thread.join()


def hanging(hang: Callable[[], None], step: int = 4) -> Any:
    def on_batch(self: Any, run: Any, step_: Any, batch: Any) -> None:
        if step_.number == step:
            hang()

    def named(self: Any, run: Any, step: Any, batch: Any) -> None:
        on_batch(self, run, step, batch)

    return make_plugin("sleeper", Kind.CALLBACKS, on_batch=named)


@pytest.mark.parametrize("hang", [asleep, locked, listening, waiting, counting, joining])
def test_a_run_that_stands_still_is_saved_and_ended(
    tmp_path: Path, hang: Callable[[], None]
) -> None:
    """Planted: an error that waits for the sleeper to wake by itself; stacks of one thread."""
    assert threading.current_thread() is threading.main_thread()
    folder = tmp_path / "r"
    with pytest.raises(HangError) as error:
        run(smoke("run.hang_minutes=0.01"), output_dir=folder, quiet=True, plugins=[hanging(hang)])
    assert "sleeper" in "\n".join(error.value.__notes__)
    stacks = (folder / "stacks.txt").read_text()
    assert f"in {hang.__name__}" in stacks
    assert "hang_watch.py" in stacks  # the other threads as well
    assert CheckpointReader(folder / "checkpoints").steps() == [3]
    assert json.loads((folder / "result.json").read_text())["outcome"] == "failed"
    straight = run(smoke(), output_dir=tmp_path / "s", quiet=True)
    resumed = resume(
        folder, ["run.hang_minutes=null"], quiet=True, plugins=[hanging(hang, step=-1)]
    )
    for mine, theirs in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert mine.equal(theirs)


@pytest.mark.parametrize("where", ["on_validation", "data"])
def test_it_is_seen_wherever_the_run_stands(tmp_path: Path, where: str) -> None:
    def on_validation(self: Any, run: Any, metrics: Any) -> None:
        asleep()

    plugins, data, model = [], None, None
    if where == "on_validation":
        plugins = [make_plugin("sleeper", Kind.CALLBACKS, on_validation=on_validation)]
    else:
        import torch

        def batches() -> Any:
            yield torch.zeros(2, 4), torch.zeros(2, dtype=torch.long)
            asleep()

        class Endless:
            def __iter__(self) -> Any:
                return batches()

        data, model = Endless(), torch.nn.Linear(4, 3)
    with pytest.raises(HangError):
        run(
            smoke("run.hang_minutes=0.01", "run.validate_every=1", "callbacks=null"), output_dir=tmp_path / "r",
            quiet=True, plugins=plugins, data=data, model=model,
        )  # fmt: skip
    assert CheckpointReader(tmp_path / "r" / "checkpoints").steps() == [1]


def test_a_slow_run_is_left_alone(tmp_path: Path) -> None:
    """Longer than the limit in all, never in one place. Planted: signs of life not looked at."""

    def on_step_end(self: Any, run: Any, step: Any) -> None:
        time.sleep(0.15)

    slow = make_plugin("slow", Kind.CALLBACKS, on_step_end=on_step_end)
    result = run(
        smoke("run.hang_minutes=0.02"), output_dir=tmp_path / "r", quiet=True, plugins=[slow]
    )
    assert result.outcome == "completed"
    assert not (tmp_path / "r" / "stacks.txt").exists()
    assert not [each for each in threading.enumerate() if each.name == "forge-hang-watch"]


DEADLOCK = """
import ctypes, sys
sys.path.insert(0, {tests!r})
from kernel_parts import make_plugin
from forge_kernel import run
from forge_kernel.cli.run import train
from forge_kernel.contract.plugin import Kind
from forge_kernel.planning.pipeline_file import load_pipeline

def on_batch(self, run, step, batch):
    if step.number == 4:
        libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)  # no signal ends this

settings = ["run.hang_minutes=0.01", "run.save_every=2", "observers=null", "exporters=null"]
pipeline = load_pipeline("smoke", settings)
plugin = make_plugin("sleeper", Kind.CALLBACKS, on_batch=on_batch)
train(lambda cancel: run(pipeline, plugins=[plugin], cancel=cancel, output_dir="r", quiet=True))
"""


def test_a_thread_that_no_signal_wakes_ends_the_command(tmp_path: Path) -> None:
    """Inside of C code: the process ends, with what was saved before."""
    code = DEADLOCK.format(tests=str(Path(__file__).parents[1]))
    done = forked.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "its thread cannot be woken; the process is ended" in done.stderr
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert result["outcome"] == "failed"
    assert "nothing has moved for 0.01 minutes" in result["error"]
    assert (
        "pthread" in (tmp_path / "r" / "stacks.txt").read_text()
        or "on_batch" in (tmp_path / "r" / "stacks.txt").read_text()
    )
    assert CheckpointReader(tmp_path / "r" / "checkpoints").steps() == [2]
