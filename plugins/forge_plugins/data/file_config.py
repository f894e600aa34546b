"""What `data.file` is told."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Final, Literal

from msgspec import Meta

from forge_plugins.data.settings import OnChange
from forge_plugins.formats import registry

_CLASSES, _PIXELS = 10, 17  # of the shipped digits: labels 0 .. 9, pixels 0 .. 16
SHIPPED: Final = "shipped:"
"""Before the name of a data file that comes with the package."""


IGNORE_INDEX: Final = -100
"""The integer target that counts for nothing, where no run says another one."""


_TARGET: Final = "target"


@dataclass(frozen=True, kw_only=True)
class FileConfig:
    """Which file, what its fields are, and how it is dealt out."""

    renamed: ClassVar[Mapping[str, str]] = {"integers": "token_dtype", "length": "sequence_length"}

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
                    "csv",
                    "tsv",
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
        Annotated[str, Meta(min_length=1)]
        | Annotated[tuple[Annotated[str, Meta(min_length=1)], ...], Meta(min_length=1)]
        | None,
        Meta(
            description="the column or field that is the input, as the file names it, or a list of "
            'several (glob patterns too: ["*"] is all but the target), each a number or a kind of '
            "words; in HDF5 also a path such as train/x; columns that are not named here are not "
            "read; null: input, and of CSV and TSV all columns that say something"
        ),
    ] = None
    target_column: Annotated[
        str, Meta(min_length=1, description="the column or field that is the target")
    ] = "target"
    missing: Annotated[
        Literal["fill", "leave_out", "refuse"],
        Meta(
            description="values that are missing in named columns: the median of the training "
            "share, or none of the kinds of words; or the record is left out; or refused"
        ),
    ] = "fill"
    scale: Annotated[
        Literal["standard", "none"] | None,
        Meta(
            description="standard: inputs have a mean of 0 and a deviation of 1 in the training "
            "share; null: standard for named columns, none for others"
        ),
    ] = None
    target_scale: Annotated[
        Literal["standard", "none"],
        Meta(
            description="the same for targets that are numbers: metrics are then in deviations; "
            "forge predict gives the target's own unit"
        ),
    ] = "none"
    stratified: Annotated[
        bool,
        Meta(description="split so that each class has its share in training and in validation"),
    ] = False
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
        bool,
        Meta(description="keep worker processes between epochs; false: start them again for each"),
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
        Meta(
            ge=0,
            lt=1,
            description="fraction of the samples, drawn at random, that is kept for validation",
        ),
    ] = 0.1
    split_seed: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(description="seed of the split; null: the run's seed"),
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
    token_dtype: Annotated[
        Literal["uint8", "uint16", "uint32", "int32"],
        Meta(description="type of a token; format tokens"),
    ] = "uint16"  # noqa: S105  no password
    sequence_length: Annotated[
        int, Meta(ge=1, le=65536, description="tokens in a sequence of the format tokens")
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
        self._check_columns()
        if self.path is not None:
            return
        if self.format not in ("auto", "binary"):
            raise ValueError(f"format: {self.format} needs a path; the shipped digits are binary")
        if self.classes is not None and self.classes < _CLASSES:
            raise ValueError(f"the shipped digits have {_CLASSES} classes, not {self.classes}")
        if self.vocabulary is not None and self.vocabulary < _PIXELS:
            raise ValueError(f"the shipped digits have {_PIXELS} tokens, not {self.vocabulary}")

    def _check_columns(self) -> None:
        if self.stratified and (self.target != "class" or self.streaming):
            raise ValueError("stratified needs target: class, and streaming: false")
        if self.target_scale != "none" and self.target != "number":
            raise ValueError("target_scale is read with target: number")
        if self.input == "tokens" and (self.scale == "standard" or self.columns is not None):
            raise ValueError("scale and lists of columns need input: features")

    @property
    def columns(self) -> tuple[str, ...] | None:
        """The columns that are named in a list; None where there is no list."""
        return self.input_column if isinstance(self.input_column, tuple) else None


def _check_format(name: str) -> None:
    known = ("auto", *registry.names())
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"format: {name} is not installed{meant} there are: {', '.join(known)}")


def provided(config: FileConfig) -> tuple[str, ...]:
    """What the settings say of the data."""
    answers = {"class": "data:classes", "next": "data:classes", "number": "data:numbers"}
    form = f"data:{config.input}"
    return (form, answers[config.target]) if config.target in answers else (form,)
