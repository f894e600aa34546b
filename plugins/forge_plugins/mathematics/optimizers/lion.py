"""Lion: the sign of a blend of gradient and momentum."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675.

    `c = b1 m + (1 - b1) g;  w -= lr (sign(c) + decay w);  m = b2 m + (1 - b2) g`. One state tensor
    for each parameter.

    Args:
        params: parameters or groups.
        lr: learning rate; about a tenth of Adam's.
        betas: `b1` of the step, `b2` of the momentum.
        weight_decay: decoupled, times the learning rate.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            gradients = [p.grad for p in parameters]
            self._update(parameters, gradients, group)
        return loss

    def _update(
        self, parameters: list[Tensor], gradients: list[Any], group: dict[str, Any]
    ) -> None:
        lr, (fast, slow) = float(group["lr"]), group["betas"]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
        averages = [self.state[parameter]["exp_avg"] for parameter in parameters]
        direction = torch._foreach_lerp(averages, gradients, 1.0 - fast)
        torch._foreach_sign_(direction)
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1.0 - lr * group["weight_decay"])
        torch._foreach_add_(parameters, direction, alpha=-lr)
        torch._foreach_lerp_(averages, gradients, 1.0 - slow)
