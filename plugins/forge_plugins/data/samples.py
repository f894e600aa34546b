"""A table's samples, dealt out in batches."""

from __future__ import annotations

import copy
import dataclasses
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol

from forge_kernel.api import Batch, DataSpec, LazyModule, stream_seed

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch.utils import data as torch_data

    from forge_plugins.data.file import FileConfig
    from forge_plugins.formats import block_cache, order, quality, survey
    from forge_plugins.formats import table as tables
    from forge_plugins.formats.block_cache import BlockCache
else:
    np = LazyModule("numpy")
    torch = LazyModule("torch")
    torch_data = LazyModule("torch.utils.data")
    block_cache = LazyModule("forge_plugins.formats.block_cache")
    order = LazyModule("forge_plugins.formats.order")
    quality = LazyModule("forge_plugins.formats.quality")
    survey = LazyModule("forge_plugins.formats.survey")
    tables = LazyModule("forge_plugins.formats.table")

STATE_FORMAT: Final = 1
"""Of `Epochs.state_dict`."""


class Deck(Protocol):
    """Which samples are trained on, which are held out, and in which order."""

    training: int
    held_out: int

    def training_samples(self, epoch: int, begin: int, end: int) -> Any:
        """The samples at the places `begin` to `end` of an epoch."""
        ...

    def held_out_samples(self, begin: int, end: int) -> Any:
        """The held-out samples from `begin` to `end`, in the file's order."""
        ...


class StoredDeck:
    """The sample numbers in memory, 8 bytes each: full permutations, a split at random."""

    def __init__(self, kept: Any, config: FileConfig, seed: int) -> None:
        self._training, self._held_out = split(kept, config, seed)
        self.training, self.held_out = len(self._training), len(self._held_out)
        self._shuffle, self._seed = config.shuffle, seed
        self._epoch: tuple[int, Any] | None = None

    def training_samples(self, epoch: int, begin: int, end: int) -> Any:
        """Rows of the epoch's permutation, which is kept for the next call."""
        if not self._shuffle:
            return self._training[begin:end]
        if self._epoch is None or self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(stream_seed(self._seed, "order", epoch))
            drawn = torch.randperm(self.training, generator=generator).numpy()
            self._epoch = epoch, self._training[drawn]
        return self._epoch[1][begin:end]

    def held_out_samples(self, begin: int, end: int) -> Any:
        """Rows of the held-out part."""
        return self._held_out[begin:end]


