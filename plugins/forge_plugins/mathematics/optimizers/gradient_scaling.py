"""Gradients of single tensors brought down to the size that is usual."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def root_mean_squares(gradients: Sequence[Tensor]) -> Tensor:
    """The RMS of each gradient, fp32, shape (n,), without a read to the host."""
    norms = torch.stack(torch._foreach_norm(list(gradients), 2, torch.float32))
    sizes = [max(1, gradient.numel()) for gradient in gradients]
    return norms / norms.new_tensor(sizes).sqrt_()


def scale_down(
    gradients: Sequence[Tensor], mean_square: Tensor, count: Tensor, *, decay: float, limit: float
) -> Tensor:
    """Multiply each gradient by `min(1, limit * usual / size)`, in place.

    `size` is the larger of the gradient's RMS and the root of its moving mean square, so that a
    spike is scaled at once and a tensor that is always too large stays scaled; `usual` is the
    median over the tensors of what their averages said before this gradient, so that one of them,
    or a spike of all, does not move it. The moving averages are of the unscaled gradients, begin
    unbiased, and forget a spike at the rate of the decay.

    Args:
        gradients: on one device, changed in place.
        mean_square: moving averages, shape (n,), changed in place.
        count: how many gradients each has seen, fp32, shape (n,), changed in place.
        decay: of the averages, in [0, 1).
        limit: how many times the usual size a gradient may have.

    Returns:
        The factors, shape (n,).
    """
    now = root_mean_squares(gradients)
    known = (mean_square / (1.0 - decay**count).clamp(min=1e-12)).sqrt()
    before = torch.where(count > 0, known, now)
    usual = before.masked_fill(before == 0, torch.nan).nanmedian()
    mean_square.mul_(decay).addcmul_(now, now, value=1.0 - decay)
    count.add_(1.0)
    average = (mean_square / (1.0 - decay**count)).sqrt_()
    factors = (limit * usual / torch.maximum(now, average)).clamp_(max=1.0).nan_to_num_(nan=1.0)
    torch._foreach_mul_(list(gradients), list(factors.unbind()))
    return factors


def hold_spikes(
    gradients: Sequence[Tensor], mean_square: Tensor, count: Tensor, *, decay: float, limit: float
) -> Tensor:
    """Multiply each gradient by `min(1, limit * its own usual size / its RMS)`, in place.

    For an optimizer that divides by the gradient's size (Adam): a steady factor cancels there, a
    spike does not. The moving averages are of the gradients as scaled, so that a spike is over at
    once and a lasting rise gets through in a few steps; the first gradient passes as it is.

    Args and returns: as `scale_down`.
    """
    now = root_mean_squares(gradients)
    usual = (mean_square / (1.0 - decay**count).clamp(min=1e-12)).sqrt()
    held = torch.where((count > 0) & (usual > 0), limit * usual / now, 1.0)
    factors = held.clamp_(max=1.0).nan_to_num_(nan=1.0)
    torch._foreach_mul_(list(gradients), list(factors.unbind()))
    scaled = now * factors
    mean_square.mul_(decay).addcmul_(scaled, scaled, value=1.0 - decay)
    count.add_(1.0)
    return factors
