"""Levels in bytes: ternary ones four to a byte (2 bits each) or five (base 3), others in bits.

The levels are cut into as many equal planes as a byte has places, and byte `i` holds element `i` of
each: whole planes are added at once, at the speed of the memory. For a matrix whose rows are a
multiple of four the two-bit form is the layout of the transformers library (byte row `r` holds the
rows `r`, `r + R`, `r + 2R`, `r + 3R`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_levels(levels: Tensor, qmax: int = 1) -> None:
    """Refuse what is not on the grid (with the default: not ternary).

    Raises:
        ValueError: another dtype than int8, or a level outside [-qmax, qmax].
    """
    if levels.dtype is not torch.int8:
        raise ValueError(f"levels are int8, not {levels.dtype}")
    if levels.numel():
        low, high = torch.aminmax(levels)
        if int(low) < -qmax or int(high) > qmax:
            known = "-1, 0 or 1" if qmax == 1 else f"whole numbers from {-qmax} to {qmax}"
            raise ValueError(f"levels are {known}")


def _pack(levels: Tensor, places: int, base: int) -> Tensor:
    """`sum over k of (plane_k + 1) * base^k`, by Horner's scheme in the wrapping int8.

    Adding 1 to each level adds the same number to each byte, so it is added once, at the end.
    """
    check_levels(levels)
    flat = levels.reshape(-1)
    missing = -flat.numel() % places
    if missing:
        flat = torch.cat([flat, flat.new_zeros(missing)])
    planes = flat.view(places, -1)
    packed = planes[places - 1].clone()
    for place in range(places - 2, -1, -1):
        torch.add(planes[place], packed, alpha=base, out=packed)
    return packed.view(torch.uint8).add_(sum(base**place for place in range(places)))


def _checked_bytes(packed: Tensor, shape: tuple[int, ...], places: int) -> int:
    """The number of levels, when the bytes are as many as they must be."""
    if any(size < 0 for size in shape):
        raise ValueError(f"{shape} is no shape")
    count = math.prod(shape)
    if packed.dtype is not torch.uint8 or packed.ndim != 1 or len(packed) != -(-count // places):
        raise ValueError(
            f"{packed.numel()} bytes of {packed.dtype} do not hold {count} levels, {places} a byte"
        )
    return count


def _levels(planes: Tensor, count: int, shape: tuple[int, ...]) -> Tensor:
    flat = planes.view(-1)
    if bool(flat[count:].any()):
        raise ValueError("the places behind the last level do not hold zero")
    return flat[:count].view(shape)


def pack_two_bits(levels: Tensor) -> Tensor:
    """Pack levels in {-1, 0, 1} as `level + 1`, four to a byte.

    Args:
        levels: int8, any shape.

    Returns:
        uint8, shape (ceil(n / 4),), filled up with zero levels.

    Raises:
        ValueError: another dtype, or a level outside the grid.
    """
    return _pack(levels, 4, 4)


def unpack_two_bits(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The levels again.

    Args:
        packed: what `pack_two_bits` gave.
        shape: the shape of the levels.

    Returns:
        int8 of that shape.

    Raises:
        ValueError: the bytes do not fit the shape, hold the code 3, which stands for nothing, or
            something behind the last level.
    """
    count = _checked_bytes(packed, shape, 4)
    if bool(torch.bitwise_and(packed, packed >> 1).bitwise_and_(0b01010101).any()):
        raise ValueError("the packed bytes hold a code that stands for no level")
    planes = torch.empty((4, len(packed)), dtype=torch.uint8, device=packed.device)
    for place in range(4):
        torch.bitwise_right_shift(packed, 2 * place, out=planes[place])
    planes.bitwise_and_(3).sub_(1)
    return _levels(planes.view(torch.int8), count, shape)


def pack_base_three(levels: Tensor) -> Tensor:
    """Pack levels in {-1, 0, 1} as digits `level + 1` of a number in base 3, five to a byte.

    Args:
        levels: int8, any shape.

    Returns:
        uint8 below 243, shape (ceil(n / 5),), filled up with zero levels.

    Raises:
        ValueError: another dtype, or a level outside the grid.
    """
    return _pack(levels, 5, 3)


