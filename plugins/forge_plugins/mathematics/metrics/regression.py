"""Distances from numbers, from sums that batches and processes add up without losing digits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def no_sums(device: torch.device | str) -> Tensor:
    """The sums of a set without a number, shape (5,)."""
    return torch.zeros(5, dtype=_exact(torch.device(device)), device=device)


def _exact(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def regression_sums(outputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """What a batch brings: count, mean and squared deviation of the targets, both distances.

    Args:
        outputs: numbers, any shape.
        targets: as many, in the same order.
        weights: what each number counts, as many; None: each 1.

    Returns:
        float64, shape (5,): what the numbers count, mean of the targets, sum of squares about that
        mean, sum of squared differences, sum of absolute differences. An empty batch gives zeros.
    """
    exact = _exact(targets.device)
    wanted = targets.detach().to(exact).reshape(-1)
    apart = outputs.detach().to(exact).reshape(-1) - wanted
    if weights is None:
        own = torch.ones_like(wanted)
    else:
        own = weights.detach().to(exact).reshape(-1)
        wanted, apart = torch.where(own > 0, wanted, 0.0), torch.where(own > 0, apart, 0.0)
    count = own.sum()
    mean = (own * wanted).sum() / _divisor(count)
    spread = (own * (wanted - mean).square()).sum()
    squares, distances = (own * apart.square()).sum(), (own * apart.abs()).sum()
    return torch.stack([count, mean, spread, squares, distances])


def _divisor(count: Tensor) -> Tensor:
    return torch.where(count > 0, count, 1.0)


def merged(first: Tensor, second: Tensor) -> Tensor:
    """The sums of two sets together, shape (5,), as `regression_sums` gives them.

    Means and deviations are joined after Chan, Golub and LeVeque 1979: a sum of plain squares
    would lose the deviation of targets that lie far from zero.
    """
    count = first[0] + second[0]
    shift = second[1] - first[1]
    share = second[0] / _divisor(count)
    mean = first[1] + shift * share
    spread = first[2] + second[2] + shift.square() * first[0] * share
    return torch.stack([count, mean, spread, first[3] + second[3], first[4] + second[4]])


def regression_metrics(sums: Tensor, add: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """`mse`, `mae` and `r2` (1 - residual / total over all numbers together).

    Args:
        sums: shape (5,), of this process's whole share, from `regression_sums` and `merged`.
        add: sums a tensor over all processes; it is asked twice, whatever the sums are.

    Returns:
        Empty without a number; without `r2` when all targets are equal.
    """
    plain = add(torch.stack([sums[0], sums[0] * sums[1], sums[3], sums[4]]))
    count = _divisor(plain[0])
    mean = plain[1] / count
    spread = float(add(sums[2] + sums[0] * (sums[1] - mean).square()))
    numbers, _, squares, distances = plain.tolist()
    if not numbers:
        return {}
    result = {"mse": squares / numbers, "mae": distances / numbers}
    rounding = 4 * torch.finfo(sums.dtype).eps * float(mean)  # of equal targets about their mean
    if spread > numbers * rounding**2:
        result["r2"] = 1.0 - squares / spread
    return result
