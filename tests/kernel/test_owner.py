"""Who may write a run folder: one process; whoever reads it disturbs nobody."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import forked
import pytest

from forge_kernel import resume, run
from forge_kernel.errors import ConfigError, PlanError
from forge_kernel.planning.pipeline_file import load_pipeline
from forge_kernel.run_folder import owner
from forge_kernel.run_folder.folder import RunFolder
from forge_kernel.run_folder.owner import LOCK, Owner
from forge_kernel.run_folder.status import read_status
from forge_kernel.runner import export
from forge_kernel.storage.seal import sealed
from forge_kernel.trained_model import trained_model

LONG = ("run.max_steps=1000000", "run.save_every=1", "exporters=[{use: state_dict}]")


def forge(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return forked.run(
        [sys.executable, "-m", "forge_kernel", *arguments],
        capture_output=True, text=True, cwd=cwd, check=False, timeout=240,
    )  # fmt: skip


def started(folder: Path, *settings: str) -> Any:
    """A run in another process that saves each step, after its first checkpoint."""
    chosen = [part for setting in (*LONG, *settings) for part in ("--set", setting)]
    process = forked.Popen(
        [
            sys.executable, "-m", "forge_kernel", "run", "smoke", "--output-dir", str(folder),
            "--quiet", *chosen,
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    end = time.monotonic() + 120
    while not list(folder.glob("checkpoints/step-*/manifest.json")):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    return process


def stopped(process: Any) -> None:
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=120)


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def live(tmp_path: Path) -> Any:
    folder = tmp_path / "run"
    process = started(folder)
    yield folder, process
    process.kill()
    process.wait(timeout=60)


def test_a_run_that_is_training_is_resumed_by_nobody_else(live: Any) -> None:
    """Red when the lock is not taken, or not by resume."""
    folder, process = live
    done = forge("resume", str(folder), cwd=folder.parent)
    assert done.returncode == 2
    assert f"process {process.pid} on " in done.stderr
    assert "kill" in done.stderr
    with pytest.raises(ConfigError, match=f"is being written by process {process.pid}"):
        resume(folder, quiet=True)
    with pytest.raises(ConfigError, match="is not empty: a run never reuses one"):
        run(load_pipeline("smoke"), output_dir=folder, quiet=True)
    assert process.poll() is None
    assert read_status(folder).condition == "running"
    stopped(process)
    assert read_status(folder).condition == "ended"


def test_readers_beside_a_live_run_change_nothing_and_disturb_nobody(live: Any) -> None:
    """Red when whoever reads clears what looks unfinished: that is what the run is writing."""
    folder, process = live
    step = 0
    for _ in range(3):
        assert len(list(trained_model(folder).parameters())) > 0
        assert forge("status", str(folder), cwd=folder.parent).returncode == 0
        written = export(folder, "state_dict")
        assert all(place.is_dir() for place in written.values())
        now = RunFolder(folder).status()["step"]
        assert now >= step
        step = now
    assert process.poll() is None
    stopped(process)
    assert json.loads((folder / "result.json").read_text())["outcome"] == "stopped"


def test_a_process_that_is_killed_leaves_its_folder_to_the_next(live: Any) -> None:
    """Whatever the clock says: the heartbeat is of tomorrow, and the lock is free."""
    folder, process = live
    process.kill()
    process.wait(timeout=60)
    status = json.loads((folder / "status.json").read_text())
    tomorrow = sealed({**status, "heartbeat": time.time() + 86400})
    (folder / "status.json").write_bytes(tomorrow)
    assert read_status(folder).condition == "gone"
    result = resume(folder, [f"run.max_steps={status['step'] + 30}"], quiet=True)
    assert result.outcome == "completed"
    assert not (folder / LOCK).read_bytes()
    assert read_status(folder).condition == "ended"


def small(folder: Path) -> Path:
    run(load_pipeline("smoke", ["run.max_steps=2"]), output_dir=folder, quiet=True)
    return folder


def test_a_folder_of_another_machine_is_taken_over_by_whoever_says_so(tmp_path: Path) -> None:
    folder = small(tmp_path / "run")
    (folder / LOCK).write_text(json.dumps({"pid": 7, "host": "elsewhere", "boot": "x"}))
    before = content(folder)
    done = forge("resume", str(folder), "--set", "run.max_steps=3", cwd=tmp_path)
    assert done.returncode == 2
    assert "process 7 on elsewhere" in done.stderr
    assert "--take-over" in done.stderr
    assert content(folder) == before
    done = forge("resume", str(folder), "--take-over", "--set", "run.max_steps=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert RunFolder(folder).status()["step"] == 3


@pytest.mark.parametrize("known", [True, False])
def test_a_refused_resume_leaves_the_folder_as_it_was(tmp_path: Path, known: bool) -> None:
    folder = small(tmp_path / "run")
    if not known:  # of a kernel from before there were locks
        (folder / LOCK).unlink()
    before = content(folder)
    with pytest.raises(PlanError, match="another model"):
        resume(folder, ["model.with.hidden=[7]"], quiet=True)
    assert content(folder) == before


def test_of_many_that_want_a_folder_one_gets_it(tmp_path: Path) -> None:
    """In one process as well: threads are no better than processes."""
    for _ in range(20):
        owners = [Owner(tmp_path) for _ in range(4)]
        won: list[Owner] = []
        barrier = threading.Barrier(len(owners))

        def want(one: Owner, won: list[Owner] = won, barrier: Any = barrier) -> None:
            barrier.wait()
            try:
                one.acquire()
            except ConfigError:
                return
            won.append(one)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, "_PATIENCE_SECONDS", 0.0)
            threads = [threading.Thread(target=want, args=(one,)) for one in owners]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len(won) == 1
        won[0].release()
        won[0].release()


def test_who_only_looks_keeps_nobody_out(tmp_path: Path) -> None:
    """Red when an owner does not wait for a look to be over."""
    first = Owner(tmp_path)
    first.acquire()
    first.release()
    looking = threading.Event()

    def look() -> None:
        while not looking.is_set():
            owner.look(tmp_path)
            time.sleep(0.001)

    watchers = [threading.Thread(target=look) for _ in range(2)]
    for watcher in watchers:
        watcher.start()
    try:
        for _ in range(50):
            mine = Owner(tmp_path)
            mine.acquire()
            mine.release()
    finally:
        looking.set()
        for watcher in watchers:
            watcher.join()


def test_a_forked_worker_does_not_hold_its_parents_folder(tmp_path: Path) -> None:
    """Red when the child keeps the lock's file open: it then outlives the owner."""
    code = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from forge_kernel.run_folder.owner import Owner\n"
        "mine = Owner(Path(sys.argv[1])); mine.acquire()\n"
        "child = os.fork()\n"
        "if child == 0: os.close(1); time.sleep(60); os._exit(0)\n"
        "print(child, flush=True); os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, check=False
    )
    child = int(done.stdout)
    try:
        assert owner.look(tmp_path)[0] == "free"
        mine = Owner(tmp_path)
        mine.acquire()
        mine.release()
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("name", ["status.json", "environment.json", "forge.log", LOCK])
def test_a_pipe_in_the_place_of_a_file_stops_no_reader(tmp_path: Path, name: str) -> None:
    """Red when it is opened as a file: that waits for ever for a writer."""
    folder = small(tmp_path / "run")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    for command in ("status", "report"):
        done = forge(command, str(folder), cwd=tmp_path)
        assert done.returncode in (0, 2), done.stderr
        assert "Traceback" not in done.stderr


def test_a_reader_tells_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no run folder"):
        RunFolder(tmp_path).check()
    assert RunFolder(tmp_path).status() == {}
    assert RunFolder(tmp_path).checkpoints().steps() == []
    (tmp_path / "status.json").write_text(100_000 * "[")
    assert RunFolder(tmp_path).status() == {}
