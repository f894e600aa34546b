"""The pictures of a folder, its sub-folders being the classes, or of a table of paths; cached."""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import xxhash

from forge_plugins.formats.columns import cache
from forge_plugins.formats.columns.column_writer import ColumnFolder
from forge_plugins.formats.columns.gather import Column
from forge_plugins.formats.columns.table import absent
from forge_plugins.formats.errors import DataError
from forge_plugins.formats.readers.csv_dialect import decoded, sniffed
from forge_plugins.formats.readers.pictures import (
    SUFFIXES,
    is_grey,
    pillow_library,
    read_picture,
)
from forge_plugins.formats.readers.sandbox import MEMORY, run_sandboxed
from forge_plugins.formats.source_files import source_files

VERSION: Final = "1"
"""Of what is made of a picture: a change needs another one."""
MEMORY_OF_PICTURES: Final = 2**30
"""Bytes that the process may have that reads pictures."""
_SHARES: Final = frozenset({"train", "training", "val", "valid", "validation", "test"})
_BLOCK: Final = 256


@dataclass(frozen=True)
class PictureList:
    """Which pictures there are.

    Args:
        place: the folder or the table.
        files: the pictures.
        labels: of each, the name of its class; empty where there are none.
        passed_over: files that are no pictures.
    """

    place: Path
    files: tuple[Path, ...]
    labels: tuple[str, ...]
    passed_over: int = 0


def listed(path: str, file_column: str, label_column: str, *, labels: bool = True) -> PictureList:
    """The pictures that a setting means, in the order of their names.

    Args:
        path: a folder with a folder for each class, or a CSV or TSV of paths; without labels also
            a folder of pictures, a picture, or a glob pattern.
        file_column: of the table: paths, seen from where it lies.
        label_column: of the table.
        labels: whether each needs one.

    Raises:
        DataError: there is none, a class has none, or the table is no such table.
    """
    place = Path(path)
    if place.is_file() and place.suffix.lower() in (".csv", ".tsv"):
        return _of_table(place, file_column, label_column if labels else None)
    if labels:
        return _of_folders(place)
    inside = sorted(_pictures(place)[0]) if place.is_dir() else source_files(path, SUFFIXES)
    if not inside:
        raise _no_pictures(place)
    return PictureList(place, tuple(inside), ())


def _no_pictures(place: Path) -> DataError:
    hint = f"files of {', '.join(SUFFIXES)} are looked for"
    return DataError(place, "the folder has no picture", hint=hint)


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in ("thumbs.db", "desktop.ini", "__macosx")


def _pictures(folder: Path) -> tuple[list[Path], int]:
    """The pictures below a folder, and how many other files there are; hidden ones are nothing."""
    result: list[Path] = []
    others = 0
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not _hidden(name))
        for name in sorted(names):
            if _hidden(name):
                continue
            if Path(name).suffix.lower() in SUFFIXES:
                result.append(Path(place) / name)
            else:
                others += 1
    return result, others


def _of_folders(place: Path) -> PictureList:
    if not place.exists():
        hint = "paths are relative to where you are"
        raise DataError(place, "there is no such folder", hint=hint)
    if not place.is_dir():
        hint = "name a folder with a folder for each class, or a CSV of paths"
        raise DataError(place, "is no folder of pictures", hint=hint)
    inside = sorted(item for item in place.iterdir() if not _hidden(item.name))
    classes = [item for item in inside if item.is_dir()]
    if not classes:
        hint = "put the pictures of each class into a folder of its own, or name a CSV of paths"
        raise DataError(place, "has no folders, which are the classes", hint=hint)
    names = {item.name.lower() for item in classes}
    if names <= _SHARES:
        first = next(
            (item for item in classes if item.name.lower().startswith("train")), classes[0]
        )
        message = f"its folders are {sorted(names)}, shares and no classes"
        hint = f"name {first}; data.train_validation takes one of them for each purpose"
        raise DataError(place, message, hint=hint)
    if len(classes) < 2:
        message = f"has one class, {classes[0].name}: there is nothing to tell apart"
        raise DataError(place, message, hint="add a folder for another class")
    files: list[Path] = []
    labels: list[str] = []
    passed = sum(not item.is_dir() for item in inside)
    for item in classes:
        pictures, others = _pictures(item)
        if not pictures:
            hint = "put pictures into it, or take it away"
            raise DataError(item, "the class's folder has no picture", hint=hint)
        files += pictures
        labels += [item.name] * len(pictures)
        passed += others
    return PictureList(place, tuple(files), tuple(labels), passed)


def _of_table(place: Path, file_column: str, label_column: str | None) -> PictureList:
    text, encoding = decoded(place, place.read_bytes())
    dialect = sniffed(place, text, encoding)
    lines = text.removeprefix("\ufeff").splitlines()
    rows = list(csv.DictReader(lines, delimiter=dialect.delimiter))
    there = [*rows[0]] if rows else []
    for name in (file_column, *([label_column] if label_column else [])):
        if name not in there:
            fault = absent(place, name, [each for each in there if each])
            hint = "file_column and label_column say which columns are read"
            raise DataError(place, fault.message, hint=hint)
    files, labels = [], []
    for number, row in enumerate(rows):
        for name in (file_column, *([label_column] if label_column else [])):
            if not row[name]:
                raise DataError(place, "is empty", record=number, field=name, hint="write one")
        file = place.parent / str(row[file_column])
        if not file.is_file():
            message = f"there is no file {file}"
            hint = "paths are seen from where the table lies"
            raise DataError(place, message, record=number, field=file_column, hint=hint)
        files.append(file)
        labels += [str(row[label_column])] if label_column else []
    if label_column and len(set(labels)) < 2:
        message = f"is '{labels[0]}' in each record: there is nothing to tell apart"
        raise DataError(place, message, field=label_column, hint="name another label_column")
    return PictureList(place, tuple(files), tuple(labels))


