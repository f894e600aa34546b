"""The micro-batches of one optimizer step, brought to their weighted mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Window:
    """Gradients and loss of `sum_i w_i mean_i / sum_i w_i`, a micro-batch at a time.

    The later weights are unknown when the first micro-batch is differentiated. So each one is
    differentiated as `mean_i * w_i / w_ref`, `w_ref` the first weight, and `close` multiplies the
    sums by `w_ref / sum_i w_i`. A window of one micro-batch is its plain loss, to the bit.

    A weight is a number, or a 0-d tensor that the host never reads.
    """

    def __init__(self) -> None:
        self.count = 0  # micro-batches so far; 0 opens the next window
        self.loss: Tensor | None = None  # their mean; None while more than one are added up
        self.weight: float | Tensor = 0.0  # their sum
        self._reference: float | Tensor = 1.0
        self._sum: Tensor | None = None

    def add(self, loss: Tensor, weight: float | Tensor) -> Tensor:
        """Take in a micro-batch.

        Args:
            loss: its mean loss, 0-d.
            weight: how much it counts, >= 0.

        Returns:
            What is to be differentiated for it.
        """
        mean = loss.detach()
        self.count += 1
        if self.count == 1:
            self.loss, self.weight, self._sum = mean, weight, None
            if isinstance(weight, Tensor):
                self._reference = torch.where(weight > 0, weight, 1.0)
            else:
                self._reference = weight or 1.0
            return loss
        if self._sum is None:
            assert self.loss is not None
            self._sum, self.loss = self.loss * self.weight, None
        self._sum = self._sum + mean * weight
        self.weight = self.weight + weight
        return loss * (weight / self._reference)

    def close(self, gradients: Sequence[Tensor]) -> None:
        """Bring the gradients (in place) and the loss of several micro-batches to their mean."""
        assert self._sum is not None, "a window of one micro-batch needs no closing"
        total, reference = self.weight, self._reference
        if isinstance(total, Tensor):
            factor = torch.where(total > 0, reference / total, 0.0)
            self.loss = self._sum / torch.where(total > 0, total, 1.0)
            for gradient in gradients:
                gradient.mul_(factor)
            return
        self.loss = self._sum / (total or 1.0)
        if gradients and total:
            assert not isinstance(reference, Tensor)
            torch._foreach_mul_(list(gradients), reference / total)
