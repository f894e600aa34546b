"""Samples from a file: JSON, HDF5, pickle, binary records, numpy, safetensors, raw tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from msgspec import Meta

from forge_kernel.api import (
    Batch,
    Data,
    DataSpec,
    Kind,
    LazyModule,
    PluginError,
    PluginInfo,
    Run,
    hookimpl,
    stream_seed,
)
from forge_plugins.data.identity import Identity, OnChange

if TYPE_CHECKING:
    import numpy as np
    import torch

    from forge_plugins.formats import fault, opening, quality
    from forge_plugins.formats import table as tables
else:
    np = LazyModule("numpy")
    torch = LazyModule("torch")
    fault = LazyModule("forge_plugins.formats.fault")
    opening = LazyModule("forge_plugins.formats.opening")
    quality = LazyModule("forge_plugins.formats.quality")
    tables = LazyModule("forge_plugins.formats.table")

SHIPPED: Final = "shipped:"
"""Before the name of a data file that comes with the package."""
_CLASSES, _PIXELS = 10, 17  # of the shipped digits: labels 0 .. 9, pixels 0 .. 16


@dataclass(frozen=True, kw_only=True)
class FileConfig:
    """Which file, what its fields are, and how it is dealt out."""

    path: Annotated[
        str | None,
        Meta(
            description="the file, relative to where the command runs; `shipped:NAME` is one that "
            "comes with the package; null: shipped:digits.frec, handwritten digits of 8 x 8 pixels"
        ),
    ] = None
    format: Annotated[
        Literal["auto", "json", "hdf5", "pickle", "binary", "npy", "npz", "safetensors", "tokens"],
        Meta(description="auto: by the first bytes, else by the suffix; tokens must be named"),
    ] = "auto"
    input: Annotated[
        Literal["features", "tokens"],
        Meta(description="inputs are numbers, given to the model as one row of floats, or tokens"),
    ] = "features"
    target: Annotated[
        Literal["class", "number", "next", "none"],
        Meta(
            description="targets are classes, numbers, the token that follows each token (in the "
            "file, or the inputs shifted by one), or not there"
        ),
    ] = "class"
    classes: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="labels are below it; null: one more than the largest in the file"),
    ] = None
    vocabulary: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="tokens are below it; null: one more than the largest in the file"),
    ] = None
    batch_size: Annotated[int, Meta(ge=1, description="samples in a training batch")] = 64
    validation_batch_size: Annotated[
        int, Meta(ge=1, description="samples in a validation batch")
    ] = 1024
    shuffle: Annotated[
        bool, Meta(description="another order in each epoch; false: the file's order")
    ] = True
    validation_split: Annotated[
        float,
        Meta(ge=0, lt=1, description="share of the samples, at random, that is not trained on"),
    ] = 0.1
    split_seed: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(description="of the split; null: the run's seed"),
    ] = None
    quality_threshold: Annotated[
        float,
        Meta(
            ge=0,
            le=1,
            description="samples whose quality is below it are left out and counted; 0: none is, "
            "and a sample that cannot be used is an error (see: forge data FILE)",
        ),
    ] = 0.0
    integers: Annotated[
        Literal["uint8", "uint16", "uint32", "int32"],
        Meta(description="type of a token; format tokens"),
    ] = "uint16"
    length: Annotated[
        int, Meta(ge=1, le=65536, description="tokens in a window of the format tokens")
    ] = 128
    cache_dir: Annotated[
        str | None,
        Meta(
            description="where files that cannot be mapped are kept converted; null: "
            "forge-kernel/data below the user's cache folder"
        ),
    ] = None
    trust_pickle: Annotated[
        bool,
        Meta(description="run pickles as they are: they may do whatever their authors like"),
    ] = False
    on_change: OnChange = "refuse"

    def __post_init__(self) -> None:
        if self.target == "next" and self.input != "tokens":
            raise ValueError("target: next needs input: tokens")
        if self.format == "tokens" and (self.input, self.target) != ("tokens", "next"):
            raise ValueError("format: tokens needs input: tokens and target: next")
        if self.path is not None:
            return
        if self.format not in ("auto", "binary"):
            raise ValueError(f"format: {self.format} needs a path; the shipped digits are binary")
        if self.classes is not None and self.classes < _CLASSES:
            raise ValueError(f"the shipped digits have {_CLASSES} classes, not {self.classes}")
        if self.vocabulary is not None and self.vocabulary < _PIXELS:
            raise ValueError(f"the shipped digits have {_PIXELS} tokens, not {self.vocabulary}")


def data_file(path: str | None) -> Path:
    """The file that a setting means."""
    if path is None or path.startswith(SHIPPED):
        import forge_plugins

        name = (path or "shipped:digits.frec").removeprefix(SHIPPED)
        return Path(forge_plugins.__path__[0]) / "pipelines" / "data" / name
    return Path(path)


class FileData:
    """A table's samples in batches, each one gather from the mapped columns.

    The order of an epoch is a permutation that is a function of (seed, epoch), so that any position
    can be taken up without reading the earlier ones.

    Args:
        table: the columns.
        assessment: of its samples.
        config: how they are dealt out.
        seed: of the run.
    """

    def __init__(
        self, table: tables.Table, assessment: quality.Assessment, config: FileConfig, seed: int
    ) -> None:
        self._table, self._config, self._seed = table, config, seed
        self.left_out = assessment.left_out(config.quality_threshold)
        kept = assessment.kept(config.quality_threshold)
        self.training, self.held_out = split(kept, config, seed)
        self.spec = self._spec(assessment)
        self.batches_per_epoch: int | None = -(-len(self.training) // config.batch_size)

    def _spec(self, found: quality.Assessment) -> DataSpec:
        config, shape = self._config, self._table.columns["input"].shape
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
            target = self._table.columns["target"].shape
            classes = target[1] if len(target) > 1 else 1
        if config.input == "tokens":
            sequence = shape[1] - shifted
            return DataSpec(vocabulary=vocabulary, sequence=sequence, classes=classes)
        return DataSpec(features=int(np.prod(shape[1:])), classes=classes)

    def _shifted(self) -> bool:
        return self._config.target == "next" and "target" not in self._table.columns

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """The epoch's batches from `start` on."""
        size, order = self._config.batch_size, self.training
        if self._config.shuffle:
            generator = torch.Generator().manual_seed(stream_seed(self._seed, "order", epoch))
            order = order[torch.randperm(len(order), generator=generator).numpy()]
        for begin in range(start * size, len(order), size):
            yield self._gather(order[begin : begin + size])

    def validation(self) -> Iterator[Batch]:
        """The held-out samples in the file's order."""
        size = self._config.validation_batch_size
        for begin in range(0, len(self.held_out), size):
            yield self._gather(self.held_out[begin : begin + size])

    def _gather(self, index: Any) -> Batch:
        config, columns = self._config, self._table.columns
        rows = tables.take(columns["input"], index)
        if config.input == "features":
            inputs = torch.from_numpy(rows.reshape(len(rows), -1).astype(np.float32, copy=False))
        else:
            inputs = torch.from_numpy(rows.astype(np.int64, copy=False))
        if config.target == "none":
            return Batch(inputs)
        if self._shifted():
            return Batch(inputs[:, :-1], inputs[:, 1:])
        answers = tables.take(columns["target"], index)
        if config.target == "number":
            numbers = torch.from_numpy(answers.astype(np.float32, copy=False))
            return Batch(inputs, numbers.reshape(len(rows), -1))
        targets = torch.from_numpy(answers.astype(np.int64, copy=False))
        if config.input == "features":
            return Batch(inputs, targets.reshape(len(rows)))
        targets = targets.reshape(len(rows), -1)
        one = targets.shape[1] == 1 and inputs.shape[1] > 1  # the answer to a whole sequence
        return Batch(inputs, targets, None, slice(-1, None) if one else None)


