"""How good each sample of a table is, from 0 to 1, and why.

A sample's quality is the share of its numbers that pass, and 0 when the sample as a whole is no
use. It says nothing of wrong labels: a label inside the range counts as right.

    missing field, wrong type,
    wrong shape, wrong length                0   noted by a lenient reading; a length is that of a
                                                 plain list
    label out of range                       0   not an integer in 0 .. classes - 1, nor the one
                                                 that counts for nothing
    token out of range                       0   not an integer in 0 .. vocabulary - 1
    duplicate                                0   the same numbers as an earlier sample
    not finite                               a number that is NaN or infinite does not pass
    outlier                                  a number further than 10 robust deviations (1.4826
                                             times the median distance from the median) from its
                                             column's median, both of records drawn from the
                                             whole file, does not pass; not below 100 samples,
                                             nor in a column that is mostly one value
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from forge_plugins.formats.columns.exact import check_exact
from forge_plugins.formats.columns.table import PROBLEMS, Column, Rows, Table, take
from forge_plugins.formats.errors import DataError

Inputs = Literal["features", "tokens"]
Target = Literal["class", "number", "next", "none"]
Limits = tuple[Column, Column]
"""The smallest and the largest number of each column that is no outlier."""

REASONS: Final = (
    *PROBLEMS, "label out of range", "token out of range", "duplicate", "not finite", "outlier",
)  # fmt: skip
"""In the order in which a sample that has several is counted."""
_LABELS: Final = ("label out of range", "token out of range")
MAX_CLASSES: Final = 2**20
"""Classes or tokens that are counted from the data; more must be asked for."""
_DEVIATIONS: Final = 10.0
_FEW: Final = 100
_SAMPLED: Final = 4096
_BLOCK: Final = 2**22


@dataclass(frozen=True)
class Assessment:
    """The qualities of a table's samples.

    Args:
        scores: in [0, 1], shape (samples,).
        found: by reason, which samples have it, shape (samples,).
        largest_label: of the usable samples; None when targets are no classes.
        largest_token: of the usable samples; None when inputs are no tokens.
    """

    scores: NDArray[np.float32]
    found: dict[str, NDArray[np.bool_]]
    largest_label: int | None
    largest_token: int | None

    def kept(self, threshold: float) -> NDArray[np.int64]:
        """Samples that are not below the threshold, in order."""
        return np.flatnonzero(self.scores >= threshold)

    def left_out(self, threshold: float) -> dict[str, int]:
        """How many samples are below the threshold, each counted under its first reason."""
        open_ones = self.scores < threshold
        counts = {}
        for reason in REASONS:
            hit = open_ones & self.found[reason]
            if count := int(hit.sum()):
                counts[reason] = count
            open_ones = open_ones & ~hit
        return counts

    def unusable(self, threshold: float) -> tuple[int, str] | None:
        """The first kept sample that cannot be trained on, and why."""
        kept = self.scores >= threshold
        first: tuple[int, str] | None = None
        for reason in (*PROBLEMS, *_LABELS, "not finite"):
            hits = np.flatnonzero(self.found[reason] & kept)
            if len(hits) and (first is None or int(hits[0]) < first[0]):
                first = int(hits[0]), reason
        return first


def check_form(table: Table, inputs: Inputs, target: Target) -> None:
    """Whether the columns are of the form that is asked for.

    Raises:
        DataError: there is no target, or its shape does not fit.
    """

    def refused(role: str, message: str, hint: str) -> DataError:
        return DataError(table.file, message, field=table.name_of(role), hint=hint)

    shape = table.columns["input"].shape
    if inputs == "tokens":
        if len(shape) != 2:
            told = f"tokens need the shape (samples, length); it is {list(shape)}"
            raise refused("input", told, "set input: features, or write rows of tokens")
        if table.columns["input"].dtype.kind == "f":
            told = "tokens are integers; these are floats"
            raise refused("input", told, "set input: features, or write integers")
    if target == "none" or (target == "next" and "target" not in table.columns):
        return
    if "target" not in table.columns:
        fault = table.without("target")
        raise refused("target", fault.message, f"{fault.hint}; without any, set target: none")
    result = table.columns["target"].shape
    fits = {
        "class": result[1:] in ((), (1,)) or (inputs == "tokens" and result == shape),
        "number": len(result) <= 2,
        "next": result == shape,
    }[target]
    if not fits:
        told = f"the shape {list(result)} is not one of target: {target}"
        raise refused("target", told, "write one target for each sample, or change target")


def check_floats(table: Table, inputs: Inputs, target: Target) -> None:
    """Whether what becomes 32-bit floats is what it was, as far as it is integers.

    Args:
        table: the samples; those with a defect do not count.
        inputs: whether inputs are features, which become floats, or tokens.
        target: what targets are; numbers become floats.

    Raises:
        DataError: two different integers would be one number.
    """
    there = ["input"] if inputs == "features" else []
    if target == "number" and "target" in table.columns:
        there.append("target")

    def counts(number: int) -> bool:
        return table.problems is None or not table.problems[number]

    for role in there:
        column = table.columns[role]
        if column.dtype.kind in "iu":
            for rows, block in _blocks(column, column.dtype):
                name = table.name_of(role)
                check_exact(table.file, name, block, np.dtype(np.float32), rows.start, counts)


def assess(
    table: Table,
    *,
    inputs: Inputs = "features",
    target: Target = "none",
    classes: int | None = None,
    vocabulary: int | None = None,
    thorough: bool = True,
    limits: Limits | None = None,
    ignore: int | None = None,
) -> Assessment:
    """Look at every number of a table once, block by block.

    Args:
        table: the samples.
        inputs: whether inputs are features or tokens.
        target: what targets are.
        classes: labels are below it; None: any.
        vocabulary: tokens are below it; None: any.
        thorough: also look for duplicates and outliers.
        limits: of inputs that are no outliers, when the table is a part of another; None: from
            this table.
        ignore: an integer target that counts for nothing (padding) and is no label; None: none.

    Raises:
        DataError: see `check_form`; or labels or tokens are too large to be counted from the data.
    """
    check_form(table, inputs, target)
    count = len(table)
    result = {reason: np.zeros(count, np.bool_) for reason in REASONS}
    for number, problem in enumerate(PROBLEMS):
        if table.problems is not None:
            result[problem] = np.asarray(table.problems) == number + 1
    names = ["input"] if target == "none" or "target" not in table.columns else ["input", "target"]
    bad, all_values = np.zeros(count, np.int64), 0
    broken = np.logical_or.reduce([result[problem] for problem in PROBLEMS])
    for name in names:
        column = table.columns[name]
        all_values += int(np.prod(column.shape[1:]))
        if name == "input" and inputs == "tokens":
            result["token out of range"] |= _outside(column, vocabulary) & ~broken
        elif name == "target" and target in ("class", "next"):
            limit = vocabulary if target == "next" else classes
            result["label out of range"] |= _outside(column, limit, ignore) & ~broken
        else:
            own = _own_limits(column, broken, limits) if thorough and name == "input" else None
            for rows, block in _blocks(column):
                infinite = ~np.isfinite(block)
                strange = np.zeros_like(infinite)
                if own is not None:
                    strange = ~infinite & ((block < own[0]) | (block > own[1]))
                result["not finite"][rows] |= infinite.any(1)
                result["outlier"][rows] |= strange.any(1)
                bad[rows] += (infinite | strange).sum(1)
    if thorough:
        result["duplicate"] = _duplicates([table.columns[name] for name in names]) & ~broken
    hard = np.logical_or.reduce([result[reason] for reason in (*PROBLEMS, *_LABELS, "duplicate")])
    scores = np.where(hard, 0.0, 1.0 - bad / all_values).astype(np.float32)
    usable = ~(broken | result["label out of range"] | result["token out of range"])
    labels = "target" in names and target in ("class", "next")
    return Assessment(
        scores,
        result,
        _largest(table, "target", usable, "classes", classes, ignore) if labels else None,
        _largest(table, "input", usable, "vocabulary", vocabulary) if inputs == "tokens" else None,
    )


def _blocks(
    column: Column | Rows, dtype: Any = np.float32, numbers: int = _BLOCK
) -> Iterator[tuple[slice, Column]]:
    """Rows of a column as (rows, numbers), a few megabytes at a time."""
    width = int(np.prod(column.shape[1:]))
    step = max(1, numbers // max(1, width))
    for begin in range(0, len(column), step):
        rows = slice(begin, min(begin + step, len(column)))
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is found as infinite
            yield rows, np.asarray(column[rows]).astype(dtype, copy=False).reshape(-1, width)


def _outside(
    column: Column | Rows, limit: int | None, ignore: int | None = None
) -> NDArray[np.bool_]:
    """Which rows hold anything but integers in 0 .. limit - 1 and the ignored one."""
    outside = np.zeros(len(column), np.bool_)
    for rows, block in _blocks(column, column.dtype):
        wrong = np.zeros(block.shape, np.bool_)
        if block.dtype.kind == "f":
            wrong |= ~np.isfinite(block) | (block != np.floor(block))
        if block.dtype.kind != "b":
            wrong |= block < 0
            if limit is not None:
                wrong |= block >= limit
        if ignore is not None:
            wrong &= block != ignore
        outside[rows] = wrong.any(1)
    return outside


def _largest(
    table: Table,
    role: str,
    usable: NDArray[np.bool_],
    setting: str,
    given: int | None,
    ignore: int | None = None,
) -> int:
    """The largest number of the usable samples; -1 when there is none that counts."""
    column = table.columns[role]
    largest = -1
    for rows, block in _blocks(column, column.dtype):
        good = block[usable[rows]]
        good = good if ignore is None else good[good != ignore]
        largest = max(largest, int(good.max())) if good.size else largest
    if given is None and largest >= MAX_CLASSES:
        raise DataError(
            table.file,
            f"has {largest}, too large to count {setting} from it",
            field=table.name_of(role),
            hint=f"say how many {setting} there are, or mend the file",
        )
    return largest


def outlier_limits(table: Table) -> Limits | None:
    """The limits of a whole table's inputs; None below 100 samples."""
    return _limits(table.columns["input"], table.problems)


