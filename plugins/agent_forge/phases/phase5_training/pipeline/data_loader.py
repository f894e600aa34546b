"""Loaders of data files: the kernel's formats and its `data.file` behind the Phase 5 names."""

from __future__ import annotations

import enum
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import torch
from msgspec import Meta
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from agent_forge.phases.phase5_training.configuration import Configuration, SettingError
from agent_forge.phases.phase5_training.shared_epochs import SharedEpochs
from forge_plugins.data.file import open_file, to_batches
from forge_plugins.data.file_batches import FileData
from forge_plugins.data.file_config import FileConfig
from forge_plugins.data.resumable_epochs import Epochs
from forge_plugins.formats.columns.table import Table
from forge_plugins.formats.errors import DataError
from forge_plugins.formats.inspection.quality import REASONS, assess
from forge_plugins.formats.readers.field_values import rows_of

__all__ = [
    "CachedDataset",
    "DataConfig",
    "DataFormat",
    "DataLoaderFactory",
    "DataLoadingProfiler",
    "Loader",
    "QualityValidator",
    "StreamingDataset",
    "create_optimized_loader",
]

Sample = dict[str, Tensor]
"""`input`, and `target` when the file has one; of a batch, the first dimension counts samples."""


class DataFormat(enum.Enum):
    """What a file is; None in the settings: by its first bytes, else by its name.

    TEXT is read as bytes, TOKENIZED as 16-bit integers, both in windows of `max_sequence_length`
    tokens with the next token as target. PREPROCESSED is `.npy`, `.npz` or safetensors.
    """

    TEXT = "text"
    TOKENIZED = "tokenized"
    PREPROCESSED = "preprocessed"
    HDF5 = "hdf5"
    PICKLE = "pickle"
    JSON = "json"
    BINARY = "binary"


class DataConfig(Configuration):
    """How a file's samples are read and dealt out.

    `max_sequence_length` cuts rows of integers; rows of floats are as long as they are, and a
    pipeline's rows too. `cache_size` counts samples kept in memory, in each process that reads; 0
    keeps none. `input_column` and `target_column` name what is read of a file; its other columns
    are not read. `pin_memory` is of loaders, and acts where CUDA is (None: so it does). A pipeline
    maps its file and has `num_workers` where they, `prefetch_factor` or `persistent_workers` were
    set, else none, which is faster. `quality_threshold` leaves samples out and counts them, see
    `forge_plugins.formats.inspection.quality`. `seed` is that of order and split.
    """

    batch_size: Annotated[int, Meta(ge=1)] = 32
    num_workers: Annotated[int, Meta(ge=0, le=64)] = 4
    shuffle: bool = True
    drop_last: bool = False
    prefetch_factor: Annotated[int, Meta(ge=1, le=64)] = 2
    pin_memory: bool | None = None
    persistent_workers: bool = True
    max_sequence_length: Annotated[int, Meta(ge=1, le=65536)] = 2048
    cache_size: Annotated[int, Meta(ge=0)] = 1000
    streaming: bool = False
    validation_split: Annotated[float, Meta(ge=0, lt=1)] = 0.1
    quality_threshold: Annotated[float, Meta(ge=0, le=1)] = 0.8
    seed: Annotated[int, Meta(ge=0)] = 0
    data_format: DataFormat | None = None
    num_classes: Annotated[int, Meta(ge=1)] | None = None
    input_column: Annotated[str, Meta(min_length=1)] = "input"
    target_column: Annotated[str, Meta(min_length=1)] = "target"
    cache_dir: str | None = None
    trust_pickle: bool = False


_FORMATS: Final[dict[DataFormat | None, str]] = {
    None: "auto",
    DataFormat.PREPROCESSED: "auto",
    DataFormat.TEXT: "tokens",
    DataFormat.TOKENIZED: "tokens",
    DataFormat.HDF5: "hdf5",
    DataFormat.PICKLE: "pickle",
    DataFormat.JSON: "json",
    DataFormat.BINARY: "binary",
}


def _file_settings(path: str | Path, config: DataConfig, **chosen: Any) -> FileConfig:
    """The kernel's settings for a file, whose form is not known yet."""
    config.check()
    kind = config.data_format
    if kind is None and Path(path).suffix == ".txt":
        kind = DataFormat.TEXT
    tokens = kind in (DataFormat.TEXT, DataFormat.TOKENIZED)
    values: dict[str, Any] = {
        "path": str(path),
        "format": _FORMATS[kind],
        "input": "tokens" if tokens else "features",
        "target": "next" if tokens else "class",
        "input_column": config.input_column,
        "target_column": config.target_column,
        "classes": config.num_classes,
        "token_dtype": "uint8" if kind is DataFormat.TEXT else "uint16",
        "sequence_length": config.max_sequence_length,
        "batch_size": config.batch_size,
        "validation_batch_size": config.batch_size,
        "shuffle": config.shuffle,
        "drop_last": config.drop_last,
        "streaming": config.streaming,
        "workers": config.num_workers,
        "prefetch": config.prefetch_factor if config.num_workers else None,
        "keep_workers": config.persistent_workers or not config.num_workers,
        "cache_size": config.cache_size,
        "validation_split": 0.0,
        "quality_threshold": config.quality_threshold,
        "cache_dir": config.cache_dir,
        "trust_pickle": config.trust_pickle,
    }
    return FileConfig(**{**values, **chosen})


