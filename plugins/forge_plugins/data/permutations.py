"""Which sample stands where in an epoch, as functions: nothing is drawn before it or stored.

Randomness is a keyed mixing of numbers (the finalizer of splitmix64, Steele et al. 2014,
doi:10.1145/2660193.2660195), so that any position is known at once, in any process.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]

BLOCK: Final = 64
"""Neighbouring samples that stay together when blocks are shuffled."""
WINDOW: Final = 256
"""Blocks whose samples are mixed with each other."""
STRATUM: Final = 64
"""Neighbouring samples of which the same share is held out."""
_ROUNDS: Final = 4
_STEPS: Final = 200  # of a walk that leaves the range with probability 3/4 at most, each


def mixed(numbers: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """Each number as another one of 64 bits, at random but for the key; same shape."""
    with np.errstate(over="ignore"):
        z = numbers + np.uint64((key * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def permuted(places: Numbers, count: int, key: int) -> Numbers:
    """Where places go in a permutation of `count` numbers: a Feistel network, cycle-walked.

        place -> (left, right) -> (right, left ^ mixed(right)) -> ... four times -> place'

    Four rounds with a good mixer look random (Luby and Rackoff 1988). The network permutes all
    numbers of 2 * half bits, at most four times as many as `count`; what leaves the range walks on
    until it is back (cycle walking, Black and Rogaway 2002), so that the range is permuted. Any
    place is found without its predecessors, which is what lets a run go on in the middle.

    Args:
        places: in 0 .. count - 1, shape (n,).
        count: at most 2**62.
        key: of the permutation.

    Returns:
        Shape (n,), int64, in 0 .. count - 1.
    """
    half = max(1, -(-(count - 1).bit_length() // 2))
    low = np.uint64(2**half - 1)
    shift = np.uint64(half)
    result = places.astype(np.uint64)
    outside = np.ones(len(result), np.bool_)
    for _ in range(_STEPS):
        some = result[outside]
        left, right = some >> shift, some & low
        for number in range(_ROUNDS):
            left, right = right, left ^ (mixed(right, key + number) & low)
        result[outside] = (left << shift) | right
        outside = result >= np.uint64(count)
        if not outside.any():
            break
    assert not outside.any(), "2**62 numbers are walked in far fewer steps"
    return result.astype(np.int64)


class BlockOrder:
    """An order of an epoch in which samples near each other are read near each other.

        file       0 0 0 1 1 1 2 2 2 3 3 3 4 4 4 5 5 5     blocks of neighbours (here 3)
        permuted   4 4 4 0 0 0 2 2 2|5 5 5 1 1 1 3 3 3     blocks, and windows of blocks (here 3)
        mixed      0 4 2 4 0 2 4 2 0|1 5 3 3 1 5 5 3 1     samples, within their window

    Blocks of neighbours are permuted; the samples of `window` blocks or more that follow each other
    then are mixed. Of a file in order of its labels, a batch of as many samples is nearly as mixed
    as by a permutation of all samples (chi-squared twice the ideal one), and the file is read in
    blocks.

    Args:
        count: samples.
        block: neighbours in a block.
        window: blocks in a window, at least; the windows are equal, and a file that is shorter is
            one.
    """

    def __init__(self, count: int, block: int = BLOCK, window: int = WINDOW) -> None:
        assert count >= 0
        assert block >= 1
        assert window >= 1
        self.count, self._block = count, block
        self._blocks = count // block  # the rest stays at the end of the permuted blocks
        self._windows = max(1, self._blocks // window)

    def _first(self, number: int) -> int:
        """The first block of a window."""
        return number * self._blocks // self._windows

    def at(self, key: int, place: int) -> tuple[int, int]:
        """The window that a place of the epoch lies in, and the window's first place."""
        del key  # it changes which blocks a window has, not how many
        assert 0 <= place < self.count
        block = min(place // self._block, max(0, self._blocks - 1))
        number = ((block + 1) * self._windows - 1) // max(1, self._blocks)
        return number, self._first(number) * self._block

    def window(self, key: int, number: int) -> Numbers:
        """The samples of a window in their order."""
        numbers = np.arange(self._first(number), self._first(number + 1), dtype=np.int64)
        blocks = permuted(numbers, self._blocks, key) if len(numbers) else numbers
        inside = np.arange(self._block, dtype=np.int64)
        samples = (blocks[:, None] * self._block + inside).reshape(-1)
        if number == self._windows - 1:
            rest = np.arange(self._blocks * self._block, self.count, dtype=np.int64)
            samples = np.concatenate([samples, rest])
        return _mixed_up(samples, key)


def _mixed_up(samples: Numbers, key: int) -> Numbers:
    # mixing is one to one: there are no ties, so that any way of sorting gives this order
    return samples[np.argsort(mixed(samples.astype(np.uint64), key + _ROUNDS + 1))]


class UnevenOrder:
    """As `BlockOrder`, of blocks that differ in length: those that a file is packed in.

    Args:
        bounds: the first sample of each block, and their number at the end; ascending.
        window: blocks in a window, at most; the windows are as equal as they can be.
    """

    def __init__(self, bounds: Numbers, window: int) -> None:
        assert window >= 1
        self.count = int(bounds[-1])
        self._bounds, self._blocks = bounds, len(bounds) - 1
        windows = max(1, -(-self._blocks // window))
        self._begins = np.arange(windows + 1, dtype=np.int64) * self._blocks // windows
        self._kept: tuple[int, Numbers] | None = None

    def _firsts(self, key: int) -> Numbers:
        """The first place of each window, and the number of places at the end."""
        if self._kept is None or self._kept[0] != key:
            order = permuted(np.arange(self._blocks, dtype=np.int64), self._blocks, key)
            places = np.concatenate([[0], np.cumsum(np.diff(self._bounds)[order])])
            self._kept = key, places[self._begins]
        return self._kept[1]

    def at(self, key: int, place: int) -> tuple[int, int]:
        """The window that a place of the epoch lies in, and the window's first place."""
        firsts = self._firsts(key)
        number = int(np.searchsorted(firsts, place, "right")) - 1
        return number, int(firsts[number])

    def window(self, key: int, number: int) -> Numbers:
        """The samples of a window in their order."""
        places = np.arange(self._begins[number], self._begins[number + 1], dtype=np.int64)
        blocks = permuted(places, self._blocks, key)
        return _mixed_up(runs(self._bounds[blocks], self._bounds[blocks + 1]), key)


def runs(begins: Numbers, ends: Numbers) -> Numbers:
    """The numbers from each begin to before its end, one run after the other."""
    lengths = ends - begins
    offsets = np.cumsum(lengths) - lengths
    inside = np.arange(int(lengths.sum()), dtype=np.int64)
    result: Numbers = inside + np.repeat(begins - offsets, lengths)
    return result


class HashSplit:
    """Samples to train on and samples held out, by a hash of their numbers.

    Of each stratum of neighbours the same share is held out, to the nearest sample over all strata,
    so that the two parts are known by arithmetic: nothing is stored, and their sizes are exact.

    Args:
        count: samples.
        share: that is held out, in [0, 1).
        key: of the choice.
    """

    def __init__(self, count: int, share: float, key: int) -> None:
        self._count, self._key = count, key
        self.validation = min(max(1, round(count * share)), count - 1) if share and count else 0
        self.training = count - self.validation

    def _before(self, strata: Numbers) -> Numbers:
        """Samples held out in all strata before these."""
        return np.minimum(strata * STRATUM, self._count) * self.validation // max(1, self._count)

    def _ranked(self, strata: Numbers) -> Numbers:
        """The samples of strata by their hash, shape (strata, STRATUM); beyond the end: last."""
        samples = strata[:, None] * STRATUM + np.arange(STRATUM, dtype=np.int64)
        hashes = mixed(samples.astype(np.uint64), self._key)
        hashes[samples >= self._count] = np.uint64(2**64 - 1)
        order = np.argsort(hashes, axis=1, kind="stable")
        ranked: Numbers = np.take_along_axis(samples, order, axis=1)
        return ranked

    def training_before(self, samples: Numbers) -> Numbers:
        """How many of the samples before each of these numbers are trained on."""
        if not self.validation:
            return samples
        strata = np.minimum(samples // STRATUM, max(0, -(-self._count // STRATUM) - 1))
        known, back = np.unique(strata, return_inverse=True)
        before = self._before(known)
        number = self._before(known + 1) - before
        earlier = self._ranked(known)[back] < samples[:, None]
        mine = (np.arange(STRATUM) < number[back, None]) & earlier
        trained: Numbers = samples - before[back] - mine.sum(1)
        return trained

    def validation_samples(self, places: Numbers) -> Numbers:
        """The samples at places of the held-out part."""
        return self._at(places, validation=True)

    def training_samples(self, places: Numbers) -> Numbers:
        """The samples at places of the training part, in the file's order."""
        return self._at(places, validation=False)

    def _at(self, places: Numbers, *, validation: bool) -> Numbers:
        if not self.validation:
            return places
        strata = self._strata(places, validation=validation)
        known, back = np.unique(strata, return_inverse=True)
        before = self._before(known)
        number = self._before(known + 1) - before  # held out in each stratum
        ranked = self._ranked(known)
        inside = np.arange(STRATUM)
        mine = inside < number[:, None] if validation else inside >= number[:, None]
        ranked = np.sort(np.where(mine, ranked, np.int64(2**62)), axis=1)
        start = before if validation else known * STRATUM - before
        result: Numbers = ranked[back, places - start[back]]
        return result

    def _strata(self, places: Numbers, *, validation: bool) -> Numbers:
        """Which stratum a place falls into: a guess, moved by at most a few."""
        part = self.validation if validation else self.training

        def start(strata: Numbers) -> Numbers:
            before = self._before(strata)
            return before if validation else np.minimum(strata * STRATUM, self._count) - before

        last = max(0, -(-self._count // STRATUM) - 1)
        strata = np.minimum(places * self._count // (part * STRATUM), last)
        for _ in range(STRATUM):
            low, high = start(strata) > places, start(strata + 1) <= places
            if not (low.any() or high.any()):
                break
            strata = strata - low + high
        return strata


def fraction_of(begin: int, end: int, rank: int, world: int) -> Numbers:
    """The places of a global batch that one of `world` processes reads: a stride."""
    return np.arange(begin + rank, end, world, dtype=np.int64)
