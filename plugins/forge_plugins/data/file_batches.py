"""A table's samples, dealt out in batches."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from forge_kernel.api import Batch, DataSpec, LazyModule, RunError
from forge_plugins.data.cached_rows import CachedRows, Read
from forge_plugins.data.collate import BatchForm, batch_form
from forge_plugins.data.sampler import Blocks, IndexSampler, PermutationSampler, Sampler
from forge_plugins.data.workers import Key, Workers

if TYPE_CHECKING:
    import numpy as np
    import torch

    from forge_plugins.data import permutations, sample_cache
    from forge_plugins.data.columns.preparation import Preparation
    from forge_plugins.data.file_config import FileConfig
    from forge_plugins.data.sample_cache import BlockCache
    from forge_plugins.formats import errors
    from forge_plugins.formats.columns import chunks, gather
    from forge_plugins.formats.columns import table as tables
    from forge_plugins.formats.inspection import quality_scan
else:
    np = LazyModule("numpy")
    torch = LazyModule("torch")
    sample_cache = LazyModule("forge_plugins.data.sample_cache")
    chunks = LazyModule("forge_plugins.formats.columns.chunks")
    errors = LazyModule("forge_plugins.formats.errors")
    gather = LazyModule("forge_plugins.formats.columns.gather")
    permutations = LazyModule("forge_plugins.data.permutations")
    quality_scan = LazyModule("forge_plugins.formats.inspection.quality_scan")
    tables = LazyModule("forge_plugins.formats.columns.table")


class FileData:
    """A table's samples in batches, each one gather from the mapped columns.

    The order of an epoch is a function of (seed, epoch, place), so that any place can be taken up
    without reading the earlier ones. Of several processes each reads a stride of the global
    batch; worker processes fetch batches and decide nothing.

    Args:
        table: the columns.
        scan: of a look at its samples.
        config: how they are dealt out.
        seed: of the run.
        rank: of this process.
        world: processes that train together.
        form: makes a batch of the rows of inputs and of targets; None: a `Batch` as the settings
            say.
        preparation: what the file's named columns became; None where they were numbers.
    """

    def __init__(
        self,
        table: tables.Table,
        scan: quality_scan.ScanResult,
        config: FileConfig,
        seed: int,
        *,
        rank: int = 0,
        world: int = 1,
        form: BatchForm | None = None,
        preparation: Preparation | None = None,
    ) -> None:
        assert 0 <= rank < world
        self.preparation = preparation
        self.table, self.config, self.seed = table, config, seed
        self._rank, self._world = rank, world
        self.left_out = scan.left_out
        self.sampler = make_sampler(table, scan, config, seed)
        self.spec = self._spec(scan)
        self._form = form or batch_form(config)
        self.cache: BlockCache[Any] = sample_cache.BlockCache(
            config.cache_size, config.cache_bytes, evict=config.cache_policy == "lru"
        )
        self._read = read = _reader(table, answers=config.target != "none")
        self.rows = CachedRows(read, self.cache) if config.cache_size else read
        self._workers: Workers | None = None
        self._of_workers: dict[int, dict[str, float]] = {}
        self.global_batch = config.batch_size * world
        self.batches_per_epoch: int | None = self.batches_from_place(0)

    def _spec(self, scan: quality_scan.ScanResult) -> DataSpec:
        config, shape = self.config, self.table.columns["input"].shape
        shifted = self._shifted()
        classes = config.classes
        vocabulary = config.vocabulary
        if vocabulary is None and scan.largest_token is not None:
            vocabulary = max(scan.largest_token, scan.largest_label or 0) + 1
        if config.target == "next":
            classes = vocabulary
        elif self.preparation is not None and self.preparation.labels is not None:
            classes = len(self.preparation.labels)
        elif config.target == "class" and classes is None and scan.largest_label is not None:
            classes = scan.largest_label + 1
        elif config.target == "number":
            target = self.table.columns["target"].shape
            classes = int(target[1]) if len(target) > 1 else 1
        if config.input == "tokens":
            sequence = shape[1] - shifted
            spec = DataSpec(vocabulary=vocabulary, sequence=sequence, classes=classes)
        else:
            spec = DataSpec(
                features=int(np.prod(shape[1:])), classes=classes,
                shape=tuple(shape[1:]) if len(shape) > 2 else None,
                labels=None if self.preparation is None else self.preparation.labels,
            )  # fmt: skip
        return dataclasses.replace(spec, samples=self.sampler.training)

    def _shifted(self) -> bool:
        return self.config.target == "next" and "target" not in self.table.columns

    def batches(self, epoch: int, place: int) -> Iterator[Any]:
        """The epoch's batches from a place on, counted in samples over all processes.

        Raises:
            RunError: the file cannot be read any more.
        """
        self._unchanged()
        size, end = self.global_batch, self.sampler.training
        begins = range(place, place + self.batches_from_place(place) * size, size)
        yield from self._fetched([(epoch, begin, min(begin + size, end)) for begin in begins])

    def take(self, epoch: int, places: range) -> Any:
        """The batch of the samples at some places of an epoch's order; no cache hears of it.

        Raises:
            RunError: the file cannot be read any more.
        """
        index = self.sampler.training_samples(epoch, places.start, places.stop)
        return self._samples(index[:: places.step], self._read)

    def batches_from_place(self, place: int) -> int:
        """The batches of an epoch from a place on."""
        left = self.sampler.training - place
        return left // self.global_batch if self.config.drop_last else -(-left // self.global_batch)

    def validation(self) -> Iterator[Any]:
        """The held-out samples in the file's order; of several processes, each has its stride.

        Raises:
            RunError: the file cannot be read any more.
        """
        self._unchanged()
        size = self.config.validation_batch_size * self._world
        for begin in range(0, self.sampler.validation, size):
            index = self.sampler.validation_samples(begin, begin + size)[self._rank :: self._world]
            if len(index):
                yield self.samples(index)

    def samples(self, index: Any) -> Any:
        """The batch of samples by number.

        Raises:
            RunError: the file cannot be read any more.
        """
        return self._samples(index, self.rows)

    def _samples(self, index: Any, read: Callable[[Any], Any]) -> Any:
        try:
            rows, answers = read(index)
        except errors.DataError as error:
            raise RunError(f"file: {error}") from error
        return self._form(rows, answers)

    def fetch(self, key: Key) -> Any:
        """This process's share of the global batch of (epoch, first place, place after the last).

        A share of no sample is one sample of weight 0, so that all processes take each step.

        Raises:
            RunError: the file cannot be read any more.
        """
        index = self.sampler.training_samples(*key)
        if self._world == 1:
            return self.samples(index)
        mine = index[self._rank :: self._world]
        if len(mine):
            return self.samples(mine)
        batch = self.samples(index[:1])
        if isinstance(batch, Batch):
            batch.weights = torch.zeros(1)
        return batch

    def _unchanged(self) -> None:
        if self.table.source is None:
            return
        try:
            self.table.source.check()
        except errors.DataError as error:
            raise RunError(f"file: {error}") from error

    def _fetched(self, keys: list[Key]) -> Iterator[Any]:
        if not self.config.workers:
            yield from map(self.fetch, keys)
            return
        keep = self.config.keep_workers
        pool = self._workers
        if pool is None or pool.busy or not keep:
            pool = self._pool(keep=keep and pool is None)
            if keep and self._workers is None:
                self._workers = pool
        yield from pool.batches(keys)

    def _pool(self, *, keep: bool) -> Workers:
        # without the pool: in a circle, its queues would be gone before its workers are told
        alone = copy.copy(self)
        alone._workers = None
        pool = Workers(
            self.config.workers, alone.fetch, alone.cache.metrics,
            prefetch=self.config.prefetch, keep=keep,
        )  # fmt: skip
        pool.metrics = self._of_workers
        return pool

    def shuffle_advice(self) -> str | None:
        """Why samples are mixed with fewer others than they should be, if they are."""
        blocks = _blocks(self.table) if self.config.streaming and self.config.shuffle else None
        if blocks is None or blocks.window >= permutations.WINDOW:
            return None
        if blocks.window * blocks.length >= blocks.samples:
            return None
        return (
            f"the file is packed in chunks of {blocks.length} samples, of which {blocks.window} "
            f"are in memory and mixed at a time, not {permutations.WINDOW}: write smaller "
            "chunks, or set streaming: false to convert it"
        )

    def get_cache_stats(self) -> dict[str, float]:
        """The cache's metrics, summed over this process and its workers."""
        parts = [self.cache.metrics(), *self._of_workers.values()]
        total = {name: sum(part[name] for part in parts) for name in parts[0]}
        reads = total["hits"] + total["loads"]
        total["hit_rate"] = total["hits"] / reads if reads else 0.0
        return total

    def cache_advice(self) -> str | None:
        """Why the cache does not help, if it does not."""
        metrics = self.get_cache_stats()
        return sample_cache.advice(self.config.cache_size, metrics)


