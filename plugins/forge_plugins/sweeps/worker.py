"""A run of a sweep in a process forked from this one, which has imported torch.

    parent (torch, plugins, one optimizer: imported once)
      |-- fork -> run 0 -> its folder, its exit status
      |-- fork -> run 1 ...

What a child prints goes to a file beside its folder. A child whose parent has gone stops at the
next step's edge and saves, as after a signal.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, NoReturn

from forge_kernel.api import LazyModule
from forge_kernel.cli.interrupt import Interrupt
from forge_kernel.embedding import PipelineConfig, RunFolder, Session
from forge_kernel.errors import ForgeError
from forge_kernel.planning.plan import Plan

_NEEDED: Final = (
    "structlog.stdlib",
    "psutil",
    "torch.utils.flop_counter",
    "forge_kernel.runner",
    "forge_kernel.training.guards.hang_watch",
    "forge_plugins.reports.page",
)
_FAILED: Final = 3
_STOPPED: Final = 130


@dataclass(slots=True)
class Worker:
    """A process that trains.

    Args:
        pid: of the process.
        folder: the run folder that it writes.
        output: the file with what it prints.
        begun: when, on the monotonic clock.
    """

    pid: int
    folder: Path
    output: Path
    begun: float

    def ended(self) -> int | None:
        """The exit status; None while it trains."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def stop(self) -> None:
        """Ask it to stop at the next step's edge; it saves before it ends."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)


class OrphanStops(Interrupt):
    """As the interrupt of a run; also when the parent has gone.

    Args:
        parent: its process number.
    """

    def __init__(self, parent: int) -> None:
        super().__init__()
        self._parent = parent

    def is_set(self) -> bool:
        """Whether to stop."""
        return super().is_set() or os.getppid() != self._parent


@contextlib.contextmanager
def prepared(pipeline: PipelineConfig) -> Iterator[None]:
    """Import once what each run needs, so that no child does it.

    One thread: a pool of threads does not survive a fork. Nothing asks for a GPU, which a child
    could then not use; a run on the CPU is set up once, for all that is imported late.

    Args:
        pipeline: of the runs.
    """
    import torch

    from forge_kernel.planning.plan import plan
    from forge_kernel.training.rehearsal.dry_run import rehearse

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _ = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # torch._dynamo: a second of CPU
    decided = plan(replace(pipeline, run=replace(pipeline.run, threads=1)))
    if pipeline.run.device == "cpu" or torch.version.cuda is None:
        with contextlib.suppress(Exception), TemporaryDirectory() as folder:  # each run tells it
            session = Session(decided, folder=Path(folder), quiet=True, reads=True)
            with session.streams.kept(), contextlib.closing(session):
                rehearse(session)
    for name in _NEEDED:
        _ = importlib.import_module(name)
    _import_late_ones(decided)
    gc.collect()
    gc.freeze()  # a child's collector would copy every page that it walks
    try:
        yield
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads)


def _import_late_ones(decided: Plan) -> None:
    """Import what the plugins of a run import when it is first used."""
    for entry in decided.entries:
        for value in list(vars(sys.modules[entry.plugin.__module__]).values()):
            if isinstance(value, LazyModule):
                with contextlib.suppress(Exception):  # an extra that is not there, nor needed
                    _ = getattr(value, "__name__", None)


def begin(work: Callable[[OrphanStops], int], folder: Path, threads: int) -> Worker:
    """Fork a process that does some work.

    Args:
        work: in the child; its exit status.
        folder: the run folder that it is about.
        threads: of one operation.
    """
    output = folder.with_name(f"{folder.name}.txt")
    sys.stdout.flush()
    sys.stderr.flush()
    parent, begun = os.getpid(), time.monotonic()
    pid = os.fork()
    if not pid:
        _become(work, output, parent, threads)
    return Worker(pid, folder, output, begun)


def _become(
    work: Callable[[OrphanStops], int], output: Path, parent: int, threads: int
) -> NoReturn:
    """Be the child, to its end: nothing of the parent's is run on the way out."""
    status = _FAILED
    try:
        stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        for number in (1, 2):
            os.dup2(stream, number)
        os.close(stream)
        import torch

        torch.set_num_threads(threads)
        cancel = OrphanStops(parent)
        with cancel:
            status = work(cancel)
    except ForgeError as error:
        sys.stderr.write(f"{error}\n")
        status = error.exit_status
    except KeyboardInterrupt:
        status = _STOPPED
    except BaseException:  # noqa: BLE001  told in the file, by the exit status and in the table
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def train(file: str, settings: list[str], folder: Path, cancel: OrphanStops) -> int:
    """Run, or go on with, one run in this process.

    Args:
        file: the pipeline.
        settings: overrides of it.
        folder: of the run, new or cut.
        cancel: asked at each step's edge.

    Returns:
        The exit status: 0, 3 for exports that failed, 130 for a run that was stopped.
    """
    from forge_kernel.planning.pipeline_file import read_document
    from forge_kernel.runner import resume, run_document

    if folder.is_dir() and RunFolder(folder).checkpoints().steps():
        result = resume(folder, cancel=cancel, quiet=True)
    else:
        if folder.is_dir():  # cut before its first checkpoint
            shutil.rmtree(folder)
        result = run_document(
            read_document(file, settings), output_dir=str(folder), cancel=cancel, quiet=True,
            planned=lambda _: None,
        )  # fmt: skip
    if result.outcome == "stopped":
        return _STOPPED
    return _FAILED if result.failed_exports else 0
