"""Which samples are trained on, which are held out, and in which order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from forge_kernel.api import LazyModule, stream_seed

if TYPE_CHECKING:
    import numpy as np
    import torch

    from forge_plugins.data import permutations
    from forge_plugins.data.file_config import FileConfig
    from forge_plugins.data.permutations import BlockOrder, UnevenOrder
else:
    np = LazyModule("numpy")
    torch = LazyModule("torch")
    permutations = LazyModule("forge_plugins.data.permutations")

_BOUNDS: Final = 2**14


class Sampler(Protocol):
    """Sample numbers by place: a function of (seed, epoch, place)."""

    training: int
    validation: int

    def training_samples(self, epoch: int, begin: int, end: int) -> Any:
        """The samples at the places `begin` to `end` of an epoch."""
        ...

    def validation_samples(self, begin: int, end: int) -> Any:
        """The held-out samples from `begin` to `end`, in the file's order."""
        ...

    def all_training(self) -> Any:
        """All samples that are trained on, in the file's order."""
        ...


@dataclass(frozen=True)
class Blocks:
    """How a file is packed.

    Args:
        samples: in the file.
        length: samples in a block; the last one may be shorter.
        window: blocks that are in memory together.
    """

    samples: int
    length: int
    window: int


class IndexSampler:
    """The sample numbers in memory, 8 bytes each: full permutations, a split at random.

    Args:
        kept: numbers of the samples that are good enough.
        config: shuffle, share and seed of the split.
        seed: of the run.
        labels: of all samples of the file, where the split is stratified.
    """

    def __init__(self, kept: Any, config: FileConfig, seed: int, labels: Any = None) -> None:
        self._training, self._validation = split(kept, config, seed, labels)
        self.training, self.validation = len(self._training), len(self._validation)
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

    def validation_samples(self, begin: int, end: int) -> Any:
        """Rows of the held-out part."""
        return self._validation[begin:end]

    def all_training(self) -> Any:
        """In the file's order."""
        return self._training


class PermutationSampler:
    """The sample numbers as functions of the place: blocks are shuffled, a hash splits.

    The numbers of one window at a time are in memory.

    Args:
        count: samples that are kept.
        index: their numbers, ascending; None when all are.
        config: shuffle, share and seed of the split.
        seed: of the run.
        blocks: how the file is packed, so that each block is unpacked once an epoch; None: it is
            not, and samples can be read by themselves.
    """

    def __init__(
        self, count: int, index: Any, config: FileConfig, seed: int, blocks: Blocks | None = None
    ) -> None:
        own = seed if config.split_seed is None else config.split_seed
        self._split = permutations.HashSplit(
            count, config.validation_split, stream_seed(own, "split")
        )
        self.training, self.validation = self._split.training, self._split.validation
        self._index, self._shuffle, self._seed = index, config.shuffle, seed
        self._order: BlockOrder | UnevenOrder = (
            permutations.BlockOrder(self.training) if blocks is None else self._uneven(blocks)
        )
        self._key: tuple[int, int] | None = None
        self._nothing = np.zeros(0, np.int64)
        self._kept: tuple[tuple[int, int], Any] | None = None

    def _uneven(self, blocks: Blocks) -> UnevenOrder:
        bounds = np.arange(0, blocks.samples + blocks.length, blocks.length, dtype=np.int64)
        bounds = np.minimum(bounds, blocks.samples)
        if self._index is not None:
            bounds = np.searchsorted(self._index, bounds)
        parts = [  # the split looks at 64 samples for each bound
            self._split.training_before(bounds[begin : begin + _BOUNDS])
            for begin in range(0, len(bounds), _BOUNDS)
        ]
        return permutations.UnevenOrder(np.concatenate(parts), blocks.window)

    def training_samples(self, epoch: int, begin: int, end: int) -> Any:
        """Rows of the window or two that the places lie in."""
        end = min(end, self.training)
        if not self._shuffle:
            places = np.arange(begin, end, dtype=np.int64)
            return self._numbers(self._split.training_samples(places))
        if self._key is None or self._key[0] != epoch:
            self._key = epoch, stream_seed(self._seed, "order", epoch)
        key = self._key[1]
        parts = []
        for _ in range(end - begin):  # each gives one sample or more
            number, first = self._order.at(key, begin)
            parts.append(self._window(key, number)[begin - first : end - first])
            begin += len(parts[-1])
            if begin == end:
                break
        return parts[0] if len(parts) == 1 else np.concatenate([*parts, self._nothing])

    def _window(self, key: int, number: int) -> Any:
        if self._kept is None or self._kept[0] != (key, number):
            places = self._order.window(key, number)
            self._kept = (key, number), self._numbers(self._split.training_samples(places))
        return self._kept[1]

    def validation_samples(self, begin: int, end: int) -> Any:
        """In the file's order within strata that follow each other."""
        places = np.arange(begin, min(end, self.validation), dtype=np.int64)
        return self._numbers(self._split.validation_samples(places))

    def all_training(self) -> Any:
        """In the file's order."""
        return self._numbers(self._split.training_samples(np.arange(self.training, dtype=np.int64)))

    def _numbers(self, samples: Any) -> Any:
        return samples if self._index is None else np.asarray(self._index)[samples]


def split(kept: Any, config: FileConfig, seed: int, labels: Any = None) -> tuple[Any, Any]:
    """Samples to train on and samples to validate with, each in the file's order."""
    if not config.validation_split:
        return kept, kept[:0]
    count = min(max(1, round(len(kept) * config.validation_split)), len(kept) - 1)
    own = seed if config.split_seed is None else config.split_seed
    generator = torch.Generator().manual_seed(stream_seed(own, "split"))
    drawn = torch.randperm(len(kept), generator=generator).numpy()
    if labels is not None:
        held = _strata(np.asarray(labels)[kept][drawn], count)
        return kept[np.sort(drawn[~held])], kept[np.sort(drawn[held])]
    return kept[np.sort(drawn[count:])], kept[np.sort(drawn[:count])]


def _strata(labels: Any, count: int) -> Any:
    """Which samples are held out, so that each class has its share (by largest remainders).

    Args:
        labels: of the samples in the order in which they were drawn.
        count: samples that are held out, as far as each class keeps one to be trained on.
    """
    classes, members = np.unique(labels, return_inverse=True)
    sizes = np.bincount(members, minlength=len(classes))
    exact = sizes * (count / len(labels))
    quotas = np.floor(exact).astype(np.int64)
    first = np.argsort(quotas - exact, kind="stable")[: count - int(quotas.sum())]
    quotas[first] += 1
    quotas = np.minimum(quotas, sizes - 1)
    order = np.argsort(members, kind="stable")
    begins = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    places = np.empty(len(labels), np.int64)  # of a sample among those of its class
    places[order] = np.arange(len(labels)) - np.repeat(begins, sizes)
    return places < quotas[members]
