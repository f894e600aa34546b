"""A run that takes a quarter of a second, and processes that take it up to a moment of choice."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from forked import without_waiting

STEPS = 6
PIPELINE = f"""
forge: 1
run: {{name: small, seed: 3, max_steps: {STEPS}, save_every: 1, validate_every: 2, log_every: 1, threads: 1}}
data: {{use: modular_arithmetic, with: {{modulus: 7, batch_size: 8}}}}
model: {{use: mlp, with: {{hidden: [8], embedding: 4, dropout: 0.1}}}}
optimizer: {{use: adamw, with: {{lr: 0.01}}}}
loss: {{use: cross_entropy}}
validators: [{{use: classification}}]
exporters: [{{use: state_dict}}]
observers: [{{use: metrics_jsonl}}, {{use: csv}}]
"""


def write_pipeline(folder: Path) -> Path:
    """The pipeline as a file."""
    file = folder / "small.yaml"
    file.write_text(PIPELINE, encoding="utf-8")
    return file


def forge(*arguments: object) -> int:
    """The command line in this process; its exit code."""
    from forge_kernel.cli import main

    sys.argv = ["forge", *map(str, arguments)]
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


@contextlib.contextmanager
def output_in(file: Path | None) -> Iterator[None]:
    """What this process writes goes to a file, or nowhere."""
    target = os.open(file or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for number in (1, 2):
        os.dup2(target, number)
    os.close(target)
    yield
    sys.stdout.flush()
    sys.stderr.flush()


def emptied(folder: Path) -> None:
    """A folder with nothing in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


class Process:
    """A fork of this process that does some work.

    Args:
        work: gives the exit code; what it raises is written as a traceback, with code 99.
        output: a file for all that it writes.
    """

    def __init__(self, work: Callable[[], int | None], output: Path | None = None) -> None:
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            return
        code = 99
        try:
            with output_in(output):
                try:
                    code = work() or 0
                except BaseException:  # noqa: BLE001  told as a traceback, which no command may end with
                    traceback.print_exc()
        finally:
            os._exit(code)

    def kill(self) -> None:
        """End it at once."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Its exit code; negative: the signal that ended it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def forked(work: Callable[[], int | None], output: Path | None = None) -> int:
    """The exit code of work done in a fork."""
    return Process(work, output).wait()


def weights(folder: Path) -> tuple[int, dict[str, Any]]:
    """Step and weights of a run's newest intact checkpoint."""
    from forge_kernel.storage.checkpoint_store import CheckpointReader

    snapshot, _, _ = CheckpointReader(folder / "checkpoints").newest()
    return snapshot.step, snapshot.model


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, but for their times."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]


def same_weights(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether all bits are equal."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def loaded() -> None:
    """Import all that the forks need, by a run and an export in this process.

    From then on no `fsync` waits: a process that is killed leaves the system's memory of files.
    """
    import forge_kernel.cli.run
    from forge_kernel.runner import export, resume, run

    assert forge_kernel.cli.run.train
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run(write_pipeline(Path(folder)), output_dir=Path(folder) / "run", quiet=True)
        resume(Path(folder) / "run", ["run.max_steps=7"], quiet=True)
        export(Path(folder) / "run", "state_dict")
    os.fsync = without_waiting
    gc.collect()
    gc.freeze()  # a child's collector would copy every page that it walks