class ComputedDeck:
    """The sample numbers as functions of the place: blocks are shuffled, a hash splits.

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

    def training_samples(self, epoch: int, begin: int, end: int) -> Any:
        """The samples of a few windows are in memory."""
        if self._shuffle:
            key = stream_seed(self._seed, "order", epoch)
            places = self._order.samples(key, begin, end)
        else:
            places = np.arange(begin, min(end, self.training), dtype=np.int64)
        return self._numbers(self._split.training_samples(places))

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


class FileData:
    """A table's samples in batches, each one gather from the mapped columns.

    The order of an epoch is a function of (seed, epoch, place), so that any position can be taken
    up without reading the earlier ones. Of several processes each reads a stride of the global
    batch; worker processes fetch batches and decide nothing.

    Args:
        table: the columns.
        assessment: of its samples.
        config: how they are dealt out.
        seed: of the run.
        rank: of this process.
        world: processes that train together.
        form: makes a batch of the rows of inputs and of targets; None: a `Batch` as the settings
            say.
    """

    def __init__(
        self,
        table: tables.Table,
        assessment: quality.Assessment | survey.Survey,
        config: FileConfig,
        seed: int,
        *,
        rank: int = 0,
        world: int = 1,
        form: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        assert 0 <= rank < world
        self.table, self.config, self.seed = table, config, seed
        self._rank, self._world = rank, world
        self.left_out = assessment.left_out(config.quality_threshold)
        self.deck: Deck
        if isinstance(assessment, quality.Assessment):
            self.deck = StoredDeck(assessment.kept(config.quality_threshold), config, seed)
        else:
            self.deck = ComputedDeck(assessment.kept_count, assessment.index, config, seed)
        self.spec = self._spec(assessment)
        self._form = form
        self._loader: tuple[_Keys, Any] | None = None
        self._busy = False
        self.cache: BlockCache[Any] = block_cache.BlockCache(
            config.cache_size, config.cache_bytes, evict=config.cache_policy == "lru"
        )
        self._of_workers: dict[int, dict[str, float]] = {}
        self.global_batch = config.batch_size * world
        self.batches_per_epoch: int | None = self.batches_from_place(0)

    def _spec(self, found: Any) -> DataSpec:
        config, shape = self.config, self.table.columns["input"].shape
        shifted = self._shifted()
        classes = config.classes
        vocabulary = config.vocabulary
        if vocabulary is None and found.largest_token is not None:
            vocabulary = max(found.largest_token, found.largest_label or 0) + 1
        if config.target == "next":
            classes = vocabulary
        elif config.target == "class" and classes is None and found.largest_label is not None:
            classes = found.largest_label + 1
        elif config.target == "number":
            target = self.table.columns["target"].shape
            classes = int(target[1]) if len(target) > 1 else 1
        if config.input == "tokens":
            sequence = shape[1] - shifted
            spec = DataSpec(vocabulary=vocabulary, sequence=sequence, classes=classes)
        else:
            spec = DataSpec(features=int(np.prod(shape[1:])), classes=classes)
        return dataclasses.replace(spec, samples=self.deck.training)

    def _shifted(self) -> bool:
        return self.config.target == "next" and "target" not in self.table.columns

    def batches(self, epoch: int, start: int) -> Iterator[Any]:
        """The epoch's batches from `start` on."""
        return self.batches_from(epoch, start * self.global_batch)

    def batches_from(self, epoch: int, place: int) -> Iterator[Any]:
        """The epoch's batches from a sample on, counted over all processes."""
        size, end = self.global_batch, self.deck.training
        begins = range(place, place + self.batches_from_place(place) * size, size)
        yield from self._fetched([(epoch, begin, min(begin + size, end)) for begin in begins])

    def batches_from_place(self, place: int) -> int:
        """The batches of an epoch from a sample on."""
        left = self.deck.training - place
        return left // self.global_batch if self.config.drop_last else -(-left // self.global_batch)

    def validation(self) -> Iterator[Any]:
        """The held-out samples in the file's order; of several processes, each has its stride."""
        size = self.config.validation_batch_size * self._world
        for begin in range(0, self.deck.held_out, size):
            index = self.deck.held_out_samples(begin, begin + size)[self._rank :: self._world]
            if len(index):
                yield self._gather(index)

    def fetch(self, key: tuple[int, int, int]) -> Any:
        """This process's share of the global batch of (epoch, first place, place after the last).

        A share of no sample is one sample of weight 0, so that all processes take each step.
        """
        epoch, begin, end = key
        index = self.deck.training_samples(epoch, begin, end)
        mine = index[self._rank :: self._world]
        if len(mine):
            return self._gather(mine)
        batch = self._gather(index[:1])
        if isinstance(batch, Batch):
            batch.weights = torch.zeros(1)
        return batch

    def _fetched(self, keys: list[tuple[int, int, int]]) -> Iterator[Any]:
        if not self.config.workers:
            for key in keys:
                yield self.fetch(key)
            return
        keep = not self._busy and self.config.keep_workers
        if self._loader is None or not keep:
            made, loader = self._workers(keep=keep)
            self._loader = (made, loader) if keep else self._loader
        else:
            made, loader = self._loader
        self._busy, made.keys = self._busy or keep, keys
        try:
            with warnings.catch_warnings():
                # more workers than cores may be meant: they may wait for a disk
                warnings.filterwarnings("ignore", "This DataLoader will create")
                iterator = iter(loader)
            for batch, worker, figures in iterator:
                self._of_workers[worker] = figures
                yield batch
        finally:
            self._busy = self._busy and not keep

    def _workers(self, *, keep: bool) -> tuple[_Keys, Any]:
        """Worker processes, and the keys that they are asked for.

        Args:
            keep: they stay for the next epoch.
        """
        keys = _Keys()
        # without the loader: in a circle, its queues would be gone before its workers are told
        alone = copy.copy(self)
        alone._loader = None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")
            fetched: Any = _Fetched(alone)
            loader: Any = torch_data.DataLoader(
                fetched, batch_size=None, sampler=keys, num_workers=self.config.workers,
                prefetch_factor=self.config.prefetch, persistent_workers=keep,
                collate_fn=_as_it_is, multiprocessing_context=_context(),
                generator=torch.Generator(),  # the run's random streams are left alone
            )  # fmt: skip
        return keys, loader

    def get_cache_stats(self) -> dict[str, float]:
        """The cache's figures, summed over this process and its workers."""
        parts = [self.cache.figures(), *self._of_workers.values()]
        total = {name: sum(part[name] for part in parts) for name in parts[0]}
        reads = total["hits"] + total["loads"]
        total["hit_rate"] = total["hits"] / reads if reads else 0.0
        return total

    def cache_advice(self) -> str | None:
        """Why the cache does not help, if it does not."""
        figures = self.get_cache_stats()
        return block_cache.advice(self.config.cache_size, figures)

    def _gather(self, index: Any) -> Any:
        rows, answers = self.rows(index)
        return (self._form or self._batch)(rows, answers)

    def rows(self, index: Any) -> tuple[Any, Any]:
        """The inputs and targets of samples (None: there are no targets), from cache or columns."""
        if not self.cache.count:
            return self._read(index)
        cache, numbers = self.cache, index.tolist()
        found = [cache.find(number) for number in numbers]
        absent = np.array([value is None for value in found], np.bool_)
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
            kept = found[at]
            assert kept is not None
            whole[at] = kept[0]
            if targets is not None:
                targets[at] = kept[1]
        if cache.closed:
            cache.passed(len(rows))
            return whole, targets
        for at, place in enumerate(np.flatnonzero(absent).tolist()):
            row = rows[at].copy()
            answer = None if answers is None else answers[at].copy()
            size = row.nbytes + (0 if answer is None else answer.nbytes)
            cache.loaded(numbers[place], (row, answer), size)
        return whole, targets

    def _read(self, index: Any) -> tuple[Any, Any]:
        columns = self.table.columns
        names = ["input", "target"]
        if self.config.target == "none" or "target" not in columns:
            names.pop()
        if self.table.records is not None:
            found = tables.take_records(self.table.records, index, names)
        else:
            found = {name: tables.take(columns[name], index) for name in names}
        return found["input"], found.get("target")

    def _batch(self, rows: Any, answers: Any) -> Batch:
        config = self.config
        if config.input == "features":
            inputs = torch.from_numpy(rows.reshape(len(rows), -1).astype(np.float32, copy=False))
        else:
            inputs = torch.from_numpy(rows.astype(np.int64, copy=False))
        if config.target == "none":
            return Batch(inputs)
        if answers is None:
            return Batch(inputs[:, :-1], inputs[:, 1:])
        if config.target == "number":
            numbers = torch.from_numpy(answers.astype(np.float32, copy=False))
            return Batch(inputs, numbers.reshape(len(rows), -1))
        targets = torch.from_numpy(answers.astype(np.int64, copy=False))
        if config.input == "features":
            return Batch(inputs, targets.reshape(len(rows)))
        targets = targets.reshape(len(rows), -1)
        one = targets.shape[1] == 1 and inputs.shape[1] > 1  # the answer to a whole sequence
        return Batch(inputs, targets, None, slice(-1, None) if one else None)


