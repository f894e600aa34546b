"""What a forward pass writes besides gradients: kept, so that a dropped window leaves no trace."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import Tensor, nn

_TRUSTED: Final = 1 << 20
"""Bytes from which a buffer is copied only when its version counter has moved: a frozen base or a
table of positions is not copied in each step. Below, it is copied always, since writing through
`.data` moves no counter."""


class ForwardState:
    """Buffers and extra state of modules as they were when a window began.

    Batch normalisation, moving averages and counters are written in the forward pass, before
    anything is known of the gradients. A window that is dropped puts them back, to the bit. A model
    without buffers and extra state costs nothing.

    Args:
        modules: the model and its companions.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._places: list[tuple[nn.Module, str]] = []
        self._extras: list[nn.Module] = []
        seen: set[tuple[int, str]] = set()
        for top in modules:
            for module in top.modules():
                if type(module).get_extra_state is not nn.Module.get_extra_state:
                    self._extras.append(module)
                for name in module._buffers:
                    if (id(module), name) not in seen:
                        seen.add((id(module), name))
                        self._places.append((module, name))
        self._kept: list[tuple[Tensor | None, int, Tensor | None]] = [
            (None, -1, None) for _ in self._places
        ]
        self._extra_states: list[Any] = []
        self.empty = not (self._places or self._extras)

    def keep(self) -> None:
        """Before the first forward pass of a window."""
        for index, (module, name) in enumerate(self._places):
            tensor = module._buffers.get(name)
            before, version, kept = self._kept[index]
            if tensor is None:
                self._kept[index] = (None, -1, None)
                continue
            large = tensor.numel() * tensor.element_size() >= _TRUSTED
            if large and tensor is before and tensor._version == version:
                continue
            if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype or (
                kept.device != tensor.device
            ):  # fmt: skip
                kept = tensor.detach().clone()
            else:
                kept.copy_(tensor.detach())
            self._kept[index] = (tensor, tensor._version, kept)
        self._extra_states = [copy.deepcopy(module.get_extra_state()) for module in self._extras]

    def put_back(self) -> None:
        """The window is dropped: all is as `keep` found it."""
        with torch.no_grad():
            for index, ((module, name), (tensor, _, kept)) in enumerate(
                zip(self._places, self._kept, strict=True)
            ):
                module._buffers[name] = tensor
                if tensor is not None and kept is not None:
                    tensor.copy_(kept)
                    self._kept[index] = (tensor, tensor._version, kept)
        for module, state in zip(self._extras, self._extra_states, strict=False):
            module.set_extra_state(copy.deepcopy(state))
