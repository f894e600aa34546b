"""Whose training the checkpoints of a folder are: of which network, weights and data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

LOOKED_AT: Final = 8  # parts at each end of a long list
LONGEST: Final = 2**18  # numbers of a tensor: of a larger one, evenly spread


@dataclass(frozen=True)
class TrainingIdentity:
    """Digests in hex.

    Args:
        network: of the names, shapes and types of the model's tensors.
        weights: of their values before the first step.
        data: of the training data as far as they can be seen without drawing from them: lengths,
            and the content of lists, tensor data sets and files of this package.
    """

    network: str
    weights: str
    data: str

    @classmethod
    def of(cls, model: nn.Module, loader: Any = None) -> TrainingIdentity:
        """The identity of a training that begins now."""
        state = model.state_dict()
        return cls(network=network_digest(state), weights=weights_digest(state),
                   data=data_digest(loader))  # fmt: skip

    @classmethod
    def from_data(cls, data: Any) -> TrainingIdentity | None:
        """What `to_data` gave; None where it is not one."""
        names = {"network", "weights", "data"}
        return cls(**data) if isinstance(data, Mapping) and set(data) == names else None

    def to_data(self) -> dict[str, str]:
        """Plain values."""
        return asdict(self)


def _tensors(state: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    return sorted((name, value) for name, value in state.items() if isinstance(value, Tensor))


def network_digest(state: Mapping[str, Any]) -> str:
    """Of names, shapes and types."""
    result = hashlib.sha256()
    for name, value in _tensors(state):
        result.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
    return result.hexdigest()


def weights_digest(state: Mapping[str, Any]) -> str:
    """Of names and values, all of them."""
    result = hashlib.sha256()
    for name, value in _tensors(state):
        result.update(name.encode())
        result.update(_bytes(value))
    return result.hexdigest()


def data_digest(loader: Any) -> str:
    """Of a loader, a data set or a list of batches; nothing is drawn from it."""
    result = hashlib.sha256()
    todo = [loader]
    while todo:
        value = todo.pop()
        leaf = _leaf(value)
        if leaf is not None:
            result.update(leaf)
            continue
        result.update(f"{type(value).__name__} {_length(value)}".encode())
        todo += reversed(_parts(value))
    return result.hexdigest()


def _bytes(value: Tensor) -> bytes:
    flat = value.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def _leaf(value: Any) -> bytes | None:
    """What stands for a value that has no parts; None: it may have some."""
    content = _content(value)
    if content is not None:
        return f"file {content}".encode()
    if isinstance(value, Tensor):
        spread = value.detach().reshape(-1)[:: -(-value.numel() // LONGEST) or 1]
        return f"tensor {tuple(value.shape)} {value.dtype}".encode() + _bytes(spread)
    if isinstance(value, np.ndarray) and value.dtype.kind != "O":  # objects have no bytes
        few = np.ascontiguousarray(value.reshape(-1)[:: -(-value.size // LONGEST) or 1])
        return f"array {value.shape} {value.dtype}".encode() + few.tobytes()
    plain = isinstance(value, str | int | float | bool | bytes | None)
    return repr(value).encode() if plain else None


def _parts(value: Any) -> list[Any]:
    """What a data set or container consists of, as far as it is looked at."""
    if isinstance(value, DataLoader):
        return [value.batch_size, value.dataset]
    if isinstance(value, TensorDataset):
        return list(value.tensors)
    if isinstance(value, Subset):
        return [list(value.indices), value.dataset]
    if isinstance(value, Mapping):
        return [part for pair in value.items() for part in pair]
    if isinstance(value, list | tuple):
        ends = len(value) > 2 * LOOKED_AT
        return [*value[:LOOKED_AT], *value[-LOOKED_AT:]] if ends else list(value)
    return []


def _content(value: Any) -> str | None:
    """The hash of the file behind a loader or data set of this package."""
    for name in ("data", "_data"):
        table = getattr(getattr(value, name, None), "table", None)
        if isinstance(getattr(table, "content", None), str):
            return str(table.content)  # type: ignore[union-attr]
    return None


def _length(value: Any) -> int | None:
    try:
        return len(value)
    except TypeError:
        return None
