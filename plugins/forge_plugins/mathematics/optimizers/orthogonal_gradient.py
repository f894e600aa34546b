"""Gradients without the part that only makes weights longer or shorter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def remove_parallel_part(
    gradients: Sequence[Tensor], weights: Sequence[Tensor], *, keep_norm: bool = True
) -> None:
    """`g <- g - (<w, g> / <w, w>) w`, then `g <- g |g_before| / |g|`, in place.

    Prieto et al. 2025, "Grokking at the Edge of Numerical Stability", arXiv 2501.04697, equation 8
    (there called the perpendicular gradient), and the rescaling of its published code.

    Args:
        gradients: of this optimizer step, changed in place.
        weights: of the same shapes. A weight of zeros leaves its gradient as it is.
        keep_norm: give each gradient its former norm back, so that the learning rate keeps its
            meaning. A gradient that is parallel to its weight (a scalar's always is) has nothing
            left and becomes zero.
    """
    if not gradients:
        return
    mine, values = list(gradients), [weight.detach() for weight in weights]
    before = torch._foreach_norm(mine)
    squares = [norm.square().clamp_min_(1e-30) for norm in torch._foreach_norm(values)]
    products = torch._foreach_mul(mine, values)
    shares = [-(each.sum() / square) for each, square in zip(products, squares, strict=True)]
    torch._foreach_addcmul_(
        mine, values, [share.expand_as(w) for share, w in zip(shares, values, strict=True)]
    )
    if not keep_norm:
        return
    for gradient, norm in zip(mine, before, strict=True):
        left = torch.linalg.vector_norm(gradient)
        # what rounding leaves of a parallel gradient is noise, not a direction
        factor = torch.where(left > 1e-5 * norm, norm / left.clamp_min(1e-30), 0.0)
        gradient.mul_(factor)
