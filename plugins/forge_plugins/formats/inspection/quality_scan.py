"""What a look at all samples of a table has found, at one threshold of their quality."""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
from numpy.typing import NDArray

from forge_plugins.formats.columns.metadata_cache import Memos
from forge_plugins.formats.columns.table import Table
from forge_plugins.formats.errors import DataError
from forge_plugins.formats.inspection.quality import (
    REASONS,
    Assessment,
    Inputs,
    Target,
    assess,
    check_floats,
    check_form,
    outlier_limits,
)

PART_BYTES: Final = 2**23
"""Of numbers looked at at a time in parts; repeats are found within such a part."""
_PART: Final = 2**16
_VERSION: Final = "4"
"""Of what `assess` finds: a change needs another one."""


@dataclass(frozen=True)
class ScanResult:
    """What `Assessment` tells, at one threshold.

    Args:
        threshold: of the quality.
        kept_count: samples that are not below it.
        index: their numbers, shape (kept_count,); None when all are kept.
        left_out: samples below it, each counted under its first reason.
        unusable: the first kept sample that cannot be trained on, and why.
        largest_label: of the usable samples; None when targets are no classes.
        largest_token: of the usable samples; None when inputs are no tokens.
    """

    threshold: float
    kept_count: int
    index: NDArray[np.int64] | None
    left_out: dict[str, int]
    unusable: tuple[int, str] | None
    largest_label: int | None
    largest_token: int | None


def scanned(assessment: Assessment, threshold: float) -> ScanResult:
    """What an assessment of a whole table tells at a threshold."""
    kept = assessment.kept(threshold)
    index = None if len(kept) == len(assessment.scores) else kept
    return ScanResult(
        threshold, len(kept), index, assessment.left_out(threshold), assessment.unusable(threshold),
        assessment.largest_label, assessment.largest_token,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ScanOptions:
    """What is asked of a table's samples; see `assess`.

    Args:
        inputs: what inputs are.
        target: what targets are.
        classes: labels are below it.
        vocabulary: tokens are below it.
        threshold: samples of less quality are left out; 0: none is.
        ignore: an integer target that counts for nothing; None: none does.
        floats: inputs that are no tokens, and numbers to be predicted, become 32-bit floats.
        parts: look at a part of `PART_BYTES` at a time, in memory that does not grow with the
            table: repeats are found within a part only.
    """

    inputs: Inputs
    target: Target
    classes: int | None
    vocabulary: int | None
    threshold: float
    parts: bool
    ignore: int | None = None
    floats: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of `assess`."""
        return {
            "inputs": self.inputs, "target": self.target, "classes": self.classes,
            "vocabulary": self.vocabulary, "thorough": self.threshold > 0, "ignore": self.ignore,
        }  # fmt: skip


def scan(table: Table, asked: ScanOptions, folder: Path) -> ScanResult:
    """Look at every number of a table, unless the same was asked of the same content before.

    Args:
        table: the samples.
        asked: what is asked.
        folder: the cache; what is found is kept there.

    Raises:
        DataError: see `assess` and `check_floats`.
    """
    check_form(table, asked.inputs, asked.target)
    memos = Memos(folder)
    key = ("survey", _VERSION, table.content, *table.settings, repr(asked))
    known = _known(memos, key) if table.content else None
    if known is not None:
        return known
    if asked.floats:
        check_floats(table, asked.inputs, asked.target)
    result = _in_parts(table, asked, folder) if asked.parts else _whole(table, asked)
    if table.content:
        _keep(memos, key, result)
    return result


def _known(memos: Memos, key: tuple[str, ...]) -> ScanResult | None:
    memo = memos.find(*key)
    if memo is None:
        return None
    index = None
    if memo.pop("indexed"):
        index = memos.numbers(*key)
        if index is None or len(index) != memo["kept_count"]:
            return None
    unusable = memo.pop("unusable")
    return ScanResult(index=index, unusable=unusable and (unusable[0], unusable[1]), **memo)


def _keep(memos: Memos, key: tuple[str, ...], found: ScanResult) -> None:
    if found.index is not None and not memos.keep_numbers(*key, numbers=found.index):
        return
    value = {name: getattr(found, name) for name in found.__dataclass_fields__ if name != "index"}
    memos.keep(*key, value={**value, "indexed": found.index is not None})


def _whole(table: Table, asked: ScanOptions) -> ScanResult:
    return scanned(assess(table, **asked.settings), asked.threshold)


def _in_parts(table: Table, asked: ScanOptions, folder: Path) -> ScanResult:
    thorough, threshold = asked.threshold > 0, asked.threshold
    limits = outlier_limits(table) if thorough and asked.inputs == "features" else None
    counts: Counter[str] = Counter()
    unusable: tuple[int, str] | None = None
    largest: dict[str, int | None] = {"label": None, "token": None}
    kept = 0
    row = sum(int(np.prod(c.shape[1:])) * c.dtype.itemsize for c in table.columns.values())
    step = max(1, min(_PART, PART_BYTES // row))
    with contextlib.ExitStack() as stack:
        numbers = stack.enter_context(_numbers_file(table, folder)) if thorough else None
        for begin in range(0, len(table), step):
            part = _part(table, begin, begin + step)
            result = assess(part, **asked.settings, limits=limits)
            counts.update(result.left_out(threshold))
            here = result.unusable(threshold)
            if unusable is None and here is not None:
                unusable = begin + here[0], here[1]
            for name, value in (("label", result.largest_label), ("token", result.largest_token)):
                known = largest[name]
                largest[name] = value if known is None or value is None else max(known, value)
            chosen = result.kept(threshold)
            kept += len(chosen)
            if numbers is not None:
                numbers.write((chosen + begin).tobytes())
        index = None if numbers is None or kept == len(table) else _mapped(numbers, kept)
    unusable_by_reason = {reason: counts[reason] for reason in REASONS if counts[reason]}
    return ScanResult(
        threshold, kept, index, unusable_by_reason, unusable, largest["label"], largest["token"]
    )


def _part(table: Table, begin: int, end: int) -> Table:
    columns: dict[str, Any] = {name: column[begin:end] for name, column in table.columns.items()}
    problems = None if table.problems is None else table.problems[begin:end]
    return Table(table.file, table.format, columns, problems, names=table.names)


def _numbers_file(table: Table, folder: Path) -> IO[bytes]:
    """A file without a name on the cache's disk: what lies in memory must not grow."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=folder)
    except OSError as error:
        hint = "give cache_dir a folder that can be written and has room"
        message = f"the cache {folder} cannot be written: {error}"
        raise DataError(table.file, message, hint=hint) from error


def _mapped(numbers: IO[bytes], count: int) -> NDArray[np.int64]:
    """The written numbers; the mapping holds the file."""
    numbers.flush()
    if not count:
        return np.zeros(0, np.int64)
    return np.memmap(numbers, np.int64, "r", 0, (count,))
