"""What may happen to a file, its cache and its readers while a run is under way."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import forked
import numpy as np
import psutil
import pytest

from forge_kernel.contract.run_config import RunConfig
from forge_kernel.errors import RunError
from forge_kernel.training.one_process import OneProcess
from forge_plugins.data.file import File
from forge_plugins.data.file_config import FileConfig


class Run:
    seed, strategy, settings = 0, OneProcess(), RunConfig()

    def emit_event(self, *_: Any, **__: Any) -> None:
        """Nobody listens here."""


HERE = Path(__file__).parent


def made(path: Path, **chosen: Any) -> Any:
    config = FileConfig(path=str(path), cache_dir=str(path.parent / "cache"), **chosen)
    return File(config).make_data(Run())  # type: ignore[arg-type]


def write(path: Path, count: int = 2000) -> None:
    columns = np.zeros(count, [("input", "<f4", (256,)), ("target", "<i8")])
    columns["input"] = np.arange(count)[:, None]
    columns["target"] = np.arange(count) % 3
    np.save(path, columns)


def settle(path: Path) -> None:
    """As if it had been written a while ago, for clocks of a coarse grain."""
    os.utime(path, (time.time() - 60, time.time() - 60))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_is_cut_while_it_is_read_ends_the_epoch_not_the_process(
    workers: int, tmp_path: Path
) -> None:
    """Planted fault: without the look at the size the process ended with SIGBUS."""
    path = tmp_path / "x.npy"
    write(path)
    data = made(path, batch_size=16, workers=workers, prefetch=1 if workers else None)
    batches = data.batches(0, 0)
    next(batches)
    os.truncate(path, 4096)
    with pytest.raises(RunError, match=r"x\.npy: changed while it was read: it had \d+ bytes and"):
        list(batches)


def test_a_file_that_is_written_to_is_noticed_at_the_next_epoch(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    write(path)
    settle(path)
    data = made(path, batch_size=500)
    list(data.batches(0, 0))
    with path.open("r+b") as stream:
        stream.seek(5000)
        stream.write(b"another")
    with pytest.raises(RunError, match="it was written to"):
        next(data.batches(1, 0))
    with pytest.raises(RunError, match="it was written to"):
        next(iter(data.validation()))


def test_a_file_that_is_replaced_is_read_on_as_it_was(tmp_path: Path) -> None:
    path, other = tmp_path / "x.npy", tmp_path / "y.npy"
    write(path)
    write(other, 3)
    data = made(path, batch_size=500, validation_split=0.0)
    before = [batch.inputs.sum().item() for batch in data.batches(0, 0)]
    other.replace(path)
    assert [batch.inputs.sum().item() for batch in data.batches(0, 0)] == before


KILLED = """
import gc, psutil, sys
from pathlib import Path
from forge_kernel.errors import RunError
from test_hostile_moments import made

def attempt():
    data = made(Path(sys.argv[1]), batch_size=16, workers=2, prefetch=1)
    batches = data.batches(0, 0)
    next(batches)
    workers = psutil.Process().children()
    try:
        workers[0].kill()
        list(batches)
    except (RunError, RuntimeError) as error:
        return workers, error
    return workers, None

if __name__ == "__main__":
    for _ in range(5):
        workers, error = attempt()
        if isinstance(error, RunError):
            break
    told = str(error)
    del error
    gc.collect()
    print(told, "| left:", psutil.wait_procs(workers, timeout=20)[1], flush=True)
"""


def test_a_worker_that_is_killed_ends_the_epoch_with_a_word(tmp_path: Path) -> None:
    """In a process of its own: torch raises from a signal's handler, wherever the program is then.

    That may be before the epoch goes on, in the caller's own line; such an attempt is made again.
    """
    write(tmp_path / "x.npy", 5000)
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    done = forked.run(
        [sys.executable, script, tmp_path / "x.npy"],
        capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE.parents[1])))},
    )  # fmt: skip
    assert "a process that fetches batches is gone" in done.stdout, done.stderr
    assert "left: []" in done.stdout  # no orphan


@pytest.mark.parametrize("keep", [True, False])
def test_who_stops_early_leaves_no_process_behind(keep: bool, tmp_path: Path) -> None:
    write(tmp_path / "x.npy", 5000)
    data = made(tmp_path / "x.npy", batch_size=16, workers=2, keep_workers=keep)
    before = set(psutil.Process().children())
    batches = data.batches(0, 0)
    next(batches)
    workers = set(psutil.Process().children()) - before
    assert len(workers) == 2
    batches.close()
    assert len(list(data.batches(1, 0))) == data.batches_per_epoch  # and it can be begun anew
    workers |= set(psutil.Process().children()) - before
    del batches, data
    gc.collect()
    assert not psutil.wait_procs(workers, timeout=20)[1]


PIPELINE = """
forge: 1
run: {name: cut, seed: 0, device: cpu, max_epochs: 50, log_every: 5}
data: {use: file, with: {path: x.npy, batch_size: 64, cache_dir: cache}}
model: {use: mlp}
optimizer: {use: adamw, with: {lr: 1e-3}}
loss: {use: cross_entropy}
"""


def forge(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return forked.run(
        [sys.executable, "-m", "forge_kernel", *words], cwd=cwd, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip


CUT = """
import os, sys
from forge_kernel.cli import main

def cut(event, arguments, seen=[]):
    if event == "os.rename" and str(arguments[1]).endswith("status.json"):
        seen.append(1)
        if len(seen) == 3:  # between two steps: no reader is between its look and its read
            os.truncate("x.npy", 4096)

sys.addaudithook(cut)
sys.argv = ["forge", "run", "p.yaml", "--output-dir", "out"]
main()
"""


def test_a_run_whose_file_is_cut_ends_with_3_and_says_why_in_its_folder(tmp_path: Path) -> None:
    """Whoever cuts it between the look at its size and the read ends the process: no file that is
    mapped can be read otherwise, and the run has its last checkpoint."""
    write(tmp_path / "x.npy", 20_000)
    (tmp_path / "p.yaml").write_text(PIPELINE)
    run = forked.run(
        [sys.executable, "-c", CUT], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert run.returncode == 3, run.stderr
    assert "changed while it was read" in run.stderr
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert "changed while it was read" in json.dumps(result)
    assert result["steps"] > 0


@pytest.mark.parametrize(
    ("name", "content"),
    [("x.json", b'[{"input": [1], "target": 0}, {"input": [1'), ("x.npy", b"\x93NUMPY\x01")],
)
def test_a_broken_file_ends_a_run_with_2_and_leaves_nothing_half_written(
    name: str, content: bytes, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / "p.yaml").write_text(PIPELINE.replace("x.npy", name))
    done = forge("run", "p.yaml", "--output-dir", "out", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert name in done.stderr
    assert "Traceback" not in done.stderr
    assert "p.yaml:" in done.stderr  # at its place
    assert not (tmp_path / "out").exists()
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert all(path.parent.name == "memos" for path in left)  # hashes at most
