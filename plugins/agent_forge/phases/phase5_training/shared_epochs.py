"""The epoch of a pass over data, agreed on by the worker processes of torch's loaders."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import get_spawning_popen
from typing import Any, Final

from torch.utils.data import get_worker_info

REMEMBERED: Final = 64
"""Passes that workers may be late for: loaders that iterate at the same time."""
_WIDTH: Final = 4  # numbers kept of each: seed, process, pass, epoch


class SharedEpochs:
    """Counts passes, in the program and in the workers of its loaders alike.

    A loader does not tell the program's own copy of a data set that a pass begins: its workers
    do, each by itself. The first worker of a pass takes the next epoch, the others find what it
    took, by the loader's seed for the pass and the numbers of its processes; a worker that stays
    for several passes counts them. A pass that was left early confuses nothing.

    Pickled other than for a worker, it goes on from its epoch as a counter of its own.
    """

    def __init__(self, epoch: int = 0) -> None:
        # of the spawn context: workers that are forked take it too, the reverse is refused
        context = multiprocessing.get_context("spawn")
        self._shared: Any = context.Array("q", 2 + REMEMBERED * _WIDTH)
        self._passes = 0  # begun in this process
        self.epoch = epoch

    @property
    def epoch(self) -> int:
        """The epoch of the next pass."""
        return int(self._shared[0])

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._shared[0] = epoch

    def begin(self) -> int:
        """The epoch of the pass that this process begins."""
        worker = get_worker_info()
        self._passes += 1
        with self._shared.get_lock():
            if worker is None:
                return self._take()
            seed, process = worker.seed - worker.id, _process_number() - worker.id
            known = self._find(seed, process, worker.num_workers)
            if known is not None:
                return known
            epoch = self._take()
            place = 2 + self._shared[1] % REMEMBERED * _WIDTH
            self._shared[place : place + _WIDTH] = [seed, process, self._passes, epoch]
            self._shared[1] += 1
            return epoch

    def _take(self) -> int:
        epoch = int(self._shared[0])
        self._shared[0] = epoch + 1
        return epoch

    def _find(self, seed: int, process: int, workers: int) -> int | None:
        """The epoch that another worker of the same pass took.

        Numbers of processes rise; other processes may have been begun between the workers.
        """
        for slot in range(min(self._shared[1], REMEMBERED)):
            place = 2 + slot * _WIDTH
            known = self._shared[place : place + _WIDTH]
            same = known[0] == seed and known[2] == self._passes
            if same and abs(known[1] - process) < workers:
                return int(known[3])
        return None

    def __getstate__(self) -> dict[str, Any]:
        if get_spawning_popen() is not None:
            return self.__dict__
        return {"epoch": self.epoch}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_shared" in state:
            self.__dict__.update(state)
        else:
            self.__init__(state["epoch"])  # type: ignore[misc]


def _process_number() -> int:
    """This process's number among its parent's; 0 where its name was changed."""
    number = multiprocessing.current_process().name.rpartition("-")[2].rpartition(":")[2]
    return int(number) if number.isdecimal() else 0
