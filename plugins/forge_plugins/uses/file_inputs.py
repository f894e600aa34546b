"""The samples of a data file as a trained run's model reads them, in the file's order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from forge_kernel.api import ConfigError, DataSpec, Fault, PluginError, TrainedRun
from forge_plugins.data import file as data_file
from forge_plugins.data.file_config import FileConfig


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
    config = _reading(run, file)
    try:
        data = data_file.to_batches(data_file.open_file(config), config, seed=0)
    except PluginError as error:
        raise ConfigError([Fault(str(error.faults[0].message))]) from error
    check_samples(run, file, data.spec)
    count = data.spec.samples or 0
    for begin in range(0, count, batch_size):
        batch = data.samples(np.arange(begin, min(begin + batch_size, count)))
        yield batch.inputs


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
        return FileConfig(**{**values, **changes})
    kind = "tokens" if run.spec.vocabulary is not None else "features"
    return FileConfig(**{**changes, "input": kind})
