"""Processes that fetch batches. They decide nothing: they are asked for batches by key."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

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
Figures = Callable[[], dict[str, float]]


class Workers:
    """A pool of processes; the batches come in the order of their keys.

    Args:
        count: processes.
        fetch: gives the batch of a key; called in the processes.
        figures: of the cache of a process; called there after each batch.
        prefetch: batches that each process fetches ahead; None: torch's own.
        keep: the processes stay for the next epoch.
    """

    def __init__(
        self, count: int, fetch: Fetch, figures: Figures, *, prefetch: int | None, keep: bool
    ) -> None:
        self._keys = _Keys()
        self.figures: dict[int, dict[str, float]] = {}
        self.busy = False
        with warnings.catch_warnings():
            # more workers than cores may be meant: they may wait for a disk
            warnings.filterwarnings("ignore", "This DataLoader will create")
            fetched: Any = _Fetched(fetch, figures)
            self._loader: Any = torch_data.DataLoader(
                fetched, batch_size=None, sampler=self._keys, num_workers=count,
                prefetch_factor=prefetch, persistent_workers=keep,
                collate_fn=_as_it_is, multiprocessing_context=_context(),
                generator=torch.Generator(),  # the run's random streams are left alone
            )  # fmt: skip

    def batches(self, keys: list[Key]) -> Iterator[Any]:
        """The batches of keys, one iteration at a time.

        Raises:
            RunError: a batch cannot be read, or a process is gone.
        """
        assert not self.busy
        self.busy, self._keys.keys = True, keys
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "This DataLoader will create")
                iterator = iter(self._loader)
            for batch, worker, figures, fault in iterator:
                if fault is not None:
                    raise RunError(fault)
                self.figures[worker] = figures
                yield batch
        except (RuntimeError, OSError, EOFError) as error:
            if not _is_of_a_lost_process(error):
                raise
            told = f"a process that fetches batches is gone: {str(error)[:200]}"
            raise RunError(f"{told}; was it killed, or is the memory full?") from error
        finally:
            self.busy = False


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

    def __init__(self, fetch: Fetch, figures: Figures) -> None:
        self._fetch, self._figures = fetch, figures

    def __getitem__(self, key: Key) -> tuple[Any, int, dict[str, float], str | None]:
        worker = torch_data.get_worker_info()
        assert worker is not None, "it is asked in workers only"
        try:
            return self._fetch(key), worker.id, self._figures(), None
        except RunError as error:  # told by the process that trains, not with a worker's traceback
            return None, worker.id, {}, str(error)


def _is_of_a_lost_process(error: Exception) -> bool:
    """Whether the loader told so itself, or the socket broke over which a batch was handed."""
    if isinstance(error, RuntimeError):
        return "exited unexpectedly" in str(error) or "killed by signal" in str(error)
    return not str(error).startswith("Caught ")  # that one was raised by the reader, in a worker


def _as_it_is(value: Any) -> Any:
    return value


def _context() -> str | None:
    """Workers that share the mapped columns, where the system can fork."""
    return "fork" if hasattr(os, "fork") else None
