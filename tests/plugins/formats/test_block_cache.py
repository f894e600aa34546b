"""The cache against a model that looks at everything."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_plugins.data.sample_cache import BlockCache, advice


class Model:
    """A list of keys, oldest first."""

    def __init__(self, count: int, size: int | None, evict: bool) -> None:
        self.count, self.size, self.evict = count, size, evict
        self.kept: list[tuple[int, int]] = []

    def full(self, size: int) -> bool:
        held = sum(s for _, s in self.kept)
        return len(self.kept) >= self.count or (self.size is not None and held + size > self.size)

    def read(self, key: int, size: int) -> bool:
        for place, (known, _) in enumerate(self.kept):
            if known == key:
                if self.evict:
                    self.kept.append(self.kept.pop(place))
                return True
        if self.count and (self.size is None or size <= self.size):
            while self.evict and self.full(size):
                self.kept.pop(0)
            if not self.full(size):
                self.kept.append((key, size))
        return False


@pytest.mark.spec("B6", "B15")
@given(
    count=st.integers(0, 5),
    size=st.one_of(st.none(), st.integers(0, 12)),
    evict=st.booleans(),
    keys=st.lists(st.integers(0, 8), max_size=80),
)
@settings(max_examples=300, deadline=None)
def test_it_holds_what_the_model_holds(
    count: int, size: int | None, evict: bool, keys: list[int]
) -> None:
    """Planted fault: without `move_to_end` the first value was let go of, not the least used."""
    cache: BlockCache[str] = BlockCache(count, size, evict=evict)
    model = Model(count, size, evict)
    hits = 0
    for key in keys:
        hit = model.read(key, key)
        hits += hit
        found = cache.find(key)
        assert found == (str(key) if hit else None)
        if not hit and cache.closed and count:
            cache.passed(1)
        elif not hit:
            cache.loaded(key, str(key), key)
        assert {k for k, _ in model.kept} == {k for k in range(9) if k in cache}
        assert len(cache) <= count
        assert cache.bytes == sum(s for _, s in model.kept)
        assert size is None or cache.bytes <= size
    metrics = cache.metrics()
    assert (metrics["hits"], metrics["loads"]) == (hits, len(keys) - hits)
    assert metrics["hit_rate"] == (hits / len(keys) if keys else 0)


def test_over_epochs_what_came_first_is_worth_more_than_what_came_last() -> None:
    rates = {}
    for evict in (False, True):
        cache: BlockCache[int] = BlockCache(10, evict=evict)
        for _ in range(5):
            for key in range(100):
                if cache.find(key) is None:
                    cache.loaded(key, key, 1)
        rates[evict] = cache.metrics()["hit_rate"], advice(10, cache.metrics())
    assert rates[False] == (0.08, None)
    assert rates[True][0] == 0.0
    assert "served 0 of 500 reads" in str(rates[True][1])


def test_an_access_takes_the_same_time_however_much_is_kept() -> None:
    """Counted in operations on keys: a list would compare with each of them."""
    compared = 0

    class Key:
        def __init__(self, number: int) -> None:
            self.number = number

        def __hash__(self) -> int:
            return hash(self.number)

        def __eq__(self, other: Any) -> bool:
            nonlocal compared
            compared += 1
            return isinstance(other, Key) and self.number == other.number

    cache: BlockCache[int] = BlockCache(5000, evict=True)
    for number in range(10_000):
        cache.loaded(Key(number), 0, 1)
    compared = 0
    for number in range(9000, 9100):
        assert cache.find(Key(number)) == 0
    assert compared <= 1000
