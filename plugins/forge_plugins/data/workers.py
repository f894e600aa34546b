"""Processes that fetch batches. They decide nothing: they are asked for batches by key."""

from __future__ import annotations

import errno
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from forge_kernel.api import LazyModule, RunError

if TYPE_CHECKING:
    import torch
    from torch.utils import data as torch_data
else:
    torch = LazyModule("torch")
    torch_data = LazyModule("torch.utils.data")

Key = tuple[int, int, int]
"""Epoch, first place, place after the last one."""
Fetch = Callable[[Key], Any]
Metrics = Callable[[], dict[str, float]]
PREFETCH: Final = 2
"""Batches that each process fetches ahead, unless told."""
_PIPES: Final = 4  # files of a process: both ends of its queue, and two that tell of its end
_TENSORS: Final = 2  # files of a batch on its way: memory of its inputs and of its targets
_OWN: Final = 32  # files that a run opens beside: checkpoints, logs
_MEND: Final = "lower workers or prefetch, or allow more (ulimit -n, ulimit -u, room in /dev/shm)"


def too_many(count: int, prefetch: int | None, batches: int) -> str | None:
    """Why so many processes cannot be had here, if that is known before they are begun.

    Args:
        count: processes.
        prefetch: batches that each fetches ahead; None: `PREFETCH`.
        batches: of an epoch, more of which are never on their way.
    """
    if sys.platform == "win32":
        return None
    import resource

    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    ahead = min(count * (prefetch or PREFETCH), batches)
    needed = _opened() + _OWN + count * _PIPES + ahead * _TENSORS
    if not count or most == resource.RLIM_INFINITY or needed <= most:
        return None
    return (
        f"workers: {count} with prefetch: {prefetch or PREFETCH} need about {needed} open files, "
        f"and this process may have {most}: {_MEND}"
    )


def _opened() -> int:
    """Files that this process has opened, as far as the system tells."""
    folder = "/proc/self/fd" if sys.platform == "linux" else "/dev/fd"
    return len(os.listdir(folder))


class Workers:
    """A pool of processes; the batches come in the order of their keys.

    Args:
        count: processes.
        fetch: gives the batch of a key; called in the processes.
        metrics: of the cache of a process; called there after each batch.
        prefetch: batches that each process fetches ahead; None: torch's own.
        keep: the processes stay for the next epoch.
    """

    def __init__(
        self, count: int, fetch: Fetch, metrics: Metrics, *, prefetch: int | None, keep: bool
    ) -> None:
        self._keys, self._count = _Keys(), count
        self.metrics: dict[int, dict[str, float]] = {}
        self.busy = False
        with warnings.catch_warnings():
            # more workers than cores may be meant: they may wait for a disk
            warnings.filterwarnings("ignore", "This DataLoader will create")
            fetched: Any = _Fetched(fetch, metrics)
            self._loader: Any = torch_data.DataLoader(
                fetched, batch_size=None, sampler=self._keys, num_workers=count,
                prefetch_factor=prefetch, persistent_workers=keep,
                collate_fn=_as_it_is, multiprocessing_context=_context(),
                generator=torch.Generator(),  # the run's random streams are left alone
            )  # fmt: skip

    def batches(self, keys: list[Key]) -> Iterator[Any]:
        """The batches of keys, one iteration at a time.

        Raises:
            RunError: a batch cannot be read, a process cannot be begun, or one is gone.
        """
        assert not self.busy
        self.busy, self._keys.keys = True, keys
        try:
            for batch, worker, metrics, fault in self._begun():
                if fault is not None:
                    raise RunError(fault)
                self.metrics[worker] = metrics
                yield batch
        except (RuntimeError, OSError, EOFError) as error:
            if _is_of_open_files(error):
                raise RunError(
                    f"{self._count} workers have too many files open: {_MEND}"
                ) from error
            if not _is_of_a_lost_process(error):
                raise
            message = f"a process that fetches batches is gone: {str(error)[:200]}"
            raise RunError(f"{message}; was it killed, or is the memory full?") from error
        finally:
            self.busy = False

    def _begun(self) -> Iterator[Any]:
        """The loader's batches; its processes are begun now.

        Raises:
            RunError: not all of them could be, and those that were are ended.
        """
        before = {child.pid for child in multiprocessing.active_children()}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "This DataLoader will create")
                return iter(self._loader)
        except (OSError, RuntimeError) as error:
            for child in multiprocessing.active_children():
                if child.pid not in before:
                    child.terminate()
                    child.join()
            message = f"{self._count} workers cannot be begun: {str(error)[:200]}"
            raise RunError(f"{message}; {_MEND}") from error


class _Keys:
    """The batches that the workers are asked for next."""

    def __init__(self) -> None:
        self.keys: list[Key] = []

    def __iter__(self) -> Iterator[Key]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


class _Fetched:
    """The batches as torch's loader asks for them: by key."""

    def __init__(self, fetch: Fetch, metrics: Metrics) -> None:
        self._fetch, self._metrics = fetch, metrics

    def __getitem__(self, key: Key) -> tuple[Any, int, dict[str, float], str | None]:
        worker = torch_data.get_worker_info()
        assert worker is not None, "it is asked in workers only"
        try:
            return self._fetch(key), worker.id, self._metrics(), None
        except RunError as error:  # told by the process that trains, not with a worker's traceback
            return None, worker.id, {}, str(error)


def _is_of_a_lost_process(error: Exception) -> bool:
    """Whether the loader told so itself, or the socket broke over which a batch was handed."""
    if isinstance(error, RuntimeError):
        return "exited unexpectedly" in str(error) or "killed by signal" in str(error)
    return not str(error).startswith("Caught ")  # that one was raised by the reader, in a worker


def _is_of_open_files(error: Exception) -> bool:
    """Whether a batch could not be handed over for want of files, in any library's words."""
    limits = (errno.EMFILE, errno.ENFILE)
    message = str(error)
    return (
        getattr(error, "errno", None) in limits
        or "ancillary data" in message
        or "Too many open files" in message
    )


def _as_it_is(value: Any) -> Any:
    return value


def _context() -> str | None:
    """Workers that share the mapped columns, where the system can fork."""
    return "fork" if hasattr(os, "fork") else None
