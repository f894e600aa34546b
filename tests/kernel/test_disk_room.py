"""A full disk: seen before the first step, and obeyed as the run's settings say."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import forked
import pytest
from kernel_parts import make_plugin

from forge_kernel import resume, run
from forge_kernel.contract.plugin import Kind
from forge_kernel.errors import CheckpointError, RunError
from forge_kernel.planning.pipeline_file import load_pipeline
from forge_kernel.storage.checkpoint_store import CheckpointReader
from forge_kernel.training.guards import disk_room


class Disk:
    """A disk that can be full: the system's calls that take room then fail below one folder."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.number = folder, number
        self.full = False
        self.refused = 0

    def refuse(self, descriptor: int) -> None:
        place = os.readlink(f"/proc/self/fd/{descriptor}")
        if self.full and place.startswith(str(self.folder)) and "checkpoints" in place:
            self.refused += 1
            raise OSError(self.number, os.strerror(self.number))


@pytest.fixture(params=[errno.ENOSPC, errno.EDQUOT])
def disk(tmp_path: Path, request: Any, monkeypatch: Any) -> Disk:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("the system does not tell which file a descriptor is of")
    result = Disk(tmp_path, request.param)
    fsync, allocate = os.fsync, os.posix_fallocate

    def fsync_or_not(descriptor: int) -> None:
        result.refuse(descriptor)
        fsync(descriptor)

    def allocate_or_not(descriptor: int, offset: int, size: int) -> None:
        result.refuse(descriptor)
        allocate(descriptor, offset, size)

    monkeypatch.setattr(os, "fsync", fsync_or_not)
    monkeypatch.setattr(os, "posix_fallocate", allocate_or_not)
    monkeypatch.setattr(disk_room, "_POLL_SECONDS", 0.01)
    return result


def smoke(*settings: str) -> Any:
    return load_pipeline("smoke", ["run.max_steps=9", "observers=null", *settings])


def steps(folder: Path) -> list[int]:
    return CheckpointReader(folder / "checkpoints").steps()


def at(step: int, act: Any) -> Any:
    def on_step_end(self: Any, run: Any, step_: Any) -> None:
        if run.progress.step == step:
            act()

    def renamed(self: Any, run: Any, step: Any) -> None:
        on_step_end(self, run, step)

    return make_plugin("at", Kind.CALLBACKS, on_step_end=renamed)


def fills(disk: Disk, full: bool) -> Any:
    def act() -> None:
        disk.full = full

    return act


