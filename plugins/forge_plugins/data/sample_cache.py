"""What was dear to read, kept in memory within bounds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
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

    def find(self, key: Hashable) -> Value | None:
        """The value of a key, counted as a hit; None when it is not here."""
        result = self._values.get(key)
        if result is None:
            return None
        self.hits += 1
        if self._evict:
            self._values.move_to_end(key)
        return result[0]

    @property
    def closed(self) -> bool:
        """Whether nothing more is admitted, so that `passed` may count loads."""
        return not self._evict and len(self._values) >= self.count

    def passed(self, number: int) -> None:
        """Count loads of a closed cache."""
        assert self.closed
        self.loads += number
        self.refusals += number

    def loaded(self, key: Hashable, value: Value, size: int) -> None:
        """Take in a value that was not here and was read.

        Args:
            key: of the value.
            value: what was read.
            size: its bytes.
        """
        assert key not in self._values
        self.loads += 1
        self._admit(key, value, size)

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

    def metrics(self) -> dict[str, float]:
        """Hits, loads and the like since the start; `seconds` were spent on loads."""
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


def advice(count: int, metrics: Mapping[str, float]) -> str | None:
    """Why a cache does not help, if it does not.

    Args:
        count: values that it may hold.
        metrics: of `BlockCache.metrics`.
    """
    reads = metrics["hits"] + metrics["loads"]
    full = metrics["evictions"] + metrics["not_admitted"]
    if not count or not full or reads < 2 * count or metrics["hits"] >= USEFUL * reads:
        return None
    return (
        f"the cache holds {metrics['values']:.0f} values and served {metrics['hits']:.0f} of "
        f"{reads:.0f} reads: give it more, or none"
    )
