"""Grokfast: amplify the slow component of the gradients.

Lee et al. 2024, "Grokfast: Accelerated Grokking by Amplifying Slow Gradients", arXiv 2405.20233,
algorithms 1 (moving average over a window) and 2 (exponential moving average). The slow component
is always added, never subtracted. All updates are in place on the gradients handed in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from forge_plugins.mathematics.optimizers.plain_parameters import HALVES

Beginning = Literal["first", "zero", "debiased"]

PIECE = 65_536
"""Elements handled at once on a CPU, so that the second pass finds them in its cache."""


@dataclass
class SlowGradient:
    """Exponential moving average of one parameter's gradient, and how many went in.

    The mean of half-precision gradients is fp32: in their own dtype it would lose its increments.
    """

    mean: Tensor
    count: int = 0

    @classmethod
    def like(cls, gradient: Tensor) -> SlowGradient:
        """A fresh memory for gradients of this shape, dtype and device."""
        return cls(_zeros(gradient))


def _zeros(gradient: Tensor) -> Tensor:
    """Contiguous zeros of a gradient's shape; fp32 for half precision."""
    dtype = torch.float32 if gradient.dtype in HALVES else gradient.dtype
    return torch.zeros_like(gradient, dtype=dtype, memory_format=torch.contiguous_format)


def _pieces(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Tensors of one shape side by side, piece by piece where all lie in one order."""
    if tensors[0].numel() <= PIECE or not all(tensor.is_contiguous() for tensor in tensors):
        return (tensors,)
    return zip(*(torch.split(tensor.view(-1), PIECE) for tensor in tensors), strict=True)


def filter_ema(
    gradients: Sequence[Tensor],
    slow: Sequence[SlowGradient],
    *,
    alpha: float,
    lambda_reg: float,
    beginning: Beginning = "first",
    normalize: bool = False,
) -> None:
    """`mu <- alpha mu + (1 - alpha) g`, then `g <- g + lambda mu`.

    Args:
        gradients: of this optimizer step, changed in place.
        slow: one memory for each gradient, the same shapes, changed in place.
        alpha: decay, 0 <= alpha < 1.
        lambda_reg: amplification, >= 0.
        beginning: what mu starts from: the `first` gradient (the published code), `zero` (the
            paper's text), or zero with the bias divided out (`debiased`, as Adam does).
        normalize: divide the sum by `1 + lambda`, so that a steady gradient keeps its size.
    """
    share = 1.0 / (1.0 + lambda_reg) if normalize else 1.0
    if gradients and gradients[0].is_cuda and beginning == "first":
        _filter_ema_foreach(gradients, slow, alpha, lambda_reg, share)
        return
    for gradient, memory in zip(gradients, slow, strict=True):
        memory.count += 1
        amplify = lambda_reg
        if beginning == "debiased":
            amplify = lambda_reg / (1.0 - alpha**memory.count)
        if memory.count == 1 and beginning == "first":
            memory.mean.copy_(gradient)
            gradient.mul_((1.0 + lambda_reg) * share)
            continue
        for g, mu in _pieces(gradient, memory.mean):
            mu.lerp_(g.to(mu.dtype), 1.0 - alpha)
            g.add_(mu, alpha=amplify)
            if normalize:
                g.mul_(share)


def _filter_ema_foreach(
    gradients: Sequence[Tensor],
    slow: Sequence[SlowGradient],
    alpha: float,
    lambda_reg: float,
    share: float,
) -> None:
    """The same in few kernel launches; a fresh memory takes the gradient as a whole."""
    for gradient, memory in zip(gradients, slow, strict=True):
        if memory.count == 0:
            memory.mean.copy_(gradient)
        memory.count += 1
    means = [memory.mean for memory in slow]
    whole = [g.to(mean.dtype) for g, mean in zip(gradients, means, strict=True)]
    torch._foreach_lerp_(means, whole, 1.0 - alpha)
    torch._foreach_add_(list(gradients), means, alpha=lambda_reg)
    if share != 1.0:
        torch._foreach_mul_(list(gradients), share)


class Window:
    """Mean of the last `length` gradients of one parameter, in constant time for each step.

    A ring of copies and their running sum (fp32 of half precision); the sum is taken anew once a
    turn, because what is added and later subtracted does not cancel to the last bit.

    Args:
        like: the gradient whose shape, dtype and device the copies have.
        length: gradients in the window.
    """

    def __init__(self, like: Tensor, length: int) -> None:
        self.ring = torch.zeros((length, *like.shape), dtype=like.dtype, device=like.device)
        self.sum = _zeros(like)
        self.count = 0  # gradients seen

    def push(self, gradient: Tensor) -> None:
        """Take in a copy of the gradient, of the shape of the others; the oldest one leaves."""
        length = len(self.ring)
        slot = self.ring[self.count % length]
        self.count += 1
        if self.count % length == 0:
            slot.copy_(gradient)
            torch.sum(self.ring, dim=0, dtype=self.sum.dtype, out=self.sum)
            return
        self.sum.add_(gradient).sub_(slot)
        slot.copy_(gradient)

    @property
    def full(self) -> bool:
        """Whether the window has been filled once."""
        return self.count >= len(self.ring)


def filter_ma(
    gradients: Sequence[Tensor],
    windows: Sequence[Window],
    *,
    lambda_reg: float,
    wait_until_full: bool = True,
    normalize: bool = False,
) -> None:
    """`g <- g + lambda * mean of the last gradients, this one among them`.

    Args:
        gradients: of this optimizer step, any shapes, changed in place.
        windows: one for each gradient, of its shape.
        lambda_reg: amplification, >= 0.
        wait_until_full: leave gradients alone until the window has been filled.
        normalize: divide the sum by `1 + lambda`.
    """
    for gradient, window in zip(gradients, windows, strict=True):
        window.push(gradient)
        if wait_until_full and not window.full:
            continue
        seen = min(window.count, len(window.ring))
        gradient.add_(window.sum, alpha=lambda_reg / seen)
        if normalize:
            gradient.mul_(1.0 / (1.0 + lambda_reg))