def make_sampler(
    table: tables.Table, scan: quality_scan.ScanResult, config: FileConfig, seed: int
) -> Sampler:
    """Which samples are trained on, and in which order."""
    if config.streaming:
        blocks = _blocks(table)
        return PermutationSampler(scan.kept_count, scan.index, config, seed, blocks)
    every = scan.index is None
    kept = np.arange(scan.kept_count, dtype=np.int64) if every else np.asarray(scan.index)
    labels = None
    if config.stratified and "target" in table.columns:
        labels = np.asarray(table.columns["target"][:]).reshape(len(table))
    return IndexSampler(kept, config, seed, labels)


def _blocks(table: tables.Table) -> Blocks | None:
    """How the columns are packed, if one is; the longest chunks of all decide."""
    packed = [
        column
        for name, column in table.columns.items()
        if isinstance(column, chunks.PackedChunks) and name in ("input", "target")
    ]
    if not packed:
        return None
    length = max(column.block for column in packed)
    held = min(column.held_blocks(length) for column in packed)
    return Blocks(len(table), length, held)


def _reader(table: tables.Table, *, answers: bool) -> Read:
    """The way to the inputs and targets of samples, one gather each."""
    inputs = gather.gatherer(table.columns["input"])
    answered = answers and "target" in table.columns
    targets = gather.gatherer(table.columns["target"]) if answered else None
    # a mapped file that has become shorter ends the process that reads it
    check = None if table.source is None else table.source.check_size

    def read(index: Any) -> tuple[Any, Any]:
        if check is not None:
            check()
        return inputs(index), None if targets is None else targets(index)

    return read
