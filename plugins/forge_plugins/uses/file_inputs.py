"""The samples of a data file as a trained run's model reads them, in the file's order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from forge_kernel.api import Batch, ConfigError, DataSpec, Fault, PluginError, TrainedRun
from forge_plugins.data import file as data_file
from forge_plugins.data import image_folder
from forge_plugins.data.columns import named_columns
from forge_plugins.data.columns.preparation import Preparation
from forge_plugins.data.file_batches import FileData
from forge_plugins.data.file_config import FileConfig
from forge_plugins.data.image_folder_config import ImageFolderConfig
from forge_plugins.formats import picture_folder
from forge_plugins.formats.errors import DataError


def file_inputs(run: TrainedRun, file: Path, *, batch_size: int = 256) -> Iterator[Tensor]:
    """Inputs of a file, shape (batch, ...), batch by batch; targets in it are not read.

    The file is read as the run's own was (columns, tokens or features, quality aside: each sample
    is there); where the run's data are of another kind, by the defaults of `data.file`.

    Args:
        run: whose settings count.
        file: of any format that `data.file` reads.
        batch_size: samples at a time.

    Raises:
        ConfigError: the file cannot be read so, or its samples are not what the model reads.
    """
    if run.data.get("use") == "image_folder":
        yield from (batch.inputs for batch in pictures_of(run, file, batch_size, labels=False))
        return
    config = _reading(run, file)
    try:
        data = samples_of(run, config)
    except PluginError as error:
        raise ConfigError([Fault(str(error.faults[0].message))]) from error
    check_samples(run, file, data.spec)
    count = data.spec.samples or 0
    for begin in range(0, count, batch_size):
        batch = data.samples(np.arange(begin, min(begin + batch_size, count)))
        yield batch.inputs


def samples_of(run: TrainedRun, config: FileConfig) -> FileData:
    """The samples of a file, its columns prepared as the run's own were.

    Args:
        run: whose preparation counts.
        config: how the file is read.

    Raises:
        PluginError: the file cannot be read so.
    """
    kept = run.preparation if isinstance(run.preparation, Preparation) else None
    opened = None if kept is None else data_file.open_named(config, kept)
    if kept is None or opened is None:
        return data_file.to_batches(data_file.open_file(config), config, seed=0)
    if config.target == "none":
        kept = Preparation(kept.inputs, None)
    own = data_file.prepared(opened, config, 0, kept)
    return data_file.to_batches(own.table, config, 0, preparation=kept)


def _picture_config(run: TrainedRun, file: Path) -> ImageFolderConfig:
    values = {**run.data["with"], "path": str(file), "validation_split": 0.0, "shuffle": False}
    size = values.get("size")
    values["size"] = tuple(size) if isinstance(size, list) else size
    return ImageFolderConfig(**{**values, "drop_last": False, "unreadable": "refuse"})


def pictures_of(run: TrainedRun, file: Path, batch_size: int, *, labels: bool) -> Iterator[Batch]:
    """Pictures as the run's own were read, in the order of their names.

    Args:
        run: of data.image_folder.
        file: a folder, with or without classes, a table of paths, or a picture.
        batch_size: pictures at a time.
        labels: whether they need classes.

    Raises:
        ConfigError: they cannot be read so.
    """
    config = _picture_config(run, file)
    try:
        data, _, _ = image_folder.picture_data(config, 0, run.preparation, labels=labels)
    except DataError as error:
        raise ConfigError([Fault(f"image_folder: {error}")]) from error
    count = len(data.table)
    for begin in range(0, count, batch_size):
        yield data.samples(np.arange(begin, min(begin + batch_size, count)))


def sample_names(run: TrainedRun, file: Path) -> list[str]:
    """What samples are called, in their order: the files of pictures; nothing for others."""
    if run.data.get("use") != "image_folder":
        return []
    config = _picture_config(run, file)
    listing = picture_folder.listed(
        str(file), config.file_column, config.label_column, labels=False
    )
    return [str(each) for each in listing.files]


def unknown_words(run: TrainedRun, file: Path) -> dict[str, list[str]]:
    """By column, the words of a file that the run's training never saw: they count as none.

    Args:
        run: whose preparation counts.
        file: that was read by `file_inputs`.
    """
    pictures = run.data.get("use") == "image_folder"
    if pictures or not isinstance(run.preparation, Preparation):
        return {}
    opened = data_file.open_named(_reading(run, file), run.preparation)
    return {} if opened is None else named_columns.unknown_words(opened, run.preparation)


def check_samples(run: TrainedRun, file: Path, theirs: DataSpec) -> None:
    """Refuse samples that are not what the model reads.

    Raises:
        ConfigError: of another number of features, longer, or with unknown tokens.
    """
    ours = run.spec
    trained = "the run was trained on"
    if _differ(theirs.features, ours.features):
        what = f"{theirs.features} numbers in a sample, and {trained} {ours.features}"
    elif _exceeds(theirs.sequence, ours.sequence):
        what = f"{theirs.sequence} tokens in a sample, and {trained} {ours.sequence} at most"
    elif _exceeds(theirs.vocabulary, ours.vocabulary):
        what = f"tokens below {theirs.vocabulary}, and {trained} those below {ours.vocabulary}"
    else:
        return
    raise ConfigError([Fault(f"{file} has {what}")])


def _differ(here: int | None, there: int | None) -> bool:
    return here is not None and there is not None and here != there


def _exceeds(here: int | None, there: int | None) -> bool:
    return here is not None and there is not None and here > there


def _reading(run: TrainedRun, file: Path) -> FileConfig:
    changes: dict[str, Any] = {
        "path": str(file), "target": "none", "validation_split": 0.0, "quality_threshold": 0.0,
        "shuffle": False, "drop_last": False, "workers": 0, "format": "auto",
    }  # fmt: skip
    if run.data.get("use") == "file":
        values = {
            name: value
            for name, value in run.data["with"].items()
            if name in {field.name for field in dataclasses.fields(FileConfig)}
        }
        return file_config({**values, **changes})
    kind = "tokens" if run.spec.vocabulary is not None else "features"
    return FileConfig(**{**changes, "input": kind})


def file_config(values: dict[str, Any]) -> FileConfig:
    """The settings of a run's data for another file, all of whose samples are read."""
    if values.get("missing") == "leave_out" and values["target"] == "none":
        values["missing"] = "refuse"  # each sample has an answer
    if values["target"] != "number":
        values["target_scale"] = "none"
    if values["target"] == "none":
        values["target_column"] = "target"
    if isinstance(values.get("input_column"), list):
        values["input_column"] = tuple(values["input_column"])
    return FileConfig(**{**values, "stratified": False})
