"""A file's named columns as a table of inputs and targets, prepared once and mapped from there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from forge_kernel.api import LazyModule, may_be_imported
from forge_plugins.data.columns.fitting import (
    check_seen,
    chosen_inputs,
    class_labels,
    fitted,
    missing_rows,
    usable_rows,
)
from forge_plugins.data.columns.preparation import Preparation, TargetColumn, words_of

if TYPE_CHECKING:
    import numpy as np

    from forge_plugins.data.file_config import FileConfig
    from forge_plugins.data.sampler import Sampler
    from forge_plugins.formats import errors, frame
    from forge_plugins.formats.columns import cache, column_writer
    from forge_plugins.formats.columns import table as tables
    from forge_plugins.formats.inspection import quality_scan
else:
    np = LazyModule("numpy")
    cache = LazyModule("forge_plugins.formats.columns.cache")
    column_writer = LazyModule("forge_plugins.formats.columns.column_writer")
    errors = LazyModule("forge_plugins.formats.errors")
    frame = LazyModule("forge_plugins.formats.frame")
    tables = LazyModule("forge_plugins.formats.columns.table")
    quality_scan = LazyModule("forge_plugins.formats.inspection.quality_scan")

_BLOCK: Final = 2**22
"""Numbers that are prepared at a time."""
Scan = Callable[["tables.Table"], "quality_scan.ScanResult"]
MakeSampler = Callable[["tables.Table", "quality_scan.ScanResult"], "Sampler"]


def open_named(
    config: FileConfig, file: Path, kept: Preparation | None = None
) -> frame.Frame | None:
    """A file whose columns are read by their names; None for one of an input and a target.

    Args:
        config: the settings.
        file: the file.
        kept: what a run has fitted, which names the columns.

    Raises:
        DataError: it cannot be read so.
    """
    known, usual = frame.has_frame(file, config.format, may_be_imported)
    by_name = kept is not None or usual or config.columns is not None or config.scale == "standard"
    if not by_name or config.input == "tokens":
        return None
    how: dict[str, Any] = {
        "cache_dir": None if config.cache_dir is None else Path(config.cache_dir),
        "verify": config.verify, "allowed": may_be_imported,
    }  # fmt: skip
    if known:
        return frame.open_frame(file, config.format, **how)
    names = [*(config.columns or (str(config.input_column or "input"),))]
    if kept is not None:
        names = [column.name for column in kept.inputs]
    if config.target != "none":
        names.append(config.target_column)
    return frame.frame_of_columns(file, config.format, names, **how)


@dataclass(frozen=True)
class Named:
    """Named columns, prepared.

    Args:
        table: of inputs and targets.
        preparation: what the columns became.
        scan: of a look at all samples, where the preparation needed one.
        notes: what the reader of the log should know, a sentence each.
    """

    table: tables.Table
    preparation: Preparation
    scan: quality_scan.ScanResult | None
    notes: tuple[str, ...]


def prepare(
    opened: frame.Frame,
    config: FileConfig,
    kept: Preparation | None,
    *,
    scan: Scan,
    sampler: MakeSampler,
) -> Named:
    """Fit on the records that are trained on, unless a run has kept what was fitted, and apply.

    Args:
        opened: the file.
        config: the settings.
        kept: what the run has fitted before.
        scan: looks at the samples of a table.
        sampler: tells which of them are trained on.

    Raises:
        DataError: the columns cannot be used so.
    """
    target = None if config.target == "none" else config.target_column
    if target is not None:
        opened.need(target)
    asked = config.columns
    if isinstance(config.input_column, str):
        asked = (config.input_column,)
    elif asked is None and not frame.has_frame(opened.file, config.format, may_be_imported)[0]:
        asked = ("input",)
    reasons: Mapping[str, str] = {}
    if kept is not None:
        names = [column.name for column in kept.inputs]
    else:
        names, reasons = chosen_inputs(opened, asked, target)
    rows = usable_rows(opened, [*names, *([target] if target else [])], config)
    notes = _notes(opened, config, names, reasons, len(rows))
    if kept is not None:
        return Named(applied(opened, kept, rows, config), kept, None, notes)
    labels = class_labels(opened, target, rows) if target and config.target == "class" else ()
    result = None
    if config.quality_threshold:  # what is left out falls to neither share
        everything = fitted(opened, names, rows, config, labels)
        whole = applied(opened, everything, rows, config)
        result = scan(whole)
        trained = sampler(whole, result).all_training()
    else:
        trained = sampler(*_all_kept(opened, target, labels, rows)).all_training()
    if labels and target is not None:
        column = TargetColumn(target, labels).numbers(opened, rows)
        index = None if result is None else result.index
        used = np.arange(len(rows)) if index is None else np.asarray(index)
        shares = np.searchsorted(used, trained)
        check_seen(opened, target, labels, column[used], shares)
    own = fitted(opened, names, rows[trained], config, labels)
    return Named(applied(opened, own, rows, config), own, result, notes)


def _all_kept(
    opened: frame.Frame, target: str | None, labels: tuple[str, ...], rows: Any
) -> tuple[tables.Table, quality_scan.ScanResult]:
    """What a sampler reads of a table of which no sample is left out."""
    columns: dict[str, Any] = {"input": np.zeros((len(rows), 1), np.float32)}
    if target is not None and labels:
        columns["target"] = TargetColumn(target, labels).numbers(opened, rows)
    table = tables.Table(opened.file, opened.format, columns)
    return table, quality_scan.ScanResult(0.0, len(rows), None, {}, None, None, None)


def _notes(
    opened: frame.Frame,
    config: FileConfig,
    names: list[str],
    reasons: Mapping[str, str],
    count: int,
) -> tuple[str, ...]:
    """What was found and decided."""
    notes = [f"{opened.file} is {opened.dialect}"] if opened.dialect else []
    if reasons:
        words = ", ".join(f"{name} ({reason})" for name, reason in reasons.items())
        notes.append(f"columns that are no inputs: {words}")
    gaps = {
        name: int(missing_rows(opened, name).sum())
        for name in names
        if opened.about[name]["missing"]
    }
    if gaps and config.missing == "fill":
        words = ", ".join(f"{name} ({number})" for name, number in gaps.items())
        notes.append(
            f"missing values are the median of the training share, or no kind of words: {words}"
        )
    if count < len(opened):
        notes.append(
            f"{len(opened) - count} of {len(opened)} records miss a value and are left out"
        )
    return tuple(notes)


def applied(
    opened: frame.Frame, preparation: Preparation, rows: Any, config: FileConfig
) -> tables.Table:
    """The table that columns become: written once, below the hash of what it depends on.

    Args:
        opened: the file.
        preparation: what its columns become.
        rows: numbers of the records that are used.
        config: where the table is kept.

    Raises:
        DataError: a column is not there, or is not what it was.
    """
    file = opened.file
    folder = cache.default_folder(file) if config.cache_dir is None else Path(config.cache_dir)
    chosen = "all" if len(rows) == len(opened) else config.missing
    settings = (opened.format, "prepared", preparation.digest, chosen, str(len(rows)))
    key = cache.content_key(opened.content, *settings)

    def fill(building: Path) -> dict[str, Any]:
        columns = column_writer.ColumnFolder(file, building)
        try:
            _write(opened, preparation, rows, columns)
            return columns.close()
        finally:
            columns.abandon()

    def check(_: Any) -> None:
        """All was looked at when it was written."""

    kept = cache.cached(folder, key, verify=config.verify) or cache.keep(
        file, folder, key, fill, check, verify=config.verify
    )
    names = {"input": ", ".join(column.name for column in preparation.inputs)}
    if preparation.target is not None:
        names["target"] = preparation.target.name
    others = sorted({*opened.columns} - {column.name for column in preparation.inputs})
    return tables.Table(
        file,
        opened.format,
        kept.columns,
        None,
        opened.content,
        None,
        settings,
        names,
        tuple(others),
    )


def _write(opened: frame.Frame, preparation: Preparation, rows: Any, columns: Any) -> None:
    width = max(1, int(np.prod(preparation.shape)))
    step = max(1, _BLOCK // width)
    whole = len(rows) == len(opened)
    for begin in range(0, len(opened), step):
        part = slice(begin, min(begin + step, len(opened)))
        numbers = preparation.inputs_of(opened, part)
        if not whole:
            inside = rows[(rows >= part.start) & (rows < part.stop)] - begin
            numbers = numbers[inside]
        if len(numbers):
            columns.append("input", numbers)
    if preparation.target is not None:
        columns.append("target", preparation.target.numbers(opened, rows))


def unknown_words(opened: frame.Frame, preparation: Preparation) -> dict[str, list[str]]:
    """By column, the words of a file that training never saw."""
    result = {column.name: column.unknown(opened) for column in preparation.inputs}
    return {name: words for name, words in result.items() if words}


__all__ = ["Named", "applied", "open_named", "prepare", "unknown_words", "words_of"]
