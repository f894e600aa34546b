"""Levels as the bytes of an ONNX file, and the tables that turn such bytes into levels again.

Neighbours lie in a byte from its lowest bits on. Codes are two's complement, as ONNX's INT2 and
INT4 want them, or `level + 2^(bits - 1)`, as onnxruntime's `MatMulNBits` wants them. One bit, which
neither has, is 1 for the level 1 and 0 for -1.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional

from forge_plugins.interchange.grid_weight import GridWeight
from forge_plugins.mathematics.quantization.packing import check_levels


def stored_bits(weight: GridWeight) -> int:
    """Bits of a level in the file: 1, 2, 4 or 8.

    One bit has no zero: a sparse weight of one bit takes two.
    """
    if weight.bits == 1:
        return 1 if bool(weight.levels.all()) else 2
    return 2 if weight.bits < 2 else int(weight.bits)


def packed_rows(levels: Tensor, bits: int, *, excess: bool = False) -> Tensor:
    """Each row in whole bytes.

    Args:
        levels: int8, shape (rows, columns).
        bits: 1, 2, 4 or 8.
        excess: the code is `level + 2^(bits - 1)`, else two's complement; one bit has one form.

    Returns:
        uint8, shape (rows, ceil(columns * bits / 8)); the places behind a row's last level hold
        the code of zero (of -1 with one bit).

    Raises:
        ValueError: a level that the bits do not hold.
    """
    check_levels(levels, max(1, 2 ** (bits - 1) - 1))
    places = 8 // bits
    rows = functional.pad(levels, (0, -levels.shape[1] % places), value=-1 if bits == 1 else 0)
    if bits == 1:
        codes = (rows > 0).to(torch.uint8)
    else:
        codes = rows.view(torch.uint8) + (2 ** (bits - 1) if excess else 0)  # wraps, as it should
    parts = (codes & (2**bits - 1)).view(len(levels), -1, places)
    packed: Tensor = parts[..., 0].clone()
    for place in range(1, places):
        packed |= parts[..., place] << (bits * place)
    return packed


@functools.cache
def level_table(bits: int) -> Tensor:
    """The levels in each byte of 1-, 2- or 4-bit codes in two's complement.

    Returns:
        int8, shape (256, 8 / bits).
    """
    places = torch.arange(8 // bits) * bits
    codes = (torch.arange(256)[:, None] >> places) & (2**bits - 1)
    half = 2 ** (bits - 1)
    levels: Tensor = 2 * codes - 1 if bits == 1 else (codes + half) % (2 * half) - half
    return levels.to(torch.int8)


@functools.cache
def two_bit_table() -> Tensor:
    """The two bytes of 2-bit codes, level + 2, that stand for each byte of 1-bit codes.

    Returns:
        uint8, shape (256, 2).
    """
    return packed_rows(level_table(1), 2, excess=True)
