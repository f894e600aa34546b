"""AdamW on Grokfast's gradients, in one passage over memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch import Tensor, nn

PIECE: Final = 131_072
"""Tensors with more elements are updated one by one; where nothing is compiled, in such pieces."""

Row = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Parameter, gradient, slow gradient, average, average of squares; number of steps (0-d)."""


class GrokfastAdamW(torch.optim.Optimizer):
    """`mu <- alpha mu + (1 - alpha) g`, then AdamW's step with `g + lambda mu`.

    The EMA filter of Lee et al. 2024 (arXiv 2405.20233, algorithm 2; the average starts at the
    first gradient) in front of AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101). Apart they
    read and write eleven arrays; one compiled loop over large tensors needs nine. Without it the
    same is done by torch's own kernels, bit for bit as filter and `AdamW(fused=True)` apart. The
    gradients are spent: their values afterwards mean nothing.

    Args:
        params: parameters or groups.
        lr: learning rate.
        betas: decay of the averages of the filtered gradient and of its square.
        eps: added to the root in the divisor.
        weight_decay: decoupled, times the learning rate.
        alpha: decay of the slow gradient, 0 <= alpha < 1.
        lambda_reg: how much of it is added, >= 0.
        compiled: sweep over large tensors in a loop that torch.compile makes; results agree with
            the others up to rounding.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        alpha: float = 0.98,
        lambda_reg: float = 2.0,
        compiled: bool = False,
    ) -> None:
        if not 0 <= alpha < 1 or lambda_reg < 0:
            raise ValueError("alpha lies in [0, 1), lambda_reg is at least 0")
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "alpha": alpha, "lambda_reg": lambda_reg,
        }  # fmt: skip
        super().__init__(params, defaults)
        self._update_large = _sweep if compiled else _update_in_pieces

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rows = [self._row(p) for p in group["params"] if p.grad is not None]
            if not rows:
                continue
            torch._foreach_add_([row[-1] for row in rows], 1.0)
            large = [is_large(row[0], row[1]) for row in rows]
            self._update_large(
                [row for row, alone in zip(rows, large, strict=True) if alone], group
            )
            together = [row for row, alone in zip(rows, large, strict=True) if not alone]
            if together:
                _update(together, group)
        return loss

    def _row(self, parameter: nn.Parameter) -> Row:
        gradient = parameter.grad
        assert gradient is not None, "asked for a parameter without a gradient"
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["slow_gradient"] = torch.empty_like(parameter).copy_(gradient)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        averages = (state["slow_gradient"], state["exp_avg"], state["exp_avg_sq"])
        return (parameter, gradient, *averages, state["step"])


def is_large(parameter: Tensor, gradient: Tensor | None = None) -> bool:
    """Whether a tensor is updated by itself: on a CPU, large, and in the order of its memory."""
    in_order = parameter.is_contiguous() and (gradient is None or gradient.is_contiguous())
    return parameter.is_cpu and in_order and parameter.numel() > PIECE


def _update(rows: list[Row], group: dict[str, Any]) -> None:
    """Several tensors in few calls, by torch's own kernels."""
    parameters, gradients, slow, averages, squares, steps = (
        list(c) for c in zip(*rows, strict=True)
    )
    torch._foreach_lerp_(slow, gradients, 1.0 - group["alpha"])
    torch._foreach_add_(gradients, slow, alpha=group["lambda_reg"])
    first, second = group["betas"]
    torch._fused_adamw_(
        parameters, gradients, averages, squares, [], steps, lr=float(group["lr"]), beta1=first,
        beta2=second, weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False,
        maximize=False,
    )  # fmt: skip


def _update_in_pieces(rows: list[Row], group: dict[str, Any]) -> None:
    """The same, piece by piece, so that the second kernel finds a part of it in the cache."""
    for *arrays, step in rows:
        for piece in zip(*(torch.split(array.view(-1), PIECE) for array in arrays), strict=True):
            _update([(*piece, step)], group)


def _formula(
    parameter: Tensor, gradient: Tensor, slow: Tensor, average: Tensor, square: Tensor,
    numbers: Tensor,
) -> None:  # fmt: skip
    """Filter and update of one tensor; `numbers` as `_numbers` puts them."""
    share, amount, keep, first, second, rate, root, eps = numbers.unbind()  # 1 - beta: the shares
    slow.lerp_(gradient, share)
    filtered = gradient + amount * slow
    average.lerp_(filtered, first)
    square.mul_(1.0 - second).add_(second * filtered * filtered)
    parameter.mul_(keep).sub_(rate * average / (square.sqrt() / root + eps))


@functools.cache
def _compiled_formula() -> Callable[..., None]:
    return torch.compile(_formula, dynamic=True)


def _numbers(group: dict[str, Any], count: float) -> Tensor:
    """What the formula needs in the step `count`; a tensor, so that new values compile nothing."""
    first, second = group["betas"]
    rate = float(group["lr"])
    return torch.tensor([
        1.0 - group["alpha"], group["lambda_reg"], 1.0 - rate * group["weight_decay"], 1.0 - first,
        1.0 - second, rate / (1.0 - first**count), (1.0 - second**count) ** 0.5, group["eps"],
    ])  # fmt: skip


def _sweep(rows: list[Row], group: dict[str, Any]) -> None:
    """Each tensor in one compiled loop."""
    sweep = _compiled_formula()
    known: dict[float, Tensor] = {}  # parameters that joined late have a count of their own
    for *arrays, step in rows:
        count = float(step)
        if count not in known:
            known[count] = _numbers(group, count)
        sweep(*(array.view(-1) for array in arrays), known[count])
