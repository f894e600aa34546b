"""What modules keep beside tensors (`get_extra_state`), as a checkpoint keeps it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from forge_kernel.contract.run import Run
from forge_kernel.errors import CheckpointError, RunError
from forge_kernel.storage.state_tree import split_tree


def _owners(run: Run) -> Iterator[tuple[str, nn.Module]]:
    """The modules with extra state, by their path in the run."""
    for top, model in {"": run.model, **run.modules}.items():
        for name, module in model.named_modules():
            if type(module).get_extra_state is not nn.Module.get_extra_state:
                yield ".".join(part for part in (top, name) if part) or ".", module


def extra_states(run: Run) -> dict[str, Any]:
    """The extra states by module; a tree that a checkpoint keeps."""
    return {path: module.get_extra_state() for path, module in _owners(run)}


def load_extra_states(run: Run, states: Mapping[str, Any]) -> None:
    """Give the modules their extra states back.

    Raises:
        RunError: they are of other modules.
    """
    owners = dict(_owners(run))
    if other := sorted(owners.keys() ^ states.keys()):
        raise RunError(f"the checkpoint has extra state of other modules: {other[:5]}")
    for path, module in owners.items():
        module.set_extra_state(states[path])


def check_extra_states(run: Run) -> None:
    """Refuse before the first step what no checkpoint could keep.

    Raises:
        RunError: a state holds what is not plain data or tensors.
    """
    for path, module in _owners(run):
        try:
            _ = split_tree(module.get_extra_state(), f"the extra state of {path}")
        except CheckpointError as error:
            raise RunError(f"no checkpoint could be saved: {error}") from error
