"""What rows of inputs and targets become as a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from forge_kernel.api import Batch, LazyModule

if TYPE_CHECKING:
    import numpy as np
    import torch

    from forge_plugins.data.file_config import FileConfig
else:
    np = LazyModule("numpy")
    torch = LazyModule("torch")

BatchForm = Callable[[Any, Any], Any]
"""Makes a batch of the rows of inputs and those of targets; the latter are None without any."""


def batch_form(config: FileConfig) -> BatchForm:
    """How the settings say that batches look; settled once, not for each batch.

    Features become float32 of shape (samples, features), or of the file's where it has more axes,
    tokens and labels int64, other targets float32 of shape (samples, numbers). Where the target is
    the next token, inputs and targets are two views of one block.
    """
    inputs = _features if config.input == "features" else _integers
    if config.target == "none":
        return lambda rows, answers: Batch(inputs(rows))
    if config.target == "number":
        return lambda rows, answers: Batch(inputs(rows), _features(_flat(answers)))
    if config.input == "features":
        return _labelled
    return _tokens


def _features(rows: Any) -> torch.Tensor:
    if rows.ndim < 2:
        rows = rows.reshape(len(rows), -1)
    return torch.from_numpy(rows if rows.dtype == np.float32 else rows.astype(np.float32))


def _flat(rows: Any) -> Any:
    return rows.reshape(len(rows), -1)


def _integers(rows: Any) -> torch.Tensor:
    return torch.from_numpy(rows if rows.dtype == np.int64 else rows.astype(np.int64))


def _labelled(rows: Any, answers: Any) -> Batch:
    labels = answers if answers.ndim == 1 else answers.reshape(len(rows))
    return Batch(_features(rows), _integers(labels))


def _tokens(rows: Any, answers: Any) -> Batch:
    inputs = _integers(rows)
    if answers is None:
        return Batch(inputs[:, :-1], inputs[:, 1:])
    targets = _integers(answers).reshape(len(rows), -1)
    item = targets.shape[1] == 1 and inputs.shape[1] > 1  # the answer to a whole sequence
    return Batch(inputs, targets, None, slice(-1, None) if item else None)
