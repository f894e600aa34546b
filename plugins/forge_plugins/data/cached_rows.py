"""Rows of samples by number, of which some stay in memory once they were read."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from forge_kernel.api import LazyModule

if TYPE_CHECKING:
    import numpy as np

    from forge_plugins.data.sample_cache import BlockCache
else:
    np = LazyModule("numpy")

Read = Callable[[Any], tuple[Any, Any]]
"""Gives the inputs and the targets (None: there are none) of samples."""


class CachedRows:
    """What `read` gives, a part of it from memory.

    Args:
        read: the way to the file.
        cache: by sample number; it counts hits, loads and seconds.
    """

    def __init__(self, read: Read, cache: BlockCache[Any]) -> None:
        self._read, self._cache = read, cache

    def __call__(self, index: Any) -> tuple[Any, Any]:
        """The inputs and targets of samples."""
        cache, numbers = self._cache, index.tolist()
        result = [cache.find(number) for number in numbers]
        absent = np.array([value is None for value in result], np.bool_)
        begin = time.perf_counter()
        rows, answers = self._read(index[absent])
        cache.seconds += time.perf_counter() - begin
        whole = np.empty((len(index), *rows.shape[1:]), rows.dtype)
        whole[absent] = rows
        targets = None
        if answers is not None:
            targets = np.empty((len(index), *answers.shape[1:]), answers.dtype)
            targets[absent] = answers
        for at in np.flatnonzero(~absent).tolist():
            kept = result[at]
            assert kept is not None
            whole[at] = kept[0]
            if targets is not None:
                targets[at] = kept[1]
        self._admit([numbers[at] for at in np.flatnonzero(absent).tolist()], rows, answers)
        return whole, targets

    def _admit(self, numbers: list[int], rows: Any, answers: Any) -> None:
        cache = self._cache
        if cache.closed:
            cache.passed(len(numbers))
            return
        for at, number in enumerate(numbers):
            row = rows[at].copy()
            answer = None if answers is None else answers[at].copy()
            size = row.nbytes + (0 if answer is None else answer.nbytes)
            cache.loaded(number, (row, answer), size)
