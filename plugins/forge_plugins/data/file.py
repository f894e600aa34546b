"""Samples from a file: CSV, JSON, HDF5, pickle, torch, records, numpy, Parquet, raw tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge_kernel.api import (
    Data,
    Kind,
    LazyModule,
    MetricInfo,
    PluginError,
    PluginInfo,
    Run,
    Step,
    hookimpl,
    may_be_imported,
)
from forge_plugins.data import workers
from forge_plugins.data.columns import kept_preparation, named_columns
from forge_plugins.data.columns.preparation import Preparation
from forge_plugins.data.file_batches import FileData, make_sampler
from forge_plugins.data.file_config import (
    _TARGET,
    IGNORE_INDEX,
    SHIPPED,
    FileConfig,
    provided,
)
from forge_plugins.data.fingerprint import Identity

if TYPE_CHECKING:
    from forge_plugins.formats import errors, frame, open_table
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


def data_file(path: str | None) -> Path:
    """The file that a setting means."""
    if path is None or path.startswith(SHIPPED):
        import forge_plugins

        name = (path or "shipped:digits.frec").removeprefix(SHIPPED)
        package = Path(forge_plugins.__path__[0])
        # an editable install has the pipelines at the root of its checkout
        top = package if (package / "pipelines").is_dir() else package.parent.parent
        return top / "pipelines" / "data" / name
    return Path(path)


def _input_name(config: FileConfig) -> str:
    assert config.columns is None, "several columns are read by name"
    return config.input_column if isinstance(config.input_column, str) else "input"


def open_named(config: FileConfig, kept: Preparation | None = None) -> frame.Frame | None:
    """A file whose columns are read by their names; None for one of an input and a target.

    Args:
        config: the settings.
        kept: what a run has fitted, which names the columns.

    Raises:
        PluginError: the file cannot be read as asked.
    """
    try:
        return named_columns.open_named(config, data_file(config.path), kept)
    except errors.DataError as error:
        raise PluginError(f"file: {error}") from error


def prepared(
    opened: frame.Frame,
    config: FileConfig,
    seed: int,
    kept: Preparation | None,
    ignore_index: int = IGNORE_INDEX,
) -> named_columns.Named:
    """Named columns as a table of inputs and targets.

    Args:
        opened: from `open_named`.
        config: the settings.
        seed: of the run.
        kept: what the run has fitted before; None: it is fitted now, on the training share.
        ignore_index: as for `to_batches`.

    Raises:
        PluginError: the columns cannot be used as asked.
    """  # fmt: skip
    try:
        return named_columns.prepare(
            opened, config, kept,
            scan=lambda table: _looked_at(table, config, ignore_index, floats=True),
            sampler=lambda table, scan: make_sampler(table, scan, config, seed),
        )  # fmt: skip
    except errors.DataError as error:
        raise PluginError(f"file: {error}") from error


def open_file(config: FileConfig) -> tables.Table:
    """The table that settings name.

    Raises:
        PluginError: the file cannot be read as asked.
    """
    reading = formats.Reading(
        input=_input_name(config),
        target=None if config.target == "none" else config.target_column,
        lenient=config.quality_threshold > 0, trust_pickle=config.trust_pickle,
        integers=config.token_dtype, length=config.sequence_length, streaming=config.streaming,
    )  # fmt: skip
    try:
        table = open_table.open_table(
            data_file(config.path),
            config.format,
            reading,
            cache_dir=None if config.cache_dir is None else Path(config.cache_dir),
            verify=config.verify,
            allowed=may_be_imported,
        )
        if config.target_column != _TARGET and _TARGET not in table.columns:
            raise table.without(_TARGET)
    except errors.DataError as error:
        raise PluginError(f"file: {error}") from error
    return table


def to_batches(
    table: tables.Table,
    config: FileConfig,
    seed: int,
    *,
    ignore_index: int = IGNORE_INDEX,
    scan: quality_scan.ScanResult | None = None,
    **options: Any,
) -> FileData:
    """A table's samples, looked at and ready to be dealt out.

    Args:
        table: from `open_file`.
        config: how they are dealt out.
        seed: of the run.
        ignore_index: an integer target that counts for nothing: it is no label, and stays as it is.
        scan: of a look at the samples that was made already.
        options: as for `FileData`.

    Raises:
        PluginError: a sample cannot be used, or too few are left.
    """
    floats = options.get("form") is None  # another form may keep integers
    try:
        result = scan or _looked_at(table, config, ignore_index, floats=floats)
        _check(table, result, config, ignore_index)
    except errors.DataError as error:
        raise PluginError(f"file: {error}") from error
    data = FileData(table, result, config, seed, **options)
    if not data.batches_per_epoch:
        raise PluginError(
            f"file: {table.file}: {data.sampler.training} samples are left to train on and a batch "
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
) -> quality_scan.ScanResult:
    asked = quality_scan.ScanOptions(
        inputs=config.input, target=config.target, classes=config.classes,
        vocabulary=config.vocabulary, threshold=config.quality_threshold, parts=config.streaming,
        ignore=ignore_index, floats=floats,
    )  # fmt: skip
    given = config.cache_dir
    folder = cache.default_folder(table.file) if given is None else Path(given)
    return quality_scan.scan(table, asked, folder)


def _check(
    table: tables.Table, scan: quality_scan.ScanResult, config: FileConfig, ignore_index: int
) -> None:
    if scan.unusable is not None:
        record, reason = scan.unusable
        role = {"label out of range": _TARGET, "token out of range": "input"}.get(reason)
        field = None if role is None else table.name_of(role)
        hint = "mend the record, or raise quality_threshold to leave such samples out"
        raise errors.DataError(
            table.file, f"cannot be used: {reason}", record=record, field=field, hint=hint
        )
    if scan.kept_count < (2 if config.validation_split else 1):
        message = f"{scan.kept_count} of {len(table)} samples are left: {scan.left_out}"
        hint = "lower quality_threshold or validation_split"
        raise errors.DataError(table.file, message, hint=hint)
    if scan.largest_label is not None and scan.largest_label < 0:
        message = f"every label is {ignore_index}, which counts for nothing (run.ignore_index)"
        hint = "write labels, or ignore another number"
        raise errors.DataError(table.file, message, field=table.name_of(_TARGET), hint=hint)
    if config.target == "next" and table.columns["input"].shape[1] < 2:
        raise errors.DataError(
            table.file, "one token has no next one", field=table.name_of("input"),
            hint="write longer rows",
        )  # fmt: skip


def foreign_code(config: FileConfig) -> list[tuple[str, bool]]:
    """A pickle that is run as it is may do whatever its author likes."""
    return [(f"the pickle {config.path} as it is", True)] if config.trust_pickle else []


class File(kept_preparation.KeepsPreparation):
    """Samples of a file: CSV, JSON, HDF5, pickle, torch, numpy, safetensors, Parquet, tokens.

    Maps a file's columns, looks at every sample once, and deals them out. Named columns are scaled,
    and words become numbers, by what the training share holds, which the run keeps.
    """

    info = PluginInfo(
        name="file",
        kind=Kind.DATA,
        config=FileConfig,
        provides=provided,
        foreign_code=foreign_code,
        metrics=(
            MetricInfo("cache_hit_rate", "share", title="Reads from the cache, share"),
            MetricInfo("cache_loads", title="Reads past the cache"),
            MetricInfo("cache_seconds", "s", title="Time for reads past the cache"),
        ),
    )

    def __init__(self, config: FileConfig) -> None:
        self.config = config
        self._identity = Identity("file", config.on_change)
        self._advised = False
        self.preparation = None

    @hookimpl
    def log_metrics(self, run: Run, step: Step) -> Mapping[str, float]:
        """Of the cache, where there is one: share of reads it served, loads and their seconds."""
        del step
        if not self.config.cache_size or not isinstance(run.data, FileData):
            return {}
        metrics = run.data.get_cache_stats()
        return {f"cache_{name}": metrics[name] for name in ("hit_rate", "loads", "seconds")}

    @hookimpl
    def on_epoch_end(self, run: Run) -> None:
        """Say once when the cache does not help."""
        advice = run.data.cache_advice() if isinstance(run.data, FileData) else None
        if advice is not None and not self._advised:
            self._advised = True
            run.emit_event("cache_useless", f"data.file: {advice}")

    @hookimpl
    def make_data(self, run: Run) -> Data:
        """The file's samples.

        Raises:
            PluginError: the file cannot be read as asked, or a sample cannot be used.
        """
        opened, options = open_named(self.config), dict[str, Any]()
        if opened is None:
            table = open_file(self.config)
        else:
            kept = self.preparation or kept_preparation.read(run.folder)
            own = prepared(opened, self.config, run.seed, kept, run.settings.ignore_index)
            table, self.preparation = own.table, own.preparation
            options = {"scan": own.scan, "preparation": own.preparation}
            if kept is None:
                kept_preparation.write(run.folder, own.preparation)
            for note in own.notes:
                run.emit_event("columns", f"data.file: {note}")
        self._identity.set(str(table.file), table.content, len(table))
        rank, world = run.strategy.rank, run.strategy.world_size
        data = to_batches(
            table, self.config, run.seed,
            ignore_index=run.settings.ignore_index, rank=rank, world=world, **options,
        )  # fmt: skip
        self._tell(run, data)
        return data

    def _tell(self, run: Run, data: FileData) -> None:
        """What whoever reads the log should know of the file."""
        table = data.table
        if self.config.trust_pickle and table.format in ("pickle", "torch"):
            message = f"data.file: {table.file} is a pickle and was run as it is, on trust"
            run.emit_event("pickle_trusted", message, sha256=table.content)
        if data.left_out:
            count = sum(data.left_out.values())
            words = ", ".join(f"{reason} {number}" for reason, number in data.left_out.items())
            message = f"data.file: {count} of {len(table)} samples are left out: {words}"
            run.emit_event("samples_left_out", message, left_out=count, kept=len(table) - count)
        advice = data.shuffle_advice()
        if advice is not None:
            run.emit_event("shuffle_narrow", f"data.file: {advice}")
