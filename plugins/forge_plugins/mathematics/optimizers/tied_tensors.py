"""Tensors that are one in memory, so that a file holds them once and a size counts them once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def _place(tensor: Tensor) -> tuple[Any, ...] | None:
    """What two names of one tensor have in common; None where memory cannot be told."""
    if tensor.layout is not torch.strided or tensor.device.type == "meta" or not tensor.numel():
        return None
    return (
        tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset(),
        tensor.dtype, tuple(tensor.shape), tensor.stride(),
    )  # fmt: skip


def tied_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """For each name whose tensor was there before under another one: that name.

    Args:
        state: tensors by name, as `state_dict` gives them.
    """
    first: dict[tuple[Any, ...], str] = {}
    tied: dict[str, str] = {}
    for name, tensor in state.items():
        place = _place(tensor)
        if place is not None and first.setdefault(place, name) != name:
            tied[name] = first[place]
    return tied


def bytes_in_fp32(state: Mapping[str, Tensor]) -> int:
    """Bytes of the tensors in full precision: four for each floating number, each tensor once.

    Whole numbers keep their size: they are no weights.
    """
    tied = tied_names(state)
    return sum(
        tensor.numel() * (4 if tensor.is_floating_point() else tensor.element_size())
        for name, tensor in state.items()
        if name not in tied
    )


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are equal in shape, dtype and every bit (a NaN is equal to itself)."""
    if left.shape != right.shape or left.dtype is not right.dtype:
        return False
    # a tensor of one number may have the stride 0, by which it cannot be seen as bytes
    mine, theirs = (
        torch.empty(part.numel(), dtype=part.dtype).copy_(part.detach().reshape(-1))
        for part in (left, right)
    )
    return torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))
