"""Whether what would be kept is made of numbers: looked at before a checkpoint is written."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_SHOWN = 3


def is_finite(tensor: Tensor) -> Tensor:
    """Whether all values are finite: a 0-d tensor on its device, with next to no memory."""
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.element_size() == 1:  # 8-bit floats have no reductions of their own
        tensor = tensor.float()
    low, high = torch.aminmax(tensor.detach())
    return torch.isfinite(low.float()) & torch.isfinite(high.float())


def non_finite_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """Those that hold a NaN or an infinity; one read of the host for each device."""
    verdicts: dict[torch.device, tuple[list[str], list[Tensor]]] = {}
    for name, tensor in tensors.items():
        if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex()):
            names, flags = verdicts.setdefault(tensor.device, ([], []))
            names.append(name)
            flags.append(is_finite(tensor))
    result = []
    for names, flags in verdicts.values():
        finite = torch.stack(flags).tolist()
        result += [name for name, good in zip(names, finite, strict=True) if not good]
    return result


def state_of_parameters(tree: Any, shapes: Collection[torch.Size]) -> dict[str, Tensor]:
    """The tensors of a tree of state that have the shape of a parameter: averages, memories.

    Others (counters, placeholders, limits that begin at infinity) are their owner's affair.

    Args:
        tree: mappings and lists with tensors in them.
        shapes: of the parameters.
    """
    return {name: tensor for name, tensor in _tensors(tree, "") if tensor.shape in shapes}


def _tensors(tree: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, Mapping):
        for key, part in tree.items():
            yield from _tensors(part, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, list | tuple):
        for index, part in enumerate(tree):
            yield from _tensors(part, f"{name}[{index}]")


def in_words(names: list[str]) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