def _answers(table: Table, config: FileConfig) -> tuple[str, str]:
    """What the columns are, by their types: (input, target)."""
    target, inputs = table.columns.get("target"), table.columns["input"]
    if config.format == "tokens":
        return "tokens", "next"
    if target is None:
        return "features", "none"
    if target.dtype.kind == "f":
        return "features", "number"
    if target.ndim == 2 and target.shape == inputs.shape and target.shape[1] > 1:
        return "tokens", "next"
    return "features", "class"


def _data(path: str | Path, config: DataConfig, **chosen: Any) -> FileData:
    """The samples of a file.

    Raises:
        PluginError: the file cannot be read, or its samples cannot be used.
    """
    asked = _file_settings(path, config, **chosen)
    table = open_file(asked)
    inputs, target = _answers(table, asked)
    settings = _file_settings(path, config, **{**chosen, "input": inputs, "target": target})
    shifted = target == "next" and "target" not in table.columns
    form = partial(_shifted if shifted else _sample, length=config.max_sequence_length)
    return to_batches(table, settings, config.seed, form=form)


def _shifted(rows: Any, answers: Any, length: int) -> Sample:
    """Each token's target is the next one of its row."""
    del answers
    return _sample(rows[:, :-1], rows[:, 1:], length)


def _sample(rows: Any, answers: Any, length: int) -> Sample:
    """Floats as 32-bit floats, integers as 64-bit integers, of the file's shape."""
    result = {"input": _tensor(rows)}
    if answers is not None:
        result["target"] = _tensor(answers)
    sequence = rows.shape
    for name, value in result.items():
        if rows.dtype.kind != "f" and rows.ndim == 2 and value.shape == sequence:
            result[name] = value[:, :length].contiguous()
    return result


def _tensor(rows: Any) -> Tensor:
    kind = np.float32 if rows.dtype.kind == "f" else np.int64
    return torch.from_numpy(np.ascontiguousarray(rows, kind))


class DataLoadingProfiler:
    """Metrics of loading: what was measured, and None for what was not."""

    def __init__(self) -> None:
        self.start_profiling()

    def start_profiling(self) -> None:
        """Begin anew."""
        self._seconds: list[float] = []
        self._samples = 0
        self._begin = time.perf_counter()
        self._cache: dict[str, Any] | None = None
        self._quality: dict[str, Any] | None = None

    def record_batch(self, batch_size: int, seconds: float) -> None:
        """Count a batch and the time that was waited for it."""
        self._samples += batch_size
        self._seconds.append(seconds)

    def update_cache_stats(self, stats: Mapping[str, Any]) -> None:
        """What `get_cache_stats` gave last."""
        self._cache = dict(stats)

    def update_quality_stats(self, stats: Mapping[str, Any]) -> None:
        """What `get_stats` or `get_quality_stats` gave last."""
        self._quality = dict(stats)

    def get_report(self) -> dict[str, Any]:
        """Batches, samples, seconds waited, samples per second waited and passed."""
        waited, passed = sum(self._seconds), time.perf_counter() - self._begin
        count = len(self._seconds)
        return {
            "batches": count,
            "samples": self._samples,
            "loading_seconds": waited,
            "mean_batch_seconds": waited / count if count else None,
            "max_batch_seconds": max(self._seconds) if count else None,
            "samples_per_second": self._samples / waited if waited else None,
            "share_of_time_loading": waited / passed if count and passed else None,
            "cache": self._cache,
            "quality": self._quality,
        }


def _cache_stats(data: FileData) -> dict[str, float]:
    result = data.get_cache_stats()
    return {
        "hit_rate": result["hit_rate"],
        "cache_hits": result["hits"],
        "cache_misses": result["loads"],
        "cache_size": result["values"],
        "max_cache_size": data.config.cache_size,
        "evictions": result["evictions"],
        "seconds": result["seconds"],
    }


