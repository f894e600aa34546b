"""The samples of a data file as a trained run's model reads them, in the file's order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from forge_kernel.api import ConfigError, Fault, PluginError, TrainedRun
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
    theirs, ours = data.spec, run.spec
    for name in ("features", "sequence"):
        here, there = getattr(theirs, name), getattr(ours, name)
        if name == "sequence" and here is not None and there is not None and here <= there:
            continue
        if None not in (here, there) and here != there:
            what = "numbers" if name == "features" else "tokens"
            message = f"{file} has {here} {what} in a sample, and the run was trained on {there}"
            raise ConfigError([Fault(message)])
    if None not in (theirs.vocabulary, ours.vocabulary) and theirs.vocabulary > ours.vocabulary:  # type: ignore[operator]
        message = f"{file} has the token {theirs.vocabulary - 1}, and the run knows 0 to "  # type: ignore[operator]
        raise ConfigError([Fault(message + str(ours.vocabulary - 1))])  # type: ignore[operator]
    count = theirs.samples or 0
    for begin in range(0, count, batch_size):
        batch = data.samples(np.arange(begin, min(begin + batch_size, count)))
        yield batch.inputs


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