def _own_limits(
    column: Column | Rows, broken: NDArray[np.bool_], given: Limits | None
) -> Limits | None:
    return _limits(column, broken if broken.any() else None) if given is None else given


def _limits(column: Column | Rows, broken: Column | None) -> Limits | None:
    """Ten robust deviations around the median of every number of each column.

    Of records drawn at random from the whole file: its parts may be in another order of size
    (files are sorted), and what is strange is so beside all. 4,096 tell the median to a fiftieth of
    a deviation and the deviation to two hundredths. Median and distance from it: a mean and a
    deviation are moved by what they are to find (one number of 1e9 in a thousand hides all others),
    these only by half of the numbers. They are of all samples, before the split, which needs to
    know what is left out.
    """
    count, drawn = len(column), np.arange(min(len(column), _SAMPLED))
    if count > _SAMPLED:
        generator = np.random.Generator(np.random.PCG64(0))
        drawn = np.sort(generator.choice(count, _SAMPLED, replace=False))
    drawn = drawn if broken is None else drawn[~np.asarray(broken[drawn], np.bool_)]
    if len(drawn) < _FEW:
        return None
    sample = take(column, drawn).astype(np.float64)
    sample = sample.reshape(len(sample), -1)
    sample[~np.isfinite(sample)] = np.nan
    sample[:, ~(~np.isnan(sample)).any(0)] = 0.0
    middle = np.nanmedian(sample, 0)
    reach = _DEVIATIONS * 1.4826 * np.nanmedian(np.abs(sample - middle), 0)
    reach[reach == 0] = np.inf  # mostly one value: its spread is not known
    return middle - reach, middle + reach