class _Keys:
    """The batches that the workers are asked for next."""

    def __init__(self) -> None:
        self.keys: list[tuple[int, int, int]] = []

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


class _Fetched:
    """The data as torch's loader asks for them: by key."""

    def __init__(self, data: FileData) -> None:
        self._data = data

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[Any, int, dict[str, float]]:
        worker = torch_data.get_worker_info()
        assert worker is not None, "it is asked in workers only"
        return self._data.fetch(key), worker.id, self._data.cache.figures()


def _as_it_is(value: Any) -> Any:
    return value


def _context() -> str | None:
    """Workers that share the mapped columns, where the system can fork."""
    return "fork" if hasattr(os, "fork") else None


class Epochs:
    """One epoch after the other, from a position that can be kept and taken up.

    The position counts the samples that were handed out, not those fetched ahead: it does not
    depend on workers, and on processes and batch sizes only by where a batch ends.

    Args:
        data: the samples.
    """

    def __init__(self, data: FileData) -> None:
        self._data = data
        self.epoch, self._place = 0, 0

    def __len__(self) -> int:
        assert self._data.batches_per_epoch is not None
        return self._data.batches_per_epoch

    def __iter__(self) -> Iterator[Any]:
        """The rest of the epoch; the next call gives the next one."""
        data, first = self._data, self._place
        size = data.global_batch
        left = data.batches_from_place(first)
        for number, batch in enumerate(data.batches_from(self.epoch, first)):
            if number == left - 1:
                self.epoch, self._place = self.epoch + 1, 0
            else:
                self._place = first + (number + 1) * size
            yield batch

    def begin(self) -> None:
        """Leave the rest of an epoch that was begun."""
        if self._place:
            self.epoch, self._place = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int | str]:
        """The position, at most 300 bytes of JSON."""
        return {
            "format": STATE_FORMAT,
            "seed": self._data.seed,
            "epoch": self.epoch,
            "place": self._place,
            "samples": self._data.deck.training,
            "content": self._data.table.content[:16],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at a position.

        Raises:
            ValueError: it is of other data, of another seed or split; says what differs.
        """
        own = self.state_dict()
        for name in ("format", "seed", "samples", "content"):
            if state.get(name) != own[name]:
                raise ValueError(
                    f"the position is of other data: {name} is {state.get(name)}, here {own[name]}"
                )
        self.epoch, self._place = int(state["epoch"]), int(state["place"])
