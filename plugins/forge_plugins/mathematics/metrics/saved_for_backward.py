"""How many bytes a forward pass keeps for the backward pass, layer by layer."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn


class SavedForBackward:
    """Counts while it is open; the model and what it computes are left as they are.

    A storage counts once, for the layer that keeps it first; parameters and buffers are there
    anyway and do not count. What is kept outside of all layers counts for `(rest)`.

    Args:
        model: whose layers are named.
        depth: parts of a layer's name that get a row of their own (1: `blocks`, 2: `blocks.0`).
    """

    def __init__(self, model: nn.Module, depth: int) -> None:
        self.found: dict[str, int] = defaultdict(int)
        self._stack: list[str] = ["(rest)"]
        self._held: list[Tensor] = []  # keeps addresses from being used again
        self._seen = {_address(value) for value in (*model.parameters(), *model.buffers())}
        self._handles: list[Any] = []
        for name, module in model.named_modules():
            if name:
                short = ".".join(name.split(".")[:depth])
                self._handles.append(module.register_forward_pre_hook(self._entering(short)))
                self._handles.append(module.register_forward_hook(self._leaving, always_call=True))
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept)
        self._hooks.__enter__()

    def _entering(self, name: str) -> Any:
        def enter(module: nn.Module, given: Any) -> None:
            del module, given
            self._stack.append(name)

        return enter

    def _leaving(self, module: nn.Module, given: Any, output: Any) -> None:
        del module, given, output
        _ = self._stack.pop()

    def _pack(self, kept: Tensor) -> Tensor:
        address = _address(kept)
        if address not in self._seen:
            self._seen.add(address)
            self._held.append(kept.detach())
            self.found[self._stack[-1]] += kept.untyped_storage().nbytes()
        return kept

    def close(self) -> dict[str, int]:
        """Stop counting; bytes by layer, in the order of the forward pass."""
        self._hooks.__exit__()
        for handle in self._handles:
            handle.remove()
        self._held.clear()
        return dict(self.found)


def _address(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def bytes_of(values: Any) -> int:
    """Bytes of tensors, each storage counted once."""
    storages = {_address(value): value.untyped_storage().nbytes() for value in values}
    return sum(storages.values())