def test_no_room_is_told_before_the_first_step(tmp_path: Path, disk: Disk) -> None:
    """Planted: the look left out. Nothing that was trained is lost, for nothing was."""
    disk.full = True
    with pytest.raises(RunError, match="checkpoints cannot be kept in .* are free there"):
        run(smoke(), output_dir=tmp_path / "r", quiet=True)
    status = json.loads((tmp_path / "r" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 0)
    disk.full = False
    assert run(smoke(), output_dir=tmp_path / "r", quiet=True).outcome == "completed"


LIMITED = """
import resource, sys
from forge_kernel.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
sys.argv = ["forge", "run", "smoke", "--output-dir", "r", "--set", "model.with.hidden=[512, 512]"]
main()
"""


def test_a_checkpoint_larger_than_the_system_allows_is_refused(tmp_path: Path) -> None:
    """By a limit of the system itself: red when the bytes are not reserved."""
    done = forked.run(
        [sys.executable, "-c", LIMITED], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 3, done.stderr
    assert "checkpoints cannot be kept" in done.stderr
    assert "One takes 1.2 MB at least" in done.stderr
    assert json.loads((tmp_path / "r" / "status.json").read_text())["step"] == 0


def test_the_look_leaves_nothing_behind(tmp_path: Path) -> None:
    seen: list[str] = []

    def on_run_start(self: Any, run: Any) -> None:
        seen.extend(path.name for path in (run.folder / "checkpoints").iterdir())

    plugin = make_plugin("look", Kind.CALLBACKS, on_run_start=on_run_start)
    run(smoke(), output_dir=tmp_path / "r", plugins=[plugin], quiet=True)
    assert seen == []
    left = [path.name for path in (tmp_path / "r" / "checkpoints").iterdir()]
    assert "step-9" in left
    assert [name for name in left if name.startswith(".")] == []


def test_a_disk_that_fills_ends_the_run_and_the_last_checkpoint_stays(
    tmp_path: Path, disk: Disk
) -> None:
    with pytest.raises(CheckpointError, match="cannot save .*step-6"):
        run(
            smoke("run.save_every=3"), output_dir=tmp_path / "r", quiet=True,
            plugins=[at(4, fills(disk, True))],
        )  # fmt: skip
    assert steps(tmp_path / "r") == [3]
    disk.full = False
    assert resume(
        tmp_path / "r", quiet=True, plugins=[at(99, None)]
    ).outcome == "completed"  # fmt: skip


def test_a_checkpoint_is_left_out_and_the_run_goes_on(tmp_path: Path, disk: Disk) -> None:
    """Planted: `skip` that ends the run; a left-out checkpoint that is not told."""

    def toggle() -> None:
        disk.full = not disk.full

    plugins = [at(5, toggle), at(8, toggle)]
    result = run(
        smoke("run.save_every=3", "run.on_disk_full=skip"), output_dir=tmp_path / "r", quiet=True,
        plugins=plugins,
    )  # fmt: skip
    assert result.outcome == "completed"
    assert steps(tmp_path / "r") == [3, 9]
    log = (tmp_path / "r" / "forge.log").read_text()
    assert log.count('"event": "disk_full"') == 1
    assert "the newest checkpoint is of step 3. The run goes on without it" in log


def test_the_last_checkpoint_is_not_left_out(tmp_path: Path, disk: Disk) -> None:
    """Red when a run completes of which nothing was kept."""
    with pytest.raises(CheckpointError):
        run(
            smoke("run.save_every=3", "run.on_disk_full=skip"), output_dir=tmp_path / "r",
            quiet=True, plugins=[at(4, fills(disk, True))],
        )  # fmt: skip
    assert json.loads((tmp_path / "r" / "result.json").read_text())["outcome"] == "failed"
    assert steps(tmp_path / "r") == [3]


def test_a_run_waits_for_room_and_goes_on_as_if_nothing_had_been(
    tmp_path: Path, disk: Disk
) -> None:
    straight = run(smoke("run.save_every=3"), output_dir=tmp_path / "a", quiet=True)
    timer = threading.Timer(0.3, fills(disk, False))

    def fill() -> None:
        disk.full = True
        timer.start()

    result = run(
        smoke("run.save_every=3", "run.on_disk_full=pause"), output_dir=tmp_path / "b", quiet=True,
        plugins=[at(4, fill)],
    )  # fmt: skip
    assert disk.refused > 2
    assert steps(tmp_path / "b") == [6, 9]
    for mine, theirs in zip(result.model.parameters(), straight.model.parameters(), strict=True):
        assert mine.equal(theirs)
    log = (tmp_path / "b" / "forge.log").read_text()
    assert "waits up to 60 minutes for room" in log
    assert "There is room again: step 6 is saved." in log


@pytest.mark.parametrize("why", ["patience", "asked"])
def test_a_wait_has_an_end(tmp_path: Path, disk: Disk, why: str) -> None:
    cancel = threading.Event()

    def fill() -> None:
        disk.full = True
        if why == "asked":
            threading.Timer(0.2, cancel.set).start()

    minutes = 0.003 if why == "patience" else 60
    with pytest.raises(CheckpointError, match="cannot save"):
        run(
            smoke("run.save_every=3", "run.on_disk_full=pause", f"run.pause_minutes={minutes}"),
            output_dir=tmp_path / "r", quiet=True, plugins=[at(4, fill)], cancel=cancel,
        )  # fmt: skip
    assert steps(tmp_path / "r") == [3]


def test_what_is_no_full_disk_is_no_reason_to_wait(tmp_path: Path, disk: Disk) -> None:
    disk.number = errno.EIO
    with pytest.raises(CheckpointError, match="cannot save"):
        run(
            smoke("run.save_every=3", "run.on_disk_full=pause"), output_dir=tmp_path / "r",
            quiet=True, plugins=[at(4, fills(disk, True))],
        )  # fmt: skip
    assert "disk_full" not in (tmp_path / "r" / "forge.log").read_text()
