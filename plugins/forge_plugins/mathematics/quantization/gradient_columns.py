"""An incoming gradient in whole numbers, column by column, and how fine they must be."""

from __future__ import annotations

from typing import Final, NamedTuple

from torch import Tensor

TOKENS: Final = 256
"""Tokens that share a step: a chunk. Twice as many cost a fifth more error; a chunk's sums, at
most 256 * 127^2, are below 2^24 and so exact in fp32."""

SORTED: Final = 4096
"""Tokens that are put in order together: as many as a GPU sorts in one go."""

COLUMNS: Final = 32
"""Columns that are judged together."""

WORST: Final = 0.02
"""Share of a chunk's norm, in such columns, that 8 bits may lose. Where they would lose more (a
token or a number far beyond the others), 8 further bits take up the rest."""

NOTHING: Final = 1e-36
"""A gradient of this size or less is zero: its scale would be beyond fp32."""


class Columns(NamedTuple):
    """`step * level + finer step * finer level`, transposed: tokens are side by side.

    Args:
        levels: int8, shape (out, chunks * TOKENS), zeros beyond the last token.
        steps: what a level stands for, fp32, shape (chunks, out).
        finer: like the levels; anything where the finer step is 0.
        finer_steps: like the steps; 0 where the levels alone are fine enough.
        coarse: where they are not: int8, shape (chunks, groups of COLUMNS).
    """

    levels: Tensor
    steps: Tensor
    finer: Tensor
    finer_steps: Tensor
    coarse: Tensor