def split(kept: Any, config: FileConfig, seed: int) -> tuple[Any, Any]:
    """Samples to train on and samples to validate with, each in the file's order."""
    if not config.validation_split:
        return kept, kept[:0]
    count = min(max(1, round(len(kept) * config.validation_split)), len(kept) - 1)
    own = seed if config.split_seed is None else config.split_seed
    generator = torch.Generator().manual_seed(stream_seed(own, "split"))
    order = torch.randperm(len(kept), generator=generator).numpy()
    return kept[np.sort(order[count:])], kept[np.sort(order[:count])]


def provided(config: FileConfig) -> tuple[str, ...]:
    """What the settings say of the data."""
    answers = {"class": "data:classes", "next": "data:classes", "number": "data:numbers"}
    form = f"data:{config.input}"
    return (form, answers[config.target]) if config.target in answers else (form,)


class File:
    """Maps a file's columns, looks at every sample once, and deals them out."""

    info = PluginInfo(name="file", kind=Kind.DATA, config=FileConfig, provides=provided)

    def __init__(self, config: FileConfig) -> None:
        self.config = config
        self._identity = Identity("file", config.on_change)

    def state_dict(self) -> dict[str, Any]:
        """Which content the run has read."""
        return self._identity.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse to go on with another content, unless `on_change` allows it."""
        self._identity.load_state_dict(state)

    @hookimpl
    def make_data(self, run: Run) -> Data:
        """The file's samples.

        Raises:
            PluginError: the file cannot be read as asked, or a sample cannot be used.
        """
        config = self.config
        strict = config.quality_threshold == 0
        try:
            table = opening.open_table(
                data_file(config.path),
                config.format,
                cache_dir=None if config.cache_dir is None else Path(config.cache_dir),
                lenient=not strict,
                trust_pickle=config.trust_pickle,
                integers=config.integers,
                length=config.length,
            )
            assessment = quality.assess(
                table,
                inputs=config.input,
                target=config.target,
                classes=config.classes,
                vocabulary=config.vocabulary,
                thorough=not strict,
            )
            self._check(table, assessment)
        except fault.DataFault as error:
            raise PluginError(f"file: {error}") from error
        self._identity.set(str(table.file), table.content, len(table))
        return FileData(table, assessment, config, run.seed)

    def _check(self, table: tables.Table, assessment: quality.Assessment) -> None:
        threshold = self.config.quality_threshold
        unusable = assessment.unusable(threshold)
        if unusable is not None:
            record, reason = unusable
            field = {"label out of range": "target", "token out of range": "input"}.get(reason)
            hint = "mend the record, or raise data.with.quality_threshold to leave such samples out"
            raise fault.DataFault(
                table.file, f"cannot be used: {reason}", record=record, field=field, hint=hint
            )
        kept = len(assessment.kept(threshold))
        if kept < (2 if self.config.validation_split else 1):
            told = f"{kept} of {len(table)} samples are left: {assessment.left_out(threshold)}"
            hint = "lower data.with.quality_threshold or data.with.validation_split"
            raise fault.DataFault(table.file, told, hint=hint)
        if self.config.target == "next" and table.columns["input"].shape[1] < 2:
            raise fault.DataFault(
                table.file, "one token has no next one", field="input", hint="write longer rows"
            )