def _duplicates(columns: list[Column | Rows]) -> NDArray[np.bool_]:
    """Which rows repeat an earlier one, all columns together; equal numbers are confirmed."""
    sums = np.zeros(len(columns[0]), np.uint64)
    generator = np.random.Generator(np.random.PCG64(0))
    for column in columns:
        width = int(np.prod(column.shape[1:]))
        factors = generator.integers(0, 2**63, width, dtype=np.uint64) * 2 + 1
        for rows, block in _blocks(column, column.dtype):
            plain = np.ascontiguousarray(block)
            bits = plain.view(f"u{plain.dtype.itemsize}").astype(np.uint64)
            mixed = (bits ^ (bits >> np.uint64(15))) * np.uint64(0x9E3779B97F4A7C15)
            sums[rows] += (mixed ^ (mixed >> np.uint64(29))) @ factors
    _, first, back = np.unique(sums, return_index=True, return_inverse=True)
    earlier = first[back]
    repeats = np.flatnonzero(earlier != np.arange(len(sums)))
    result = np.zeros(len(sums), np.bool_)
    for begin in range(0, len(repeats), 4096):
        some = repeats[begin : begin + 4096]
        same = np.ones(len(some), np.bool_)
        for column in columns:
            equal = take(column, some) == take(column, earlier[some])
            same &= equal.reshape(len(some), -1).all(1)
        result[some] = same
    return result
