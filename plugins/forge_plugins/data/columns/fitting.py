"""Which columns are inputs, and what they become: fitted on the records that are trained on."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from forge_kernel.api import LazyModule
from forge_plugins.data.columns.preparation import (
    InputColumn,
    Preparation,
    TargetColumn,
    not_numbers,
    shown,
    words_of,
)

if TYPE_CHECKING:
    import numpy as np

    from forge_plugins.data.file_config import FileConfig
    from forge_plugins.formats import errors
    from forge_plugins.formats.columns import table as tables
    from forge_plugins.formats.frame import Frame
else:
    np = LazyModule("numpy")
    errors = LazyModule("forge_plugins.formats.errors")
    tables = LazyModule("forge_plugins.formats.columns.table")

_FEW: Final = 20  # records from which a column can be seen to name them
_NAMES: Final = re.compile(r"(.*[_ .-])?(id|key|index|row|uuid|guid|nr|no|number)|column_1", re.I)
_LEAVE: Final = "name the columns that are read with input_column"


def chosen_inputs(
    frame: Frame, asked: Sequence[str] | None, target: str | None
) -> tuple[list[str], dict[str, str]]:
    """Names of the columns that are inputs, and why others are none.

    Args:
        frame: the file.
        asked: names or glob patterns; None: all but the target, without those that say nothing.
        target: name of the target.

    Raises:
        DataError: a column is not there, or none is left.
    """
    if asked is not None:
        return _named(frame, asked, target), {}
    reasons = {
        name: reason
        for name in frame.columns
        if name != target and (reason := _useless(frame, name)) is not None
    }
    names = [name for name in frame.columns if name != target and name not in reasons]
    if not names:
        why = "; ".join(f"{name}: {reason}" for name, reason in [*reasons.items()][:4])
        message = f"no column is left to be an input ({why})" if why else "there is no other column"
        raise errors.DataError(frame.file, message, field=target, hint=_LEAVE)
    return names, reasons


def _named(frame: Frame, asked: Sequence[str], target: str | None) -> list[str]:
    result: dict[str, None] = {}
    for pattern in asked:
        if pattern in frame.columns:
            result[pattern] = None
            continue
        hits = [name for name in frame.columns if fnmatch.fnmatchcase(name, pattern)]
        if not hits:
            raise tables.absent(frame.file, pattern, [*frame.columns])
        result.update(dict.fromkeys(name for name in hits if name != target))
    if target in result:
        message = "is the target and among the inputs, where it gives the answer away"
        hint = "leave it out of input_column"
        raise errors.DataError(frame.file, message, field=target, hint=hint)
    for name in result:
        _check_named(frame, name)
    return [*result]


def _check_named(frame: Frame, name: str) -> None:
    """Whether a column that a user names says something.

    Raises:
        DataError: it is empty, holds one value or names rows.
    """
    about = frame.need(name)
    if about["kind"] == "empty":
        message, hint = "holds no value at all", "leave it out of input_column"
        raise errors.DataError(frame.file, message, field=name, hint=hint)
    if about["kind"] == "text" and about["distinct"] > len(about["values"]):
        message = f"holds {about['distinct']} different words, too many to tell apart"
        raise errors.DataError(frame.file, message, field=name, hint="leave it out of input_column")


def _useless(frame: Frame, name: str) -> str | None:
    """Why a column that nobody named is no input; None where it is one."""
    about, count = frame.about[name], len(frame)
    kind, there = about["kind"], count - about["missing"]
    distinct = about.get("distinct", 0)
    if kind in ("empty", "other"):
        return "no value in it" if kind == "empty" else about["type"]
    if distinct < 2 and not about["missing"]:
        return "always the same"
    if "stray" in about:
        return None  # refused when it is fitted, with its place
    if kind == "text" and there > _FEW and distinct > max(_FEW, there // 2):
        return f"names rows: {distinct} different words in {there}"
    whole = kind == "integer" and distinct == count > _FEW
    if whole and (_NAMES.fullmatch(name) or _counts_up(frame, name)):
        return "names rows: a different integer in each"
    return None


def _counts_up(frame: Frame, name: str) -> bool:
    numbers = np.asarray(frame.columns[name][:])
    return bool(numbers.dtype.kind in "iu" and (np.diff(numbers) == 1).all())


def usable_rows(frame: Frame, names: Sequence[str], config: FileConfig) -> Any:
    """Numbers of the records that are used, by the rule for missing values.

    Raises:
        DataError: a value is missing and the rule is to refuse; or no record is left.
    """
    every = np.arange(len(frame), dtype=np.int64)
    about = {name: frame.need(name) for name in names}
    if config.missing == "fill":
        return every
    kept = np.ones(len(frame), np.bool_)
    for name in names:
        if not about[name]["missing"]:
            continue
        gaps = missing_rows(frame, name)
        if config.missing == "refuse":
            message = f"{int(gaps.sum())} records have no value"
            hint = "fill them in, or set missing: fill or leave_out"
            first = int(np.flatnonzero(gaps)[0])
            raise errors.DataError(frame.file, message, record=first, field=name, hint=hint)
        kept &= ~gaps
    if not kept.any():
        message = "no record has a value in each column"
        raise errors.DataError(frame.file, message, hint=f"set missing: fill, or {_LEAVE}")
    return every[kept]


def missing_rows(frame: Frame, name: str) -> Any:
    """Which records have no value in a column, shape (records,)."""
    column = np.asarray(frame.columns[name][:])
    if frame.about[name]["kind"] == "text":
        return column < 0
    gaps = np.isnan(column) if column.dtype.kind == "f" else np.zeros(column.shape, np.bool_)
    return gaps.reshape(len(column), -1).any(axis=1)


def fit_inputs(frame: Frame, names: Sequence[str], rows: Any, *, scale: bool) -> list[InputColumn]:
    """What columns become, by some records.

    Args:
        frame: the file.
        names: of the columns.
        rows: numbers of the records that are trained on.
        scale: to a mean of 0 and a deviation of 1.

    Raises:
        DataError: words stand among numbers, or a number is infinite or too large.
    """
    return [_fit_input(frame, name, rows, scale=scale) for name in names]


def _fit_input(frame: Frame, name: str, rows: Any, *, scale: bool) -> InputColumn:
    about = frame.need(name)
    if "stray" in about:
        raise not_numbers(frame, name, about)
    if about["kind"] == "text":
        codes = np.asarray(frame.columns[name][:])[rows]
        used = np.unique(codes[codes >= 0]).tolist()
        return InputColumn(name, tuple(about["values"][code] for code in used) or ("",))
    if "too_large" in about:
        message = "is an integer beyond 2^53, which a float does not hold"
        hint = f"{_LEAVE}, without this one"
        raise errors.DataError(
            frame.file, message, record=about["too_large"], field=name, hint=hint
        )
    whole = np.asarray(frame.columns[name][:], dtype=np.float64)
    infinite = np.isinf(whole).reshape(len(whole), -1).any(axis=1)
    if infinite.any():
        first, hint = int(np.flatnonzero(infinite)[0]), "write a number, or leave it empty"
        raise errors.DataError(frame.file, "is infinite", record=first, field=name, hint=hint)
    numbers = whole[rows]
    shape = numbers.shape[1:]
    there = numbers[~np.isnan(numbers)]
    fill = float(np.median(there)) if len(there) else 0.0
    if not scale:
        return InputColumn(name, (), shape, fill=fill)
    axis = 0 if len(shape) == 1 else None  # pictures have one mean for all of their numbers
    filled = np.where(np.isnan(numbers), fill, numbers)
    mean = np.atleast_1d(filled.mean(axis=axis))
    deviation = np.atleast_1d(filled.std(axis=axis))
    tiny = deviation <= 1e-9 * np.maximum(1.0, np.abs(mean))  # constant but for rounding
    deviation = np.where(tiny, 1.0, deviation)
    return InputColumn(name, (), shape, tuple(mean.tolist()), tuple(deviation.tolist()), fill)


def class_labels(frame: Frame, name: str, rows: Any) -> tuple[str, ...]:
    """The names of a target's classes: numbers by size, words by their letters.

    Raises:
        DataError: there is no such column, its values are no classes, or all are alike.
    """
    about = frame.need(name)
    column = np.asarray(frame.columns[name][:])
    if column.reshape(len(column), -1).shape[1] != 1:
        message = f"has {list(column.shape[1:])} numbers in a record, where a label is one"
        raise errors.DataError(frame.file, message, field=name, hint="name another target_column")
    if about["kind"] == "number":
        part = (column != np.floor(column)) & ~np.isnan(column)
        if part.any():
            first = int(np.flatnonzero(part)[0])
            message = f"holds {column[first].item():g}, and classes are integers or words"
            hint = "set target: number to predict it"
            raise errors.DataError(frame.file, message, record=first, field=name, hint=hint)
    if about["kind"] == "text" and about["distinct"] > len(about["values"]):
        message = f"holds {about['distinct']} different words, too many for classes"
        raise errors.DataError(frame.file, message, field=name, hint="name another target_column")
    there = {words[row] for words in [words_of(frame, name)] for row in rows.tolist()} - {None}
    labels = [str(word) for word in there]
    if about["kind"] == "text":
        labels.sort()
    elif about["kind"] == "boolean":
        labels.sort(key=[*about["values"]].index)
    else:
        labels.sort(key=float)
    if len(labels) < 2:
        what = f"is '{labels[0]}' in each record" if labels else "holds no value at all"
        message, hint = f"{what}: there is nothing to tell apart", "name another target_column"
        raise errors.DataError(frame.file, message, field=name, hint=hint)
    return tuple(labels)


def check_seen(frame: Frame, name: str, labels: tuple[str, ...], numbers: Any, rows: Any) -> None:
    """Whether each class is trained on.

    Args:
        frame: the file.
        name: of the target.
        labels: names of the classes.
        numbers: of all records that are used, their labels.
        rows: of them, those that are trained on.

    Raises:
        DataError: a class stands in the validation share alone.
    """
    seen = np.zeros(len(labels), np.bool_)
    seen[numbers[rows]] = True
    for at in np.flatnonzero(~seen).tolist():
        record = int(np.flatnonzero(numbers == at)[0])
        message = (
            f"the label '{labels[at]}' falls into the validation share alone, and is never learned"
        )
        hint = "set stratified: true, another split_seed, or leave these records out"
        raise errors.DataError(frame.file, message, record=record, field=name, hint=hint)


def fit_target(
    frame: Frame, rows: Any, config: FileConfig, labels: tuple[str, ...]
) -> TargetColumn | None:
    """What the target becomes.

    Raises:
        DataError: words stand where numbers are asked.
    """
    if config.target == "none":
        return None
    name = config.target_column
    if config.target == "class":
        return TargetColumn(name, labels)
    about = frame.need(name)
    if about["kind"] == "text":
        raise not_numbers(frame, name, about)
    if config.target_scale == "none":
        return TargetColumn(name)
    numbers = np.asarray(frame.columns[name][:], dtype=np.float64)[rows]
    return TargetColumn(name, (), float(np.nanmean(numbers)), float(np.nanstd(numbers)) or 1.0)


def said(reasons: Mapping[str, str]) -> str:
    """Columns that are no inputs, and why."""
    names = tuple(f"{name} ({reason})" for name, reason in reasons.items())
    return shown(names).replace('"', "").replace("'", "")


def fitted(
    frame: Frame, names: Sequence[str], rows: Any, config: FileConfig, labels: tuple[str, ...]
) -> Preparation:
    """What a file becomes, by the records that are trained on."""
    inputs = fit_inputs(frame, names, rows, scale=config.scale != "none")
    return Preparation(tuple(inputs), fit_target(frame, rows, config, labels))
