"""Cross-entropy over a large vocabulary without all logits at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def chunked_cross_entropy(
    hidden: Tensor,
    targets: Tensor,
    head: nn.Module,
    *,
    piece: int,
    label_smoothing: float = 0.0,
    ignored: int = -100,
    weights: Tensor | None = None,
) -> Tensor:
    """The mean cross-entropy of `head(hidden)`.

    The gradients of a piece are taken while its logits are there and kept for backward, so that
    neither pass holds more than one piece of logits, and the head is computed once. Values are in
    fp32 whatever the head's dtype.

    Args:
        hidden: shape (n, width).
        targets: shape (n,), integers.
        head: gives logits (m, vocabulary) of (m, width); its parameters get their gradients.
        piece: rows of logits at a time.
        label_smoothing: share of the target that is spread over all classes.
        ignored: the target that counts for nothing: its loss is 0.
        weights: what each target counts, shape (n,), without gradient; None: each 1.

    Returns:
        The mean over the weights (0-d); 0 where nothing counts.
    """
    total: float | Tensor = len(targets) if weights is None else weights.sum()
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    options = (piece, label_smoothing, ignored)
    apply: Any = _Sum.apply
    summed: Tensor = apply(hidden, targets, weights, head, options, *parameters)
    if isinstance(total, Tensor):
        return summed / torch.where(total > 0, total, 1.0)
    return summed / (total or 1.0)


class _Sum(torch.autograd.Function):
    """The sum over all rows; gradients of a piece are taken in the forward pass.

        hidden (n, width) --piece by piece--> head --> logits (piece, vocabulary) --> loss
                                                |
        backward: what was kept, times dL/dsum: (n, width), and each parameter's own shape

    So no more than one piece of logits is there at a time, in either direction.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        head: nn.Module,
        options: tuple[int, float, int],
        *parameters: nn.Parameter,
    ) -> Tensor:
        wanted = any(ctx.needs_input_grad)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        result = _Gradients(hidden, parameters) if wanted else None
        for begin in range(0, len(hidden), options[0]):
            rows = slice(begin, begin + options[0])
            own = None if weights is None else weights[rows]
            with torch.set_grad_enabled(wanted):
                part = hidden[rows].detach().requires_grad_(wanted)
                loss = _piece_loss(head(part), targets[rows], own, options)
                if result is not None:
                    result.take(rows, part, loss)
            total += loss.detach()
        ctx.found = result
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        result, (factor,) = ctx.found, gradients
        assert result is not None, "backward without a gradient to give"
        ctx.found = None  # the buffers are handed on, not copied
        return (
            result.hidden.mul_(factor.to(result.hidden.dtype)), None, None, None, None,
            *(each.mul_(factor.to(each.dtype)) for each in result.parameters),
        )  # fmt: skip


class _Gradients:
    """What backward will hand on."""

    def __init__(self, hidden: Tensor, parameters: tuple[nn.Parameter, ...]) -> None:
        self._of = parameters
        self.hidden = torch.empty_like(hidden)
        self.parameters = [torch.zeros_like(parameter) for parameter in parameters]

    def take(self, rows: slice, part: Tensor, loss: Tensor) -> None:
        """The gradients of a piece: of the hidden rows, shape (piece, width), and of the head."""
        first, *others = torch.autograd.grad(loss, (part, *self._of))
        self.hidden[rows] = first
        for kept, own in zip(self.parameters, others, strict=True):
            kept.add_(own)


def _piece_loss(
    logits: Tensor, targets: Tensor, weights: Tensor | None, options: tuple[int, float, int]
) -> Tensor:
    _, smoothing, ignored = options
    if weights is None:
        return functional.cross_entropy(
            logits.float(),
            targets,
            reduction="sum",
            label_smoothing=smoothing,
            ignore_index=ignored,
        )
    each = functional.cross_entropy(
        logits.float(), targets, reduction="none", label_smoothing=smoothing, ignore_index=ignored
    )
    return (each * weights).sum()
