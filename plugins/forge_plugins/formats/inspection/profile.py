"""What a data file holds, as metrics to be told and drawn."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from forge_plugins.formats.columns.table import Column, Rows, Table, take
from forge_plugins.formats.inspection.quality import REASONS, Assessment
from forge_plugins.formats.readers.documents import Account, Documents

SHOWN: Final = 20
"""Record numbers that are told for each reason."""
BINS: Final = 20
_BLOCK: Final = 2**22
_SAMPLED: Final = 10_000
_LABELS: Final = 2**16  # kinds of labels that are counted


@dataclass(frozen=True)
class Bars:
    """Counts in a row: of labels, or of bins of a range.

    Args:
        names: of the bars.
        counts: as long.
    """

    names: list[str]
    counts: list[int]


@dataclass(frozen=True)
class Profile:
    """What is told of a file; `told` gives it for JSON.

    Args:
        file: its name.
        format: the name of its format.
        records: samples or documents in it.
        kept: of them, at the threshold.
        threshold: of the quality.
        target: what targets are.
        length: numbers or tokens of an input; characters of all documents.
        fields: by name type, shape, and smallest, mean and largest finite number.
        left_out: records below the threshold by their first reason.
        reasons: by reason how many records have it, and the first record numbers.
        labels: how often each label is there among the kept records.
        scores: how many records have a quality in each twentieth from 0 to 1 that has some.
        spread: how often numbers of inputs fall into each part of their range, or how many
            documents have a length.
        quality_deciles: from the lowest to the highest.
        others: names of the file's columns that were not asked for, as far as they are known.
    """

    file: str
    format: str
    records: int
    kept: int
    threshold: float
    target: str
    length: int
    fields: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, dict[str, Any]] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    scores: Bars | None = None
    spread: Bars | None = None
    quality_deciles: list[float] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def to_data(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def profile_of(
    table: Table, assessment: Assessment, target: str, threshold: float, ignore: int | None = None
) -> Profile:
    """What a table holds.

    Args:
        table: the samples.
        assessment: of a look at all of them.
        target: what targets are.
        threshold: of the quality.
        ignore: an integer target that counts for nothing.
    """
    kept = assessment.kept(threshold)
    shifted = target == "next" and "target" not in table.columns
    inputs = table.columns["input"]
    counts, _ = np.histogram(assessment.scores, BINS, (0.0, 1.0))
    there = np.flatnonzero(counts).tolist()
    names = [f"{at / BINS:g} to {(at + 1) / BINS:g}" for at in there]
    return Profile(
        str(table.file), table.format, len(table), len(kept), threshold, target,
        int(np.prod(inputs.shape[1:])) - shifted,
        {
            table.name_of(role): _about(column, table.problems)
            for role, column in table.columns.items()
        },
        assessment.left_out(threshold),
        {
            reason: {
                "records": int(assessment.found[reason].sum()),
                "first": np.flatnonzero(assessment.found[reason])[:SHOWN].tolist(),
            }
            for reason in REASONS
            if assessment.found[reason].any()
        },
        _labels(table.columns["target"], kept, ignore) if target == "class" else {},
        Bars(names, counts[there].tolist()),
        _spread(inputs, table.problems),
        [round(float(q), 6) for q in np.quantile(assessment.scores, np.linspace(0, 1, 11))],
        list(table.others),
    )  # fmt: skip


def _blocks(column: Column | Rows, problems: Column | None) -> Iterator[Column]:
    """The finite numbers of the records that could be read, a part of them at a time."""
    width = max(1, int(np.prod(column.shape[1:])))
    step = max(1, _BLOCK // width)
    for begin in range(0, len(column), step):
        rows = np.asarray(column[begin : begin + step])
        if problems is not None:
            rows = rows[np.asarray(problems[begin : begin + step]) == 0]
        numbers = rows.reshape(-1)
        yield numbers[np.isfinite(numbers)] if numbers.dtype.kind == "f" else numbers


def _about(column: Column | Rows, problems: Column | None) -> dict[str, Any]:
    low, high, total, count = np.inf, -np.inf, 0.0, 0
    for numbers in _blocks(column, problems):
        if len(numbers):
            low, high = min(low, numbers.min().item()), max(high, numbers.max().item())
            total += float(numbers.sum(dtype=np.float64))
            count += len(numbers)
    known = count > 0
    return {
        "type": str(column.dtype), "shape": list(column.shape[1:]),
        "smallest": low if known else None, "largest": high if known else None,
        "mean": total / count if known else None,
    }  # fmt: skip


def _labels(column: Column | Rows, kept: NDArray[np.int64], ignore: int | None) -> dict[str, int]:
    answers = np.asarray(column[:]).reshape(len(column), -1)[kept]
    answers = answers[np.isfinite(answers)]
    answers = answers if ignore is None else answers[answers != ignore]
    values, counts = np.unique(answers, return_counts=True)
    pairs = zip(values.tolist()[:_LABELS], counts.tolist()[:_LABELS], strict=True)
    return {str(int(value)): count for value, count in pairs if value == int(value)}


def _spread(column: Column | Rows, problems: Column | None) -> Bars | None:
    """Numbers of inputs in equal parts of where most of them lie; None when there is no range."""
    about = _about(column, problems)
    low, high = about["smallest"], about["largest"]
    if low is None or not low < high:
        return None
    if column.dtype.kind != "f" and high - low < BINS:
        edges = np.arange(low - 0.5, high + 1)
        names = [f"{number}" for number in range(int(low), int(high) + 1)]
        return Bars(names, _counted(column, problems, edges).tolist())
    first, last = _most(column, problems)
    inner = np.linspace(first, last, BINS + 1) if first < last else np.array([low, high])
    counts = _counted(column, problems, np.array([-np.inf, *inner, np.inf]))
    names = [f"{a:.4g} to {b:.4g}" for a, b in itertools.pairwise(inner)]
    names = [f"below {inner[0]:.4g}", *names, f"above {inner[-1]:.4g}"]
    # nothing lies beyond a range that ends at the smallest or the largest number
    outside = [at for at in (0, -1) if not counts[at]]
    kept = [at for at in range(len(names)) if at - len(names) not in outside and at not in outside]
    return Bars([names[at] for at in kept], [int(counts[at]) for at in kept])


def _most(column: Column | Rows, problems: Column | None) -> tuple[float, float]:
    """Between which two numbers 99 % lie, by a sample of rows."""
    drawn = (
        np.arange(len(column)) if problems is None else np.flatnonzero(np.asarray(problems) == 0)
    )
    if len(drawn) > _SAMPLED:
        generator = np.random.Generator(np.random.PCG64(0))
        drawn = np.sort(generator.choice(drawn, _SAMPLED, replace=False))
    numbers = take(column, drawn).astype(np.float64).reshape(-1)
    low, high = np.quantile(numbers[np.isfinite(numbers)], (0.005, 0.995))
    return float(low), float(high)


def _counted(
    column: Column | Rows, problems: Column | None, edges: NDArray[np.float64]
) -> NDArray[np.int64]:
    counts = np.zeros(len(edges) - 1, np.int64)
    for numbers in _blocks(column, problems):
        places = np.searchsorted(edges, numbers, "right") - 1
        places[numbers == edges[-2]] = len(edges) - 3  # the last inner edge ends its part
        counts += np.bincount(np.clip(places, 0, len(counts) - 1), minlength=len(counts))
    return counts


def profile_of_texts(file: Path, key: str) -> Profile:
    """What a file of texts holds; documents without a text, empty ones and repeats are counted.

    Args:
        file: the texts.
        key: the text's field in an object.

    Raises:
        DataError: the file is broken.
    """
    account = Account()
    lengths: list[int] = []
    held = 0
    characters: Counter[str] = Counter()
    for text, ended in Documents(file=file, key=key, once=True, lenient=True).parts(account):
        held += len(text)
        characters.update(text)
        if ended:
            lengths.append(held)
            held = 0
    left_out = sum(account.left_out.values())
    quantiles = np.quantile(lengths, np.linspace(0, 1, 11)) if lengths else np.zeros(0)
    kinds = f"{len(characters)} different characters"
    return Profile(
        str(file), "texts", account.documents + left_out, account.documents, 0.0, "next",
        account.characters,
        {key: {"type": kinds, "shape": [], "smallest": min(lengths, default=None),
               "largest": max(lengths, default=None),
               "mean": account.characters / len(lengths) if lengths else None}},
        dict(account.left_out),
        {
            reason: {"records": count, "first": account.examples[reason]}
            for reason, count in account.left_out.items()
        },
        {}, None, _length_bars(lengths), [float(q) for q in quantiles],
    )  # fmt: skip


def _length_bars(lengths: list[int]) -> Bars | None:
    """Documents by the power of two that their characters reach."""
    if not lengths:
        return None
    powers = Counter(max(0, length - 1).bit_length() for length in lengths)
    span = range(min(powers), max(powers) + 1)
    return Bars([f"up to {2**power}" for power in span], [powers[power] for power in span])
