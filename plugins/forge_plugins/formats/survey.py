"""A table looked at part by part: what `quality` finds, in memory that does not grow with it."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
from numpy.typing import NDArray

from forge_plugins.formats.quality import REASONS, Inputs, Target, assess, outlier_limits
from forge_plugins.formats.table import Table

PART_BYTES: Final = 2**23
"""Of numbers looked at at a time; repeats are found within such a part."""
_PART: Final = 2**16


@dataclass(frozen=True)
class Survey:
    """What `Assessment` tells, at one threshold.

    Args:
        threshold: of the quality.
        kept_count: samples that are not below it.
        index: their numbers, shape (kept_count,), mapped; None when all are kept.
        counts: samples left out by first reason.
        first_unusable: the first kept sample that cannot be trained on, and why.
        largest_label: of the usable samples; None when targets are no classes.
        largest_token: of the usable samples; None when inputs are no tokens.
    """

    threshold: float
    kept_count: int
    index: NDArray[np.int64] | None
    counts: dict[str, int]
    first_unusable: tuple[int, str] | None
    largest_label: int | None
    largest_token: int | None

    def left_out(self, threshold: float) -> dict[str, int]:
        """How many samples are below the threshold, each counted under its first reason."""
        assert threshold == self.threshold
        return self.counts

    def unusable(self, threshold: float) -> tuple[int, str] | None:
        """The first kept sample that cannot be trained on, and why."""
        assert threshold == self.threshold
        return self.first_unusable


def survey(
    table: Table,
    *,
    inputs: Inputs,
    target: Target,
    classes: int | None,
    vocabulary: int | None,
    threshold: float,
    folder: Path,
) -> Survey:
    """Look at every number of a table once; repeats are found within parts of `PART_BYTES`.

    Args:
        table: the samples.
        inputs: see `assess`, like those that follow.
        target: see `assess`.
        classes: see `assess`.
        vocabulary: see `assess`.
        threshold: samples of less quality are left out; 0: none is.
        folder: where the numbers of the kept samples lie, in a file without a name.

    Raises:
        DataFault: see `assess`.
    """
    thorough = threshold > 0
    limits = outlier_limits(table) if thorough and inputs == "features" else None
    counts: Counter[str] = Counter()
    unusable: tuple[int, str] | None = None
    largest: dict[str, int | None] = {"label": None, "token": None}
    kept = 0
    row = sum(int(np.prod(c.shape[1:])) * c.dtype.itemsize for c in table.columns.values())
    step = max(1, min(_PART, PART_BYTES // row))
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as numbers:
        for begin in range(0, len(table), step):
            part = _part(table, begin, begin + step)
            found = assess(
                part, inputs=inputs, target=target, classes=classes, vocabulary=vocabulary,
                thorough=thorough, limits=limits,
            )  # fmt: skip
            counts.update(found.left_out(threshold))
            here = found.unusable(threshold)
            if unusable is None and here is not None:
                unusable = begin + here[0], here[1]
            for name, value in (("label", found.largest_label), ("token", found.largest_token)):
                known = largest[name]
                largest[name] = value if known is None or value is None else max(known, value)
            chosen = found.kept(threshold)
            kept += len(chosen)
            if thorough:
                numbers.write((chosen + begin).tobytes())
        index = _mapped(numbers, kept) if thorough and kept < len(table) else None
    told = {reason: counts[reason] for reason in REASONS if counts[reason]}
    return Survey(threshold, kept, index, told, unusable, largest["label"], largest["token"])


def _part(table: Table, begin: int, end: int) -> Table:
    columns: dict[str, Any] = {name: column[begin:end] for name, column in table.columns.items()}
    problems = None if table.problems is None else table.problems[begin:end]
    return Table(table.file, table.format, columns, problems)


def _mapped(numbers: IO[bytes], count: int) -> NDArray[np.int64]:
    """The written numbers; the mapping holds the file that has no name."""
    numbers.flush()
    if not count:
        return np.zeros(0, np.int64)
    return np.memmap(numbers, np.int64, "r", 0, (count,))
