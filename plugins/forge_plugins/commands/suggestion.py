"""A look at data of any kind: what they are, what to write to train on them, what is to beat."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from forge_kernel.api import LazyModule
from forge_plugins.data.columns.fitting import chosen_inputs
from forge_plugins.data.file import data_file

if TYPE_CHECKING:
    import numpy as np

    from forge_plugins.formats import errors, frame, open_table, picture_folder, source_files
    from forge_plugins.formats.inspection import columns_profile
    from forge_plugins.formats.readers import documents, pictures
else:
    np = LazyModule("numpy")
    columns_profile = LazyModule("forge_plugins.formats.inspection.columns_profile")
    documents = LazyModule("forge_plugins.formats.readers.documents")
    errors = LazyModule("forge_plugins.formats.errors")
    frame = LazyModule("forge_plugins.formats.frame")
    open_table = LazyModule("forge_plugins.formats.open_table")
    picture_folder = LazyModule("forge_plugins.formats.picture_folder")
    pictures = LazyModule("forge_plugins.formats.readers.pictures")
    source_files = LazyModule("forge_plugins.formats.source_files")

Kind = Literal["table", "pictures", "text", "samples"]
_TEXTS: Final = (".txt", ".md")
_LARGEST: Final = 64
"""Pixels of a side to which pictures of several sizes are brought at most."""
_LOOKED_AT: Final = 2**22
"""Bytes of a text that its entropy is counted of."""
_SHORT: Final = 129


@dataclass(frozen=True)
class Suggestion:
    """What data are, and how they are trained on.

    Args:
        kind: named columns, pictures, a text, or samples of an input and a target.
        seen: lines about it.
        settings: of the data plugin.
        plugin: name of the data plugin.
        samples: records, pictures, or sequences of 128 bytes.
        target: what is predicted.
        baseline: what an answer without a look at the input reaches, in words.
        shape: of a sample of several axes.
    """

    kind: Kind
    seen: tuple[str, ...]
    settings: dict[str, Any]
    plugin: str
    samples: int
    target: Literal["class", "number", "next"]
    baseline: str
    shape: tuple[int, ...] | None = None
    columns: dict[str, dict[str, Any]] | None = None


def looked_at(path: str, target: str | None = None) -> Suggestion:
    """What data are, by their names and their content.

    Args:
        path: a file, a folder, or `shipped:NAME`.
        target: the column that is predicted; None: the one that is most likely.

    Raises:
        DataError: they are nothing that can be trained on.
    """
    place = data_file(path)
    if place.is_dir():
        return _folder(path, place)
    if source_files.suffix_of(place) in _TEXTS:
        return _text(path, [place])
    known, usual = frame.has_frame(place, "auto")
    if usual or known:
        opened = frame.open_frame(place)
        if usual or "input" not in opened.columns:
            return of_frame(path, opened, target)
    return _samples(path, place)


def of_frame(path: str, opened: frame.Frame, target: str | None = None) -> Suggestion:
    """What to write for named columns.

    Args:
        path: as a user writes it.
        opened: the file.
        target: the column that is predicted; None: the one that is most likely.

    Raises:
        DataError: there is no such column, or nothing but it.
    """
    if target is not None:
        opened.need(target)
    paths = _column_of_pictures(opened)
    if paths is not None and target is None:
        return _pictures(path, opened.file, paths)
    target = target or columns_profile.guessed_target(opened)
    kind = columns_profile.target_kind(opened, target)
    _, reasons = chosen_inputs(opened, None, target)
    facts = {name: columns_profile.column_facts(opened, name) for name in opened.columns}
    width = min(28, max(len(name) for name in facts))
    head = f"  {'column':<{width}}  {'kind':<8} {'missing':>8} {'different':>10}  values"
    lines = [
        f"{opened.file}: {opened.format}, {len(opened):,} records, {len(facts)} columns",
        *([f"  {opened.dialect}"] if opened.dialect else []), head,
        *(columns_profile.facts_line(name, each, width) for name, each in facts.items()),
        *(f"no input: {name}: {reason}" for name, reason in reasons.items()),
        f"target: {target}, a {kind}",
    ]  # fmt: skip
    settings: dict[str, Any] = {"path": path, "target_column": target}
    if not opened.dialect:
        settings["input_column"] = ["*"]
    if kind == "number":
        settings |= {"target": "number", "target_scale": "standard"}
    else:
        settings["stratified"] = True
    if facts[target]["missing"]:
        settings["missing"] = "leave_out"
    baseline = (
        _majority(columns_profile.label_counts(opened, target))
        if kind == "class"
        else _mean(facts[target])
    )
    is_class = kind == "class"
    return Suggestion(
        "table", tuple(lines), settings, "file", len(opened), "class" if is_class else "number",
        baseline, None, facts,
    )  # fmt: skip


def _column_of_pictures(opened: frame.Frame) -> str | None:
    for name, about in opened.about.items():
        words = about.get("values") or []
        if about["kind"] == "text" and words:
            suffixes = {Path(word).suffix.lower() for word in words}
            if suffixes <= {*pictures.SUFFIXES}:
                return name
    return None


def _majority(counts: dict[str, int]) -> str:
    label, most = max(counts.items(), key=lambda item: item[1])
    share = most / sum(counts.values())
    return f"always '{label}' is right in {100 * share:.1f} % (accuracy {share:.3f})"


def _mean(facts: dict[str, Any]) -> str:
    return f"always the mean, {facts['mean']:.6g}, has an R² of 0 (r2 0.0)"


def _folder(path: str, place: Path) -> Suggestion:
    inside = sorted(item for item in place.iterdir() if not item.name.startswith("."))
    texts = [file for file in inside if file.is_file() and source_files.suffix_of(file) in _TEXTS]
    if texts:
        return _text(path, texts)
    tables = [file.name for file in inside if file.suffix.lower() in (".csv", ".tsv", ".parquet")]
    if tables and not any(item.is_dir() for item in inside):
        message = f"holds {tables[:4]}: which one is meant?"
        raise errors.DataError(place, message, hint=f"name it: forge init {place / tables[0]}")
    return _pictures(path, place)


def _pictures(path: str, place: Path, column: str | None = None) -> Suggestion:
    """Pictures in folders, or in a table with a column of paths."""
    settings: dict[str, Any] = {"path": path}
    label = "label"
    if column is not None:
        opened = frame.open_frame(place)
        others = [name for name in opened.columns if name != column]
        label = "label" if "label" in others else (others or [""])[-1]
        settings |= {"file_column": column, "label_column": label}
    listing = picture_folder.listed(str(place), column or "file", label)
    library = pictures.pillow_library(place)
    sizes: Counter[tuple[int, int]] = Counter()
    for file in listing.files:
        sizes[pictures.picture_size(library, file)] += 1
    counts = Counter(listing.labels)
    grey = all(pictures.is_grey(library, file) for file in listing.files)
    lines = [f"{place}: {len(listing.files):,} pictures, {'grey' if grey else 'in colours'}"]
    lines += [f"  {label}: {count:,}" for label, count in sorted(counts.items())]
    shown = ", ".join(f"{w} x {h} ({count})" for (h, w), count in sizes.most_common(4))
    lines.append(f"  width and height: {shown}")
    if listing.passed_over:
        lines.append(f"  {listing.passed_over} files are no pictures")
    size = next(iter(sizes))
    if len(sizes) > 1 or max(size) > _LARGEST:
        middle = sorted(min(each) for each in sizes.elements())[len(listing.files) // 2]
        side = max(8, min(_LARGEST, middle // 8 * 8))
        settings["size"], size = side, (side, side)
    settings["channels"] = 1 if grey else 3
    return Suggestion(
        "pictures", tuple(lines), settings, "image_folder", len(listing.files), "class",
        _majority(dict(counts)), (settings["channels"], *size),
    )  # fmt: skip


def _text(path: str, files: list[Path]) -> Suggestion:
    """Texts: the entropy of their bytes one by one, which is what counting letters reaches."""
    counts = np.zeros(256, np.int64)
    total = 0
    for file in files:
        for text, _ in documents.Documents(file=file, key="text").parts(documents.Account()):
            raw = text.encode()
            total += len(raw)
            if int(counts.sum()) < _LOOKED_AT:
                counts += np.bincount(np.frombuffer(raw, np.uint8), minlength=256)
    if total < 40 * _SHORT:
        hint = f"give {40 * _SHORT} or more"
        raise errors.DataError(files[0].parent, f"{total} bytes are too few to learn", hint=hint)
    shares = counts[counts > 0] / counts.sum()
    entropy = float(-(shares * np.log(shares)).sum())
    what = f"{len(files):,} texts" if len(files) > 1 else "a text"
    lines = (f"{path}: {what}, {total:,} bytes, {len(shares)} different ones",)
    baseline = (
        f"bytes by how often they are there: a loss of {entropy:.3f} "
        f"({entropy / math.log(2):.2f} bits a byte)"
    )
    return Suggestion("text", lines, {"path": path}, "text", total // 128, "next", baseline)


def _samples(path: str, place: Path) -> Suggestion:
    """A file with an input and a target."""
    table = open_table.open_table(place)
    target = table.columns.get("target")
    if target is None:
        raise table.without("target")
    shape = tuple(table.columns["input"].shape[1:])
    lines = (f"{place}: {table.format}, {len(table):,} records of the shape {list(shape)}",)
    settings: dict[str, Any] = {"path": path, "scale": "standard"}
    answers = np.asarray(target[:]).reshape(len(table), -1)
    if target.dtype.kind == "f" or answers.shape[1] > 1:
        settings |= {"target": "number", "target_scale": "standard"}
        settings["target_scale"] = "standard" if answers.shape[1] == 1 else "none"
        baseline = _mean({"mean": float(answers.mean())})
        return Suggestion(
            "samples", lines, settings, "file", len(table), "number", baseline,
            shape if len(shape) > 1 else None,
        )  # fmt: skip
    settings["stratified"] = True
    values, counts = np.unique(answers, return_counts=True)
    baseline = _majority({str(value): int(n) for value, n in zip(values, counts, strict=True)})
    return Suggestion(
        "samples", lines, settings, "file", len(table), "class", baseline,
        shape if len(shape) > 1 else None,
    )  # fmt: skip