class Loader:
    """Batches of a file, each a dictionary of tensors.

    Each `iter` begins a new epoch in an order of its own, the same in each process and with any
    number of workers; after `load_state_dict` it goes on in the middle of one.

    Args:
        data: the samples.
        validation: give the held-out samples, in one fixed order.
        pin: copy batches into pinned memory, where CUDA is.
        profiler: is told of each batch.
    """

    def __init__(
        self,
        data: FileData,
        *,
        validation: bool = False,
        pin: bool = False,
        profiler: DataLoadingProfiler | None = None,
    ) -> None:
        self.data, self.profiler = data, profiler
        self.batch_size = data.config.batch_size
        self._validation, self._pin = validation, pin and torch.cuda.is_available()
        self._epochs = Epochs(data)
        self._resumed = False

    def __len__(self) -> int:
        if self._validation:
            return math.ceil(self.data.sampler.validation / self.data.config.validation_batch_size)
        return len(self._epochs)

    @property
    def samples(self) -> int:
        """Samples of an epoch."""
        return self.data.sampler.validation if self._validation else self.data.sampler.training

    def __iter__(self) -> Iterator[Sample]:
        if not self._validation and not self._resumed:
            self._epochs.begin()
        self._resumed = False
        batches = self.data.validation() if self._validation else iter(self._epochs)
        begin = time.perf_counter()
        for batch in batches:
            ready = {n: t.pin_memory() for n, t in batch.items()} if self._pin else batch
            if self.profiler is not None:
                self.profiler.record_batch(len(ready["input"]), time.perf_counter() - begin)
                self.profiler.update_cache_stats(self.get_cache_stats())
            yield ready
            begin = time.perf_counter()

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order the next `iter` gives; each `iter` moves on by one.

        A position that `load_state_dict` gave comes first.
        """
        if not self._resumed:
            self._epochs.load_state_dict({**self._epochs.state_dict(), "epoch": epoch, "place": 0})

    def state_dict(self) -> dict[str, int | str]:
        """The position, at most 300 bytes of JSON."""
        return self._epochs.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at a position with the next `iter`.

        Raises:
            ValueError: it is of other data or of another seed.
        """
        self._epochs.load_state_dict(state)
        self._resumed = True

    def get_cache_stats(self) -> dict[str, float]:
        """Metrics of the cache, over this process and its workers."""
        return _cache_stats(self.data)

    def get_quality_stats(self) -> dict[str, Any]:
        """Samples in the file, kept, and left out by reason."""
        return _quality_stats(self.data)


def _quality_stats(data: FileData) -> dict[str, Any]:
    dropped = sum(data.left_out.values())
    return {
        "total_samples": len(data.table),
        "kept_samples": len(data.table) - dropped,
        "filtered_samples": dropped,
        "reasons": dict(data.left_out),
        "threshold": data.config.quality_threshold,
    }


class DataLoaderFactory:
    """Makes loaders."""

    @staticmethod
    def create_loader(
        path: str | Path,
        config: DataConfig,
        dataset_type: Literal["cached", "streaming"] = "cached",
    ) -> Loader:
        """Every sample of a file that is good enough, once in an epoch.

        Args:
            path: the file; its format is found by content and name.
            config: settings.
            dataset_type: `streaming` is as `config.streaming`: memory that does not grow with the
                file.

        Raises:
            SettingError: there is no such type.
            PluginError: the file cannot be read, or its samples cannot be used.
        """
        if dataset_type not in ("cached", "streaming"):
            raise SettingError(f"dataset_type is 'cached' or 'streaming', not {dataset_type!r}")
        streaming = config.streaming or dataset_type == "streaming"
        return Loader(_data(path, config, streaming=streaming), pin=config.pin_memory is not False)

    @staticmethod
    def create_validation_split(path: str | Path, config: DataConfig) -> tuple[Loader, Loader]:
        """Loaders of the samples to train on and of the `validation_split` share held out.

        Raises:
            PluginError: see `create_loader`.
        """
        data = _data(path, config, validation_split=config.validation_split)
        return Loader(data, pin=config.pin_memory is not False), Loader(
            data, validation=True, pin=config.pin_memory is not False
        )


class CachedDataset(Dataset[Sample]):
    """A file's samples by number, in the file's order; `cache_size` of them stay in memory.

    Args:
        path: the file.
        config: settings; those of batches are the loader's matter.
    """

    def __init__(self, path: str | Path, config: DataConfig) -> None:
        chosen = {"shuffle": False, "drop_last": False, "cache_policy": _lru(config)}
        self._data = _data(path, config, streaming=False, **chosen)

    def __len__(self) -> int:
        return self._data.sampler.training

    def __getitem__(self, number: int) -> Sample:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[Sample]:
        """Several samples with one gather: what torch's loader asks for when it can."""
        count = len(self)
        wrong = next((n for n in numbers if not -count <= n < count), None)
        if wrong is not None:
            raise IndexError(f"there is no sample {wrong}: the file has {count} that are kept")
        places = np.array([n % count for n in numbers], np.int64)
        known, back = np.unique(places, return_inverse=True)
        index = self._data.sampler.training_samples(0, 0, count)[known]
        whole: Sample = self._data.samples(index)
        return [{name: value[at] for name, value in whole.items()} for at in back.tolist()]

    def get_cache_stats(self) -> dict[str, float]:
        """Hits, misses and the like of this process."""
        return _cache_stats(self._data)

    def get_quality_stats(self) -> dict[str, Any]:
        """Samples in the file, kept, and left out by reason."""
        return _quality_stats(self._data)


