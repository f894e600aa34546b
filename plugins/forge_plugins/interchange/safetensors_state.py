"""A model's state in a safetensors file: which of it such a file holds, and ties kept as ties."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from forge_plugins.mathematics.optimizers.tied_tensors import tied_names

FORMAT: Final = "format"
"""The one entry of the metadata that names no tied tensor."""


def unwritable(state: Mapping[str, Any]) -> str | None:
    """Why a safetensors file cannot hold a state's tensors; None: it can.

    Args:
        state: as `state_dict` gives it; what is no tensor is not looked at.
    """
    writes: dict[torch.dtype, bool] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            continue
        if value.layout is not torch.strided:
            return f"{name} is a sparse tensor, which safetensors files do not hold"
        known = writes.get(value.dtype)
        if known is None:
            known = writes[value.dtype] = _writes(value.dtype)
        if not known:
            return f"{name} has the type {value.dtype}, which safetensors files do not hold"
    return None


def _writes(dtype: torch.dtype) -> bool:
    try:
        _ = save({"one": torch.empty(1, dtype=dtype)})
    except (KeyError, ValueError, RuntimeError):
        return False
    return True


def write_state(file: Path, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Write tensors, each that has several names once.

    The metadata tell the other names as `safetensors.torch.save_model` does, so that `load_model`
    reads the file too.

    Args:
        file: to write.
        state: tensors by name.

    Returns:
        For each name that is not in the file the one that is.
    """
    tied = tied_names(state)
    tensors = {
        name: tensor.detach().to("cpu").contiguous().clone()
        for name, tensor in state.items()
        if name not in tied
    }
    save_file(tensors, file, {FORMAT: "pt", **tied} if tied else None)
    return tied


def read_state(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by all their names; tied ones are one tensor."""
    with safe_open(file, "pt") as stored:
        about = stored.metadata() or {}
        tensors: dict[str, Tensor] = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    ties = {name: first for name, first in about.items() if first in tensors}
    return tensors | {name: tensors[first] for name, first in ties.items() if name not in tensors}
