"""TQ1_0, TQ2_0, Q2_0, Q1_0 and Q4_0: ternary and binary weights in blocks, as llama.cpp reads them.

Layout as in ggml. `block_tq1_0` and `block_tq2_0`, of 256 weights: codes `level + 1`, then one fp16
scale. In the others the scale comes first: `block_q2_0`, of 64 weights: codes `level + 1` of two
bits, neighbours in one byte; `block_q1_0`, of 128: a bit each, set for 1 and not for -1;
`block_q4_0`, of 32, for rows that do not fill those: codes `level + 8` of four bits. Unlike the
quantizers of ggml and of the `gguf` package, these take the levels as they are: they do not search
a scale in weights that have one already.
"""

from __future__ import annotations

from typing import Final, Literal

import torch
from torch import Tensor

from forge_plugins.mathematics.quantization.packing import check_levels

BlockType = Literal["tq1_0", "tq2_0", "q2_0", "q1_0", "q4_0"]
BLOCK: Final[dict[BlockType, int]] = {
    "tq1_0": 256, "tq2_0": 256, "q2_0": 64, "q1_0": 128, "q4_0": 32,
}  # fmt: skip
"""Weights of a block."""
BLOCK_BYTES: Final[dict[BlockType, int]] = {
    "tq1_0": 54, "tq2_0": 66, "q2_0": 18, "q1_0": 18, "q4_0": 18,
}  # fmt: skip
_SCALE_LAST: Final = ("tq1_0", "tq2_0")
_BITS: Final[dict[BlockType, int]] = {"q2_0": 2, "q1_0": 1}
"""Of a code, where neighbours stand in one byte, the first in its lowest bits."""
_ZERO: Final = 8
"""The code of level 0 in Q4_0."""


def _digits(levels: Tensor, base: int, out: Tensor, *, first_is_high: bool) -> None:
    """One number for each column of (blocks, digits, columns), Horner's scheme in int8."""
    count = levels.shape[1]
    order = list(range(count)) if first_is_high else list(range(count - 1, -1, -1))
    out.copy_(levels[:, order[0]])
    for place in order[1:]:
        torch.add(levels[:, place], out, alpha=base, out=out)
    out.add_(sum(base**place for place in range(count)))


def _fixed_point(codes: Tensor) -> Tensor:
    """`ceil(256 q / 243)` for 0 <= q <= 242: a base-3 fraction that is read by multiplication.

    In fp32: no `256 q / 243` but that of 0 lies closer than 1 / 243 to a whole number.
    """
    return codes.float().mul_(256 / 243).ceil_().to(torch.uint8)


def _pack_ternary(blocks: Tensor, packed: Tensor, kind: BlockType) -> None:
    """The codes of TQ1_0 and TQ2_0, which stand before the scale."""
    codes = packed.view(torch.int8)
    if kind == "tq2_0":
        halves = blocks.view(-1, 4, 32)  # two for each block
        own = torch.empty((len(halves), 32), dtype=torch.int8)
        _digits(halves, 4, own, first_is_high=False)
        codes[:, :64] = own.view(-1, 64)
        return
    digits = torch.empty((len(blocks), 52), dtype=torch.int8)
    _digits(blocks[:, :160].view(-1, 5, 32), 3, digits[:, :32], first_is_high=True)
    _digits(blocks[:, 160:240].view(-1, 5, 16), 3, digits[:, 32:48], first_is_high=True)
    last = digits[:, 48:]
    _digits(blocks[:, 240:].view(-1, 4, 4), 3, last, first_is_high=True)
    last.mul_(3)  # four digits in the five places of the others
    packed[:, :52] = _fixed_point(digits.view(torch.uint8))