def unpack_base_three(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The levels again.

    Division by 3 is `(85 v + 85) >> 8`, exact for 0 <= v <= 255 (int16 arithmetic is an order of
    magnitude faster than integer division).

    Args:
        packed: what `pack_base_three` gave.
        shape: the shape of the levels.

    Returns:
        int8 of that shape.

    Raises:
        ValueError: the bytes do not fit the shape, one is above 242, or something stands behind
            the last level.
    """
    count = _checked_bytes(packed, shape, 5)
    if packed.numel() and int(packed.max()) > 242:
        raise ValueError("the packed bytes hold a code that stands for no level")
    planes = torch.empty((5, len(packed)), dtype=torch.int8, device=packed.device)
    value = packed.to(torch.int16)
    for place in range(4):
        quotient = torch.mul(value, 85).add_(85).bitwise_right_shift_(8)
        planes[place] = value.sub_(quotient, alpha=3).sub_(1)
        value = quotient
    planes[4] = value.sub_(1)
    return _levels(planes, count, shape)


def _pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes below `2^bits` (uint8, any shape), as many to a byte as fit, filled up with 0."""
    places = 8 // bits
    flat = codes.reshape(-1)
    missing = -flat.numel() % places
    if missing:
        flat = torch.cat([flat, flat.new_zeros(missing)])
    planes = flat.view(places, -1)
    packed = planes[0].clone()
    for place in range(1, places):
        packed |= planes[place] << (bits * place)
    return packed


def _unpack_codes(packed: Tensor, shape: tuple[int, ...], bits: int) -> Tensor:
    """The codes again, uint8 of the shape."""
    places = 8 // bits
    count = _checked_bytes(packed, shape, places)
    planes = torch.empty((places, len(packed)), dtype=torch.uint8, device=packed.device)
    for place in range(places):
        torch.bitwise_right_shift(packed, bits * place, out=planes[place])
    return _levels(planes.bitwise_and_((1 << bits) - 1), count, shape)


def pack_one_bit(levels: Tensor) -> Tensor:
    """Pack levels in {-1, 1} as one bit each, eight to a byte.

    Args:
        levels: int8, any shape.

    Returns:
        uint8, shape (ceil(n / 8),), filled up with zero bits.

    Raises:
        ValueError: another dtype, or a level that is not -1 or 1.
    """
    check_levels(levels)
    if not bool(levels.all()):
        raise ValueError("one bit holds the levels -1 and 1, and there is a 0")
    return _pack_codes((levels > 0).view(torch.uint8), 1)


def unpack_one_bit(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The levels again: int8 of that shape.

    Raises:
        ValueError: the bytes do not fit the shape, or something stands behind the last level.
    """
    return _unpack_codes(packed, shape, 1).view(torch.int8).mul_(2).sub_(1)


def pack_four_bits(levels: Tensor) -> Tensor:
    """Pack levels in [-7, 7] as `level + 7`, two to a byte.

    Args:
        levels: int8, any shape.

    Returns:
        uint8, shape (ceil(n / 2),), filled up with zero bits.

    Raises:
        ValueError: another dtype, or a level outside the grid.
    """
    check_levels(levels, 7)
    return _pack_codes((levels + 7).view(torch.uint8), 4)


def unpack_four_bits(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The levels again: int8 of that shape.

    Raises:
        ValueError: the bytes do not fit the shape, hold the code 15, which stands for nothing, or
            something behind the last level.
    """
    codes = _unpack_codes(packed, shape, 4)
    if codes.numel() and int(codes.max()) > 14:
        raise ValueError("the packed bytes hold a code that stands for no level")
    return codes.view(torch.int8).sub_(7)


def pack_eight_bits(levels: Tensor) -> Tensor:
    """Levels in [-127, 127] as the bytes that they are: uint8, shape (n,).

    Raises:
        ValueError: another dtype, or the level -128.
    """
    check_levels(levels, 127)
    return levels.reshape(-1).view(torch.uint8).clone()


def unpack_eight_bits(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The levels again: int8 of that shape.

    Raises:
        ValueError: the bytes do not fit the shape, or hold -128, which stands for nothing.
    """
    _ = _checked_bytes(packed, shape, 1)
    levels = packed.view(torch.int8)
    if levels.numel() and int(levels.min()) < -127:
        raise ValueError("the packed bytes hold a code that stands for no level")
    return levels.view(shape).clone()
