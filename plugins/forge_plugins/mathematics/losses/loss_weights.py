"""Weights of several losses: learned, or after how fast each falls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from forge_plugins.mathematics.optimizers.plain_parameters import HALVES


class Uncertainty(nn.Module):
    """`sum_i exp(-s_i) L_i + s_i / 2` with learned `s_i = log sigma_i^2`, 0 at first.

    Kendall, Gal, Cipolla 2018, arXiv 1705.07115, section 3.2 (the form that stays stable; the
    factor one half of regression is part of the loss).
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.log_variance = nn.Parameter(torch.zeros(len(self.names)))

    def factors(self) -> Tensor:
        """`exp(-s_i)`, shape (tasks,)."""
        return torch.exp(-self.log_variance)

    def regularizer(self) -> Tensor:
        """`sum_i s_i / 2`, 0-d."""
        return 0.5 * self.log_variance.sum()

    def forward(self, losses: Tensor) -> Tensor:
        """The total of losses of shape (tasks,)."""
        return (self.factors() * losses).sum() + self.regularizer()


class RateOfFall(nn.Module):
    """Weights that are higher for losses that fall more slowly; their sum is the number of losses.

    After dynamic weight averaging (Liu, Johns, Davison 2019, arXiv 1803.10704, equation 7), with
    two moving averages in place of the means of epochs: `r_i = fast_i / slow_i`,
    `w = n softmax(r / T)`. The averages are buffers: they go where the module goes, and into its
    state.

    Args:
        count: of losses.
        decay: of the fast average; the slow one's is its tenth root.
    """

    steps: Tensor
    averages: Tensor

    def __init__(self, count: int, decay: float) -> None:
        super().__init__()
        self.decays = (decay, decay**0.1)
        self.count = count
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("averages", torch.zeros(2, count, dtype=torch.float32))

    @torch.no_grad()
    def take(self, losses: Tensor) -> None:
        """Take in the losses of a step, shape (count,); a step with one that is not finite is none.

        Without a read to the host.
        """
        if self.averages.device != losses.device:
            self.to(losses.device)
        if self.averages.dtype in HALVES:  # the module went to half precision with its owner
            self.averages = self.averages.float()
        new = losses.detach().float()
        finite = torch.isfinite(new).all()
        for average, decay in zip(self.averages, self.decays, strict=True):
            taken = average.mul(decay).add_(new, alpha=1.0 - decay)
            average.copy_(torch.where(finite, taken, average))
        self.steps += finite

    def weights(self, temperature: float, *, like: Tensor | None = None) -> Tensor:
        """Shape (count,), of the dtype and on the device of `like`; equal before the first step."""
        like = self.averages[0] if like is None else like
        steps, averages = self.steps.to(like.device), self.averages.to(like.device)
        fast, slow = (
            average / (1.0 - decay ** steps.double())
            for average, decay in zip(averages, self.decays, strict=True)
        )
        ratio = fast / slow.clamp_min(1e-12)
        result = (self.count * torch.softmax(ratio / temperature, 0)).to(like)
        return torch.where(steps > 0, result, torch.ones_like(like))
