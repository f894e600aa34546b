"""Samples from a file: JSON, HDF5, pickle, torch, binary records, numpy, Parquet, raw tokens."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from msgspec import Meta

from forge_kernel.api import (
    Data,
    Kind,
    LazyModule,
    PluginError,
    PluginInfo,
    Run,
    Step,
    hookimpl,
)
from forge_plugins.data import workers
from forge_plugins.data.file_batches import FileData
from forge_plugins.data.fingerprint import Identity, OnChange
from forge_plugins.formats import registry

if TYPE_CHECKING:
    from forge_plugins.formats import errors, open_table
    from forge_plugins.formats import format as formats
    from forge_plugins.formats.columns import cache
    from forge_plugins.formats.columns import table as tables
    from forge_plugins.formats.inspection import quality_scan
else:
    cache = LazyModule("forge_plugins.formats.columns.cache")
    errors = LazyModule("forge_plugins.formats.errors")
    formats = LazyModule("forge_plugins.formats.format")
    open_table = LazyModule("forge_plugins.formats.open_table")
    quality_scan = LazyModule("forge_plugins.formats.inspection.quality_scan")
    tables = LazyModule("forge_plugins.formats.columns.table")

SHIPPED: Final = "shipped:"
"""Before the name of a data file that comes with the package."""
IGNORE_INDEX: Final = -100
"""The integer target that counts for nothing, where no run says another one."""
_TARGET: Final = "target"
_CLASSES, _PIXELS = 10, 17  # of the shipped digits: labels 0 .. 9, pixels 0 .. 16


@dataclass(frozen=True, kw_only=True)
class FileConfig:
    """Which file, what its fields are, and how it is dealt out."""

    path: Annotated[
        str | None,
        Meta(
            description="the file, relative to where the command runs; `shipped:NAME` is one that "
            "comes with the package; null: shipped:digits.frec, handwritten digits of 8 x 8 pixels",
            extra_json_schema={"format": "path"},
        ),
    ] = None
    format: Annotated[
        str,
        Meta(
            pattern="^[a-z0-9_]+$",
            description="auto: by the first bytes, else by the suffix; or the name of an installed "
            "format (see: forge data --formats); tokens must be named",
            extra_json_schema={
                "examples": [
                    "auto",
                    "json",
                    "hdf5",
                    "pickle",
                    "binary",
                    "npy",
                    "npz",
                    "safetensors",
                    "torch",
                    "tokens",
                    "parquet",
                    "arrow",
                ]
            },
        ),
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
    input_column: Annotated[
        str,
        Meta(
            min_length=1,
            description="the column or field that is the input, as the file names it; in HDF5 also "
            "a path such as train/x; columns that are not named here are not read",
        ),
    ] = "input"
    target_column: Annotated[
        str, Meta(min_length=1, description="the column or field that is the target")
    ] = "target"
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
    drop_last: Annotated[
        bool, Meta(description="leave out an epoch's last batch when it is smaller")
    ] = False
    streaming: Annotated[
        bool,
        Meta(
            description="memory that does not grow with the file: samples are shuffled in blocks "
            "of 64 within windows of 256 blocks, a hash splits, repeats are found among neighbours "
            "only, and gzip in HDF5 is read chunk by chunk without a copy; false: full shuffle, 16 "
            "bytes of memory for each sample"
        ),
    ] = False
    workers: Annotated[
        int,
        Meta(
            ge=0,
            le=64,
            description="processes that fetch batches; the order is the same; 0 is fastest for "
            "numbers that are mapped",
        ),
    ] = 0
    prefetch: Annotated[
        Annotated[int, Meta(ge=1, le=64)] | None,
        Meta(description="batches that each worker fetches ahead; null: 2"),
    ] = None
    keep_workers: Annotated[
        bool, Meta(description="worker processes stay for the next epoch; false: begun anew")
    ] = True
    cache_size: Annotated[
        int,
        Meta(
            ge=0,
            description="samples kept in memory once read, in each process that fetches; 0: none; "
            "columns are mapped and kept by the system, so that this rarely helps",
        ),
    ] = 0
    cache_bytes: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(description="bytes of the kept samples' numbers; null: no bound"),
    ] = None
    cache_policy: Annotated[
        Literal["keep", "lru"],
        Meta(
            description="keep what came first, which is best when each sample is read once an "
            "epoch, or let go of the least recently used"
        ),
    ] = "keep"
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
            "forge-kernel/data below the user's cache folder",
            extra_json_schema={"format": "path"},
        ),
    ] = None
    trust_pickle: Annotated[
        bool,
        Meta(description="run pickles as they are: they may do whatever their authors like"),
    ] = False
    verify: Annotated[
        bool,
        Meta(
            description="read the whole file and its converted columns at each start to compare "
            "their hashes; false: only when its inode, size or times are not what they were"
        ),
    ] = False
    on_change: OnChange = "refuse"

    def __post_init__(self) -> None:
        _check_format(self.format)
        if self.target == "next" and self.input != "tokens":
            raise ValueError("target: next needs input: tokens")
        if self.format == "tokens" and (self.input, self.target) != ("tokens", "next"):
            raise ValueError("format: tokens needs input: tokens and target: next")
        if self.target == "none" and self.target_column != _TARGET:
            raise ValueError("target_column is not read with target: none: set another target")
        if self.prefetch is not None and not self.workers:
            raise ValueError("prefetch is read by workers: set workers above 0")
        if not self.workers and not self.keep_workers:
            raise ValueError("keep_workers is read by workers: set workers above 0")
        if not self.cache_size and (self.cache_bytes is not None or self.cache_policy != "keep"):
            raise ValueError("cache_bytes and cache_policy need a cache_size above 0")
        if self.path is not None:
            return
        if self.format not in ("auto", "binary"):
            raise ValueError(f"format: {self.format} needs a path; the shipped digits are binary")
        if self.classes is not None and self.classes < _CLASSES:
            raise ValueError(f"the shipped digits have {_CLASSES} classes, not {self.classes}")
        if self.vocabulary is not None and self.vocabulary < _PIXELS:
            raise ValueError(f"the shipped digits have {_PIXELS} tokens, not {self.vocabulary}")


def _check_format(name: str) -> None:
    known = ("auto", *registry.names())
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"format: {name} is not installed{meant} there are: {', '.join(known)}")


def data_file(path: str | None) -> Path:
    """The file that a setting means."""
    if path is None or path.startswith(SHIPPED):
        import forge_plugins

        name = (path or "shipped:digits.frec").removeprefix(SHIPPED)
        return Path(forge_plugins.__path__[0]) / "pipelines" / "data" / name
    return Path(path)


def provided(config: FileConfig) -> tuple[str, ...]:
    """What the settings say of the data."""
    answers = {"class": "data:classes", "next": "data:classes", "number": "data:numbers"}
    form = f"data:{config.input}"
    return (form, answers[config.target]) if config.target in answers else (form,)


def open_file(config: FileConfig) -> tables.Table:
    """The table that settings name.

    Raises:
        PluginError: the file cannot be read as asked.
    """
    reading = formats.Reading(
        input=config.input_column,
        target=None if config.target == "none" else config.target_column,
        lenient=config.quality_threshold > 0, trust_pickle=config.trust_pickle,
        integers=config.integers, length=config.length, streaming=config.streaming,
    )  # fmt: skip
    try:
        table = open_table.open_table(
            data_file(config.path),
            config.format,
            reading,
            cache_dir=None if config.cache_dir is None else Path(config.cache_dir),
            verify=config.verify,
        )
        if config.target_column != _TARGET and _TARGET not in table.columns:
            raise table.without(_TARGET)
    except errors.DataFault as error:
        raise PluginError(f"file: {error}") from error
    return table


def deal(
    table: tables.Table,
    config: FileConfig,
    seed: int,
    *,
    ignore_index: int = IGNORE_INDEX,
    **options: Any,
) -> FileData:
    """A table's samples, looked at and ready to be dealt out.

    Args:
        table: from `open_file`.
        config: how they are dealt out.
        seed: of the run.
        ignore_index: an integer target that counts for nothing: it is no label, and stays as it is.
        options: as for `FileData`.

    Raises:
        PluginError: a sample cannot be used, or too few are left.
    """
    floats = options.get("form") is None  # another form may keep integers
    try:
        found = _looked_at(table, config, ignore_index, floats=floats)
        _check(table, found, config, ignore_index)
    except errors.DataFault as error:
        raise PluginError(f"file: {error}") from error
    data = FileData(table, found, config, seed, **options)
    if not data.batches_per_epoch:
        raise PluginError(
            f"file: {table.file}: {data.deck.training} samples are left to train on and a batch "
            f"has {data.global_batch} of them, so that drop_last leaves out the only one: lower "
            f"{_smaller(config)}, or set drop_last: false"
        )
    many = workers.too_many(config.workers, config.prefetch, data.batches_per_epoch)
    if many is not None:
        raise PluginError(f"file: {many}")
    return data


def _smaller(config: FileConfig) -> str:
    """The settings that make a batch of what there is."""
    return "batch_size or validation_split" if config.validation_split else "batch_size"


def _looked_at(
    table: tables.Table, config: FileConfig, ignore_index: int, *, floats: bool
) -> quality_scan.Survey:
    asked = quality_scan.Question(
        inputs=config.input, target=config.target, classes=config.classes,
        vocabulary=config.vocabulary, threshold=config.quality_threshold, parts=config.streaming,
        ignore=ignore_index, floats=floats,
    )  # fmt: skip
    given = config.cache_dir
    folder = cache.default_folder(table.file) if given is None else Path(given)
    return quality_scan.survey(table, asked, folder)


def _check(
    table: tables.Table, found: quality_scan.Survey, config: FileConfig, ignore_index: int
) -> None:
    if found.unusable is not None:
        record, reason = found.unusable
        role = {"label out of range": _TARGET, "token out of range": "input"}.get(reason)
        field = None if role is None else table.name_of(role)
        hint = "mend the record, or raise quality_threshold to leave such samples out"
        raise errors.DataFault(
            table.file, f"cannot be used: {reason}", record=record, field=field, hint=hint
        )
    if found.kept_count < (2 if config.validation_split else 1):
        told = f"{found.kept_count} of {len(table)} samples are left: {found.left_out}"
        hint = "lower quality_threshold or validation_split"
        raise errors.DataFault(table.file, told, hint=hint)
    if found.largest_label is not None and found.largest_label < 0:
        told = f"every label is {ignore_index}, which counts for nothing (run.ignore_index)"
        hint = "write labels, or ignore another number"
        raise errors.DataFault(table.file, told, field=table.name_of(_TARGET), hint=hint)
    if config.target == "next" and table.columns["input"].shape[1] < 2:
        raise errors.DataFault(
            table.file, "one token has no next one", field=table.name_of("input"),
            hint="write longer rows",
        )  # fmt: skip


class File:
    """Samples of a file: JSON, HDF5, pickle, torch, records, numpy, safetensors, Parquet, tokens.

    Maps a file's columns, looks at every sample once, and deals them out.
    """

    info = PluginInfo(name="file", kind=Kind.DATA, config=FileConfig, provides=provided)

    def __init__(self, config: FileConfig) -> None:
        self.config = config
        self._identity = Identity("file", config.on_change)
        self._advised = False

    @hookimpl
    def measure(self, run: Run, step: Step) -> Mapping[str, float]:
        """Of the cache, where there is one: share of reads it served, loads and their seconds."""
        del step
        if not self.config.cache_size or not isinstance(run.data, FileData):
            return {}
        figures = run.data.get_cache_stats()
        return {f"cache_{name}": figures[name] for name in ("hit_rate", "loads", "seconds")}

    @hookimpl
    def on_epoch_end(self, run: Run) -> None:
        """Say once when the cache does not help."""
        advice = run.data.cache_advice() if isinstance(run.data, FileData) else None
        if advice is not None and not self._advised:
            self._advised = True
            run.tell("cache_useless", f"data.file: {advice}")

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
        table = open_file(self.config)
        self._identity.set(str(table.file), table.content, len(table))
        rank, world = run.strategy.rank, run.strategy.world_size
        data = deal(
            table, self.config, run.seed,
            ignore_index=run.settings.ignore_index, rank=rank, world=world,
        )  # fmt: skip
        self._tell(run, data)
        return data

    def _tell(self, run: Run, data: FileData) -> None:
        """What whoever reads the log should know of the file."""
        table = data.table
        if self.config.trust_pickle and table.format in ("pickle", "torch"):
            told = f"data.file: {table.file} is a pickle and was run as it is, on trust"
            run.tell("pickle_trusted", told, sha256=table.content)
        if data.left_out:
            count = sum(data.left_out.values())
            words = ", ".join(f"{reason} {number}" for reason, number in data.left_out.items())
            told = f"data.file: {count} of {len(table)} samples are left out: {words}"
            run.tell("samples_left_out", told, left_out=count, kept=len(table) - count)
        advice = data.shuffle_advice()
        if advice is not None:
            run.tell("shuffle_narrow", f"data.file: {advice}")