def _pack_behind_scale(blocks: Tensor, packed: Tensor, kind: BlockType) -> None:
    """The codes of Q2_0, Q1_0 and Q4_0."""
    if kind == "q4_0":  # two in a byte, 16 places apart
        codes = (blocks + _ZERO).view(torch.uint8)
        packed[:, 2:] = codes[:, :16] | (codes[:, 16:] << 4)
        return
    bits = _BITS[kind]
    codes = (blocks + 1).view(torch.uint8) if bits == 2 else (blocks > 0).view(torch.uint8)
    places = codes.view(len(blocks), -1, 8 // bits)
    packed[:, 2:] = 0
    for place in range(8 // bits):
        packed[:, 2:] |= places[:, :, place] << (bits * place)


def _unpack_behind_scale(raw: Tensor, kind: BlockType) -> Tensor:
    """Codes 0 to 2 (else: of no level) of Q2_0, Q1_0 and Q4_0, uint8, shape (blocks, weights)."""
    if kind == "q4_0":
        return torch.cat([raw & 15, raw >> 4], dim=1) - (_ZERO - 1)  # below -1: beyond 2
    bits = _BITS[kind]
    codes = [(raw >> place) & (2**bits - 1) for place in range(0, 8, bits)]
    result = torch.stack(codes, dim=-1).flatten(1)
    return result if bits == 2 else result * 2


def pack_blocks(levels: Tensor, scale: Tensor | float, kind: BlockType) -> Tensor:
    """Ternary levels as the bytes of a GGUF tensor.

    Args:
        levels: int8 in {-1, 0, 1}, for Q1_0 in {-1, 1}, shape (rows, columns); columns fill
            blocks.
        scale: one level's worth (applied weight = level * scale), a number.
        kind: of the blocks.

    Returns:
        uint8, shape (rows, columns / weights of a block * bytes of a block). A block of zeros has
        the scale 0, as other programs write it.

    Raises:
        ValueError: levels outside the grid, or columns that do not fill blocks.
    """
    check_levels(levels)
    block = BLOCK[kind]
    if levels.ndim != 2 or levels.shape[1] % block:
        raise ValueError(f"rows of {levels.shape[-1]} weights do not fill blocks of {block}")
    if kind == "q1_0" and not bool(levels.all()):
        raise ValueError("a block of q1_0 holds levels of -1 and 1, and a level is 0")
    rows = len(levels)
    blocks = levels.reshape(-1, block)
    packed = torch.empty((len(blocks), BLOCK_BYTES[kind]), dtype=torch.uint8)
    used = blocks.view(torch.int64).any(dim=1)
    scales = torch.where(used, torch.as_tensor(scale, dtype=torch.float32).cpu(), 0.0)
    stored = scales.to(torch.float16).view(-1, 1).view(torch.uint8)
    if kind in _SCALE_LAST:
        packed[:, -2:] = stored
        _pack_ternary(blocks, packed, kind)
    else:
        packed[:, :2] = stored
        _pack_behind_scale(blocks, packed, kind)
    return packed.view(rows, -1)


def _unpack_ternary(codes: Tensor, kind: BlockType) -> Tensor:
    """Codes 0 to 2 (3: of no level) of TQ1_0 and TQ2_0, uint8, shape (blocks, 256)."""
    levels = torch.empty((len(codes), BLOCK[kind]), dtype=torch.uint8)
    if kind == "tq2_0":
        halves, places = codes.reshape(-1, 32), levels.view(-1, 4, 32)
        for place in range(4):
            places[:, place] = (halves >> (2 * place)) & 3
        return levels
    for begin, end, start, count in ((0, 32, 0, 5), (32, 48, 160, 5), (48, 52, 240, 4)):
        value = codes[:, begin:end].to(torch.int16)
        for place in range(count):
            value = value * 3
            first = start + place * (end - begin)
            levels[:, first : first + end - begin] = (value >> 8).to(torch.uint8)
            value &= 255
    return levels


def unpack_blocks(packed: Tensor, columns: int, kind: BlockType) -> tuple[Tensor, Tensor]:
    """Levels and scales again.

    Args:
        packed: what `pack_blocks` gave.
        columns: weights in a row.
        kind: of the blocks.

    Returns:
        int8 levels of shape (rows, columns), and the fp16 scales of the blocks, shape
        (rows, columns / weights of a block).

    Raises:
        ValueError: the bytes do not fit, or hold a code that stands for no level.
    """
    size, block = BLOCK_BYTES[kind], BLOCK[kind]
    fits = packed.dtype is torch.uint8 and packed.ndim == 2 and columns % block == 0
    if not fits or packed.shape[1] != columns // block * size:
        raise ValueError(f"{tuple(packed.shape)} bytes do not hold rows of {columns} in {kind}")
    rows = len(packed)
    blocks = packed.reshape(-1, size)
    if kind in _SCALE_LAST:
        stored = blocks[:, -2:]
        levels = _unpack_ternary(blocks[:, :-2], kind)
    else:
        stored = blocks[:, :2]
        levels = _unpack_behind_scale(blocks[:, 2:], kind)
    if levels.numel() and int(levels.max()) > 2:
        raise ValueError("the packed bytes hold a code that stands for no level")
    scales = stored.contiguous().view(torch.float16)
    return levels.view(torch.int8).sub_(1).view(rows, columns), scales.view(rows, -1)
