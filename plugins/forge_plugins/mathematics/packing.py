"""Ternary levels four to a byte."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_two_bits(levels: Tensor) -> Tensor:
    """Pack levels in {-1, 0, 1} as `level + 1`, four to a byte, lowest bits first.

    Args:
        levels: int8, any shape.

    Returns:
        uint8, shape (ceil(n / 4),), the last byte filled up with zero levels.

    Raises:
        ValueError: another dtype, or a level outside the grid.
    """
    if levels.dtype is not torch.int8:
        raise ValueError(f"levels are int8, not {levels.dtype}")
    if levels.numel() and (int(levels.min()) < -1 or int(levels.max()) > 1):
        raise ValueError("levels are -1, 0 or 1")
    flat = levels.reshape(-1)
    missing = -flat.numel() % 4
    if missing:
        flat = torch.cat([flat, flat.new_zeros(missing)])
    quads = (flat + 1).view(torch.uint8).view(-1, 4)
    packed = quads[:, 3].clone()
    for place in (2, 1, 0):  # Horner's scheme, in place
        packed.mul_(4).add_(quads[:, place])
    return packed


def unpack_two_bits(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The levels again.

    Args:
        packed: what `pack_two_bits` gave.
        shape: the shape of the levels.

    Returns:
        int8 of that shape.

    Raises:
        ValueError: the bytes do not fit the shape, or hold the code 3, which stands for nothing.
    """
    count = 1
    for size in shape:
        count *= size
    if packed.dtype is not torch.uint8 or packed.numel() != -(-count // 4):
        raise ValueError(f"{packed.numel()} bytes of {packed.dtype} do not hold {count} levels")
    quads = torch.stack([(packed >> (2 * place)) & 3 for place in range(4)], dim=1)
    codes = quads.view(-1)[:count]
    if count and int(codes.max()) > 2:
        raise ValueError("the packed bytes hold a code that stands for no level")
    return (codes.view(torch.int8) - 1).view(shape)
