"""Muon: steps of a momentum with all its singular values brought to one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn

from forge_plugins.mathematics.optimizers.newton_schulz import newton_schulz

Adjustment = Literal["original", "match_rms_adamw"]

FLOOR = 1e-7
"""Least norm that a momentum is divided by."""


class Muon(torch.optim.Optimizer):
    """Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".

    `m = u m + (1 - u) g;  w -= lr (decay w + f NS(m))`, with `g + u (m - g)` in the place of `m`
    for `nesterov`. In bf16 it is torch.optim.Muon, bit for bit.

    Args:
        params: matrices, or groups of them.
        lr: learning rate.
        momentum: `u`.
        nesterov: look ahead along the momentum.
        iterations: of Newton-Schulz.
        adjust: `f`; `original`: the root of rows / columns where that is above 1;
            `match_rms_adamw`: 0.2 times the root of the larger of both.
        weight_decay: decoupled, times the learning rate.
        dtype: in which Newton-Schulz is computed.

    Raises:
        ValueError: a parameter is no matrix.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        iterations: int = 5,
        adjust: Adjustment = "original",
        weight_decay: float = 0.1,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "nesterov": nesterov, "iterations": iterations,
            "adjust": adjust, "weight_decay": weight_decay, "dtype": dtype,
        }  # fmt: skip
        super().__init__(params, defaults)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(f"Muon is for matrices, got shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.numel():
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None, "asked for a parameter without a gradient"
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        kept, share, rate = state["momentum_buffer"], group["momentum"], float(group["lr"])
        kept.lerp_(gradient, 1.0 - share)
        direction = gradient.lerp(kept, share) if group["nesterov"] else kept
        update = newton_schulz(direction, group["iterations"], group["dtype"], FLOOR)
        parameter.mul_(1.0 - rate * group["weight_decay"])
        parameter.add_(update, alpha=-rate * _factor(group["adjust"], *parameter.shape))


def _factor(adjust: Adjustment, rows: int, columns: int) -> float:
    """How the rate follows a matrix's shape."""
    if adjust == "original":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))
