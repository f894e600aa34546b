"""Weights of several losses: learned, or after how fast each falls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


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

    def penalty(self) -> Tensor:
        """`sum_i s_i / 2`, 0-d."""
        return 0.5 * self.log_variance.sum()

    def forward(self, losses: Tensor) -> Tensor:
        """The total of losses of shape (tasks,)."""
        return (self.factors() * losses).sum() + self.penalty()


class RateOfFall:
    """Weights that are higher for losses that fall more slowly; their sum is the number of losses.

    After dynamic weight averaging (Liu, Johns, Davison 2019, arXiv 1803.10704, equation 7), with
    two moving averages in place of the means of epochs: `r_i = fast_i / slow_i`,
    `w = n softmax(r / T)`.

    Args:
        count: of losses.
        decay: of the fast average; the slow one's is its tenth root.
    """

    def __init__(self, count: int, decay: float) -> None:
        self.decays = (decay, decay**0.1)
        self.count = count
        self.steps = 0
        self.averages: Tensor | None = None  # shape (2, count)

    def take(self, losses: Tensor) -> None:
        """Take in the losses of a step, shape (count,), without gradient."""
        if self.averages is None:
            self.averages = torch.zeros(2, self.count, device=losses.device)
        self.averages = self.averages.to(losses.device)
        self.steps += 1
        for average, decay in zip(self.averages, self.decays, strict=True):
            average.mul_(decay).add_(losses.float(), alpha=1.0 - decay)

    def weights(self, temperature: float, *, like: Tensor | None = None) -> Tensor:
        """Shape (count,), of the dtype and on the device of `like`; equal before the first step."""
        if self.averages is None or not self.steps:
            return torch.ones(self.count) if like is None else torch.ones_like(like)
        fast, slow = (
            average / (1.0 - decay**self.steps) if decay else average
            for average, decay in zip(self.averages, self.decays, strict=True)
        )
        ratio = fast / slow.clamp_min(1e-12)
        found = self.count * torch.softmax(ratio / temperature, 0)
        return found if like is None else found.to(like)

    def state_dict(self) -> dict[str, Any]:
        """The averages."""
        return {"steps": self.steps, "averages": self.averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the averages."""
        self.steps = int(state["steps"])
        self.averages = None if state["averages"] is None else state["averages"].clone()