def _lru(config: DataConfig) -> str:
    """Samples that are asked for by number may be asked for again soon."""
    return "lru" if config.cache_size else "keep"


class StreamingDataset(IterableDataset[Sample]):
    """A file's samples one after the other, in memory that does not grow with the file.

    Each worker of torch's loader gives a stride of the epoch, so that every sample comes once. Each
    pass is an epoch with an order of its own, whether it is made here or in workers, those that
    stay (`persistent_workers`) too.

    Args:
        path: the file.
        config: settings; those of batches are the loader's matter.
    """

    def __init__(self, path: str | Path, config: DataConfig) -> None:
        self._data = _data(path, config, streaming=True, drop_last=False)
        self._epochs = SharedEpochs()

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order the next `iter` gives; each `iter` moves on by one."""
        self._epochs.epoch = epoch

    def __len__(self) -> int:
        return self._data.sampler.training

    def __iter__(self) -> Iterator[Sample]:
        return self._pass(self._epochs.begin())  # counted now, not at the first sample

    def _pass(self, epoch: int) -> Iterator[Sample]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        size = self._data.config.batch_size * step
        for begin in range(0, len(self), size):
            index = self._data.sampler.training_samples(epoch, begin, begin + size)[first::step]
            whole: Sample = self._data.samples(index)
            for at in range(len(index)):
                yield {name: value[at] for name, value in whole.items()}


class QualityValidator:
    """Looks at one sample after the other; reasons: `forge_plugins.formats.inspection.quality`.

    What needs other samples (repeats, outliers) is not looked for here; a loader looks for it.

    Args:
        threshold: samples of less quality are not valid.
    """

    def __init__(self, threshold: float = 0.8) -> None:
        if not 0 <= threshold <= 1:
            raise SettingError(f"QualityValidator.threshold is from 0 to 1, not {threshold!r}")
        self.threshold = threshold
        self._reasons: Counter[str] = Counter()
        self._total = self._kept = 0

    def score(self, sample: Mapping[str, Any]) -> tuple[float, str | None]:
        """The quality of a sample, from 0 to 1, and the first reason why it is not 1."""
        columns = {}
        if "input" not in sample:
            return 0.0, "missing field"
        for name in ("input", "target"):
            if name not in sample:
                continue
            value = sample[name]
            plain = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
            rows = rows_of([plain])
            if rows is None:
                return 0.0, "wrong type"
            columns[name] = rows
        try:
            table = Table(Path("sample"), "memory", columns)
        except DataError:
            return 0.0, "wrong shape"
        result = assess(table, thorough=False)
        reason = next((name for name in REASONS if result.found[name].any()), None)
        return float(result.scores[0]), reason

    def validate_sample(self, sample: Mapping[str, Any]) -> bool:
        """Whether a sample is good enough; counted."""
        score, reason = self.score(sample)
        self._total += 1
        if score >= self.threshold:
            self._kept += 1
            return True
        assert reason is not None, "a quality below 1 has a reason"
        self._reasons[reason] += 1
        return False

    def get_stats(self) -> dict[str, Any]:
        """Samples looked at, kept, and left out by reason."""
        return {
            "total_samples": self._total,
            "kept_samples": self._kept,
            "filtered_samples": self._total - self._kept,
            "reasons": dict(self._reasons),
            "threshold": self.threshold,
        }


def create_optimized_loader(
    path: str | Path,
    batch_size: int = 32,
    num_workers: int = 4,
    streaming: bool = False,
    **settings: Any,
) -> Loader:
    """A loader whose `profiler` is told of each batch.

    Args:
        path: the file.
        batch_size: see `DataConfig`, like those that follow.
        num_workers: see `DataConfig`.
        streaming: see `DataConfig`.
        settings: further ones.

    Raises:
        PluginError: see `DataLoaderFactory.create_loader`.
    """
    config = DataConfig(
        batch_size=batch_size, num_workers=num_workers, streaming=streaming, **settings
    )
    loader = DataLoaderFactory.create_loader(path, config)
    loader.profiler = DataLoadingProfiler()
    loader.profiler.update_quality_stats(loader.get_quality_stats())
    return loader
