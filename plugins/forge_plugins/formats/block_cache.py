"""What was dear to read, kept in memory within bounds."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Final, Generic, TypeVar

Value = TypeVar("Value")

USEFUL: Final = 0.05
"""Share of hits below which a cache that is full does not help."""


class BlockCache(Generic[Value]):
    """Values by key, at most so many and so many bytes; each access takes the same time.

    Over epochs in which each value is read once, what was read first is worth as much as what was
    read last, and a cache that always lets go of the oldest never hits (measured: 0.5 % of hits at
    a tenth of the data, against 10 %). So by default what is there stays, and what does not fit is
    not admitted. With `evict`, the least recently used one makes room: for values that are read
    several times in a row.

    Args:
        count: values; 0: nothing is kept.
        size: bytes; None: no bound.
        evict: let go of the least recently used for a new one.
    """

    def __init__(self, count: int, size: int | None = None, *, evict: bool = False) -> None:
        assert count >= 0
        assert size is None or size >= 0
        self.count, self.size, self._evict = count, size, evict
        self._values: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self.bytes = 0
        self.hits = self.loads = self.evictions = self.refusals = 0
        self.seconds = 0.0

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def get(self, key: Hashable, load: Callable[[], Value], size: Callable[[Value], int]) -> Value:
        """The value of a key, kept or loaded.

        Args:
            key: of the value.
            load: reads it.
            size: tells its bytes.
        """
        found = self._values.get(key)
        if found is not None:
            self.hits += 1
            if self._evict:
                self._values.move_to_end(key)
            return found[0]
        begin = time.perf_counter()
        value = load()
        self.seconds += time.perf_counter() - begin
        self.loads += 1
        self._admit(key, value, size(value))
        return value

    def _admit(self, key: Hashable, value: Value, size: int) -> None:
        fits = self.count > 0 and (self.size is None or size <= self.size)
        if not fits or (not self._evict and self._over(1, size)):
            self.refusals += self.count > 0
            return
        for _ in range(len(self._values)):
            if not self._over(1, size):
                break
            _, (_, gone) = self._values.popitem(last=False)
            self.bytes -= gone
            self.evictions += 1
        self._values[key] = value, size
        self.bytes += size

    def _over(self, more: int, size: int) -> bool:
        beyond = self.size is not None and self.bytes + size > self.size
        return beyond or len(self._values) + more > self.count

    def figures(self) -> dict[str, float]:
        """Hits, loads and the like since the start; `seconds` were spent loading."""
        reads = self.hits + self.loads
        return {
            "hit_rate": self.hits / reads if reads else 0.0,
            "hits": self.hits,
            "loads": self.loads,
            "evictions": self.evictions,
            "not_admitted": self.refusals,
            "values": len(self._values),
            "bytes": self.bytes,
            "seconds": self.seconds,
        }

    def advice(self) -> str | None:
        """Why the cache does not help, if it does not."""
        reads = self.hits + self.loads
        full = self.evictions + self.refusals
        if not self.count or reads < 2 * max(1, self.count) or self.hits >= USEFUL * reads:
            return None
        if not full:
            return None
        return (
            f"the cache holds {len(self._values)} values and hits {self.hits} of {reads} reads: "
            "give it more, or none"
        )
