"""Which samples are trained on, which are held out, and in which order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from forge_kernel.api import LazyModule, stream_seed

if TYPE_CHECKING:
    import numpy as np
    import torch

    from forge_plugins.data.file import FileConfig
    from forge_plugins.formats import order
else:
    np = LazyModule("numpy")
    torch = LazyModule("torch")
    order = LazyModule("forge_plugins.formats.order")


class Deck(Protocol):
    """Sample numbers by place: a function of (seed, epoch, place)."""

    training: int
    held_out: int

    def training_samples(self, epoch: int, begin: int, end: int) -> Any:
        """The samples at the places `begin` to `end` of an epoch."""
        ...

    def held_out_samples(self, begin: int, end: int) -> Any:
        """The held-out samples from `begin` to `end`, in the file's order."""
        ...


class StoredDeck:
    """The sample numbers in memory, 8 bytes each: full permutations, a split at random.

    Args:
        kept: numbers of the samples that are good enough.
        config: shuffle, share and seed of the split.
        seed: of the run.
    """

    def __init__(self, kept: Any, config: FileConfig, seed: int) -> None:
        self._training, self._held_out = split(kept, config, seed)
        self.training, self.held_out = len(self._training), len(self._held_out)
        self._all = self.training == 0 or int(self._training[-1]) == self.training - 1
        self._shuffle, self._seed = config.shuffle, seed
        self._epoch: tuple[int, Any] | None = None

    def training_samples(self, epoch: int, begin: int, end: int) -> Any:
        """Rows of the epoch's permutation, which is kept for the next call."""
        if not self._shuffle:
            return self._training[begin:end]
        if self._epoch is None or self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(stream_seed(self._seed, "order", epoch))
            drawn = torch.randperm(self.training, generator=generator).numpy()
            self._epoch = epoch, drawn if self._all else self._training[drawn]
        return self._epoch[1][begin:end]

    def held_out_samples(self, begin: int, end: int) -> Any:
        """Rows of the held-out part."""
        return self._held_out[begin:end]


class ComputedDeck:
    """The sample numbers as functions of the place: blocks are shuffled, a hash splits.

    The numbers of one window at a time are in memory.

    Args:
        count: samples that are kept.
        index: their numbers; None when all are.
        config: shuffle, share and seed of the split.
        seed: of the run.
    """

    def __init__(self, count: int, index: Any, config: FileConfig, seed: int) -> None:
        own = seed if config.split_seed is None else config.split_seed
        self._split = order.HashSplit(count, config.validation_split, stream_seed(own, "split"))
        self.training, self.held_out = self._split.training, self._split.held_out
        self._order = order.BlockOrder(self.training)
        self._index, self._shuffle, self._seed = index, config.shuffle, seed
        self._kept: tuple[tuple[int, int], Any] | None = None

    def training_samples(self, epoch: int, begin: int, end: int) -> Any:
        """Rows of the window or two that the places lie in."""
        end, width = min(end, self.training), self._order.width
        number = begin // width
        if end <= (number + 1) * width:
            return self._window(epoch, number)[begin - number * width : end - number * width]
        parts = [
            self._window(epoch, at)[max(0, begin - at * width) : end - at * width]
            for at in range(number, -(-end // width))
        ]
        return np.concatenate(parts)

    def _window(self, epoch: int, number: int) -> Any:
        if self._kept is not None and self._kept[0] == (epoch, number):
            return self._kept[1]
        if self._shuffle:
            places = self._order.window(stream_seed(self._seed, "order", epoch), number)
        else:
            first = number * self._order.width
            last = min(first + self._order.width, self.training)
            places = np.arange(first, last, dtype=np.int64)
        self._kept = (epoch, number), self._numbers(self._split.training_samples(places))
        return self._kept[1]

    def held_out_samples(self, begin: int, end: int) -> Any:
        """In the file's order within strata that follow each other."""
        places = np.arange(begin, min(end, self.held_out), dtype=np.int64)
        return self._numbers(self._split.held_out_samples(places))

    def _numbers(self, samples: Any) -> Any:
        return samples if self._index is None else np.asarray(self._index)[samples]


def split(kept: Any, config: FileConfig, seed: int) -> tuple[Any, Any]:
    """Samples to train on and samples to validate with, each in the file's order."""
    if not config.validation_split:
        return kept, kept[:0]
    count = min(max(1, round(len(kept) * config.validation_split)), len(kept) - 1)
    own = seed if config.split_seed is None else config.split_seed
    generator = torch.Generator().manual_seed(stream_seed(own, "split"))
    drawn = torch.randperm(len(kept), generator=generator).numpy()
    return kept[np.sort(drawn[count:])], kept[np.sort(drawn[:count])]