@dataclass(frozen=True)
class Pictures:
    """Pictures of one shape, mapped.

    Args:
        column: uint8, shape (pictures, channels, height, width).
        content: hash of all of them.
        kept: numbers of the files that could be read.
        broken: what is wrong with the others, by the file's name.
    """

    column: Column
    content: str
    kept: tuple[int, ...]
    broken: Mapping[str, str]


def open_pictures(
    listing: PictureList,
    *,
    size: tuple[int, int] | None,
    channels: int | None,
    lenient: bool = False,
    cache_dir: Path | None = None,
    verify: bool = False,
) -> Pictures:
    """Read pictures once, and map them from the cache as long as no file changes.

    Args:
        listing: which.
        size: height and width; None: that of all of them.
        channels: 1 or 3; None: 1 where all are grey.
        lenient: leave out those that cannot be read.
        cache_dir: as for `open_table`.
        verify: as for `open_table`.

    Raises:
        DataError: Pillow is missing, a picture cannot be read, or is of another size.
    """
    folder = cache_dir or cache.default_folder(listing.place)
    settings = ("pictures", VERSION, str(size), str(channels), str(lenient))
    key = cache.content_key(_stamps(listing), *settings)

    def fill(building: Path) -> dict[str, Any]:
        def write(alive: Any = lambda: None) -> dict[str, Any]:
            columns = ColumnFolder(listing.place, building, alive)
            try:
                _write(listing, columns, size, channels, lenient=lenient)
                return columns.close()
            except DataError as fault:
                if fault.file == listing.place:
                    raise
                own = str(fault.file)  # the process that asks knows the folder only
                message, hint = fault.message, fault.hint
                raise DataError(listing.place, message, place=own, hint=hint) from fault
            finally:
                columns.abandon()

        memory = MEMORY + MEMORY_OF_PICTURES
        written: dict[str, Any] = run_sandboxed(listing.place, write, memory=memory)
        return written

    try:
        kept = cache.cached(folder, key, verify=verify) or cache.keep(
            listing.place, folder, key, fill, lambda _: None, verify=verify
        )
    except OSError as error:
        message = f"cannot be read: {error}"
        raise DataError(listing.place, message, hint="look at its rights and size") from error
    about = kept.about[""]
    broken = about["broken"]
    every = range(len(listing.files))
    names = [str(file) for file in listing.files]
    return Pictures(
        kept.columns["input"], str(about["content"]),
        tuple(at for at in every if names[at] not in broken), broken,
    )  # fmt: skip


def _stamps(listing: PictureList) -> str:
    """What changes when a picture is written to, is another, or is gone."""
    digest = hashlib.sha256()
    for file in listing.files:
        try:
            about = file.stat()
        except OSError as error:
            hint = "a link may lead nowhere: take it away"
            raise DataError(file, "there is no such file", hint=hint) from error
        stamp = (str(file.absolute()), about.st_ino, about.st_size, about.st_mtime_ns)
        digest.update(repr(stamp).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _write(
    listing: PictureList,
    columns: ColumnFolder,
    size: tuple[int, int] | None,
    channels: int | None,
    *,
    lenient: bool,
) -> None:
    pillow = pillow_library(listing.place)
    broken: dict[str, str] = {}
    channels = channels or _channels(pillow, listing.files, lenient=lenient)
    digest = xxhash.xxh3_128()  # tells pictures apart, and is no defence against people
    block: list[Column] = []
    shape: tuple[int, ...] | None = None
    for file in listing.files:
        try:
            pixels = read_picture(pillow, file, size, channels)
        except DataError as fault:
            if not lenient:
                raise
            broken[str(file)] = fault.message
            continue
        shape = shape or pixels.shape
        if pixels.shape != shape:
            height, width = pixels.shape[1:]
            message = f"has {width} x {height} pixels, and the first one {shape[2]} x {shape[1]}"
            raise DataError(file, message, hint="set size: all are brought to it")
        digest.update(file.name.encode("utf-8", "surrogateescape"))
        block.append(np.ascontiguousarray(pixels))
        digest.update(block[-1].data)
        if len(block) == _BLOCK:
            columns.append("input", np.stack(block))
            block.clear()
    if block:
        columns.append("input", np.stack(block))
    if shape is None:
        raise DataError(listing.place, "none of its pictures can be read", hint="write them anew")
    columns.describe("", {"content": digest.hexdigest(), "broken": broken})


def _channels(pillow: Any, files: Sequence[Path], *, lenient: bool) -> int:
    for file in files:
        try:
            if not is_grey(pillow, file):
                return 3
        except DataError:
            if not lenient:
                raise
    return 1
