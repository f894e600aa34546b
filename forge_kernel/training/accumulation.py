"""The micro-batches of one optimizer step, brought to their weighted mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from forge_kernel.errors import RunError


@dataclass(frozen=True, slots=True)
class TermMean:
    """A term of a micro-batch's loss: its mean (0-d) over `weight`, and the factor on it."""

    mean: Tensor
    weight: float | Tensor
    scale: float | Tensor = 1.0
    name: str = ""


class GradientAccumulation:
    """Gradients and loss of `sum_i w_i mean_i / sum_i w_i`, a micro-batch at a time.

    The later weights are unknown when the first micro-batch is differentiated. So each one is
    differentiated as `mean_i * w_i / w_ref`, `w_ref` the first weight, and `close` multiplies the
    sums by `w_ref / sum_i w_i`. A window of one micro-batch is its plain loss, to the bit.

    The gradients of several terms (tasks, a teacher), each with weights of its own, cannot be told
    apart any more when the window closes. Their weights are therefore to be known before
    (`expect`); without that a window is exact where all terms' weights grow alike, and refused
    where not.

    A weight is a number, or a 0-d tensor that the host never reads.
    """

    def __init__(self) -> None:
        self.count = 0  # micro-batches so far; 0 opens the next window
        self.loss: Tensor | None = None  # their mean; None while more than one are added up
        self.weight: float | Tensor = 0.0  # their sum
        self.terms: dict[str, Tensor] = {}  # mean of each named term, when the window is closed
        self._reference: float | Tensor = 1.0
        self._sum: Tensor | None = None
        self._expected: tuple[float | Tensor, ...] | None = None
        self._references: tuple[float | Tensor, ...] = ()
        self._sums: list[Tensor] = []  # of each term, mean times weight
        self._weights: list[float | Tensor] = []
        self._last: Sequence[TermMean] = ()  # the names and scales of the terms
        self.has_terms = False  # the window's loss is a sum of means over weights of their own

    def expect(self, weights: tuple[float | Tensor, ...]) -> None:
        """Tell the weights of the terms over the whole window that comes next."""
        assert self.count == 0, "the window has begun"
        self._expected = weights

    def add(self, loss: Tensor, weight: float | Tensor) -> Tensor:
        """Take in a micro-batch whose loss is one mean.

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
            self.has_terms = False
            if isinstance(weight, Tensor):
                self._reference = _reference(weight)
            else:
                self._reference = weight or 1.0
            return loss
        if self._sum is None:
            assert self.loss is not None
            self._sum, self.loss = self.loss * self.weight, None
        self._sum = self._sum + mean * weight
        self.weight = self.weight + weight
        return loss * (weight / self._reference)

    def add_terms(self, terms: Sequence[TermMean]) -> Tensor:
        """Take in a micro-batch whose loss is a sum of means over weights of their own.

        Returns:
            What is to be differentiated for it.
        """
        weights = [term.weight for term in terms]
        if self.count == 0:
            if self._expected is not None and len(self._expected) != len(terms):
                raise RunError(
                    f"compute_loss gave {len(terms)} terms, compute_loss_weights "
                    f"{len(self._expected)} weights: one for each term, in their order"
                )
            self._references = self._expected or tuple(_reference(weight) for weight in weights)
            self._sums = [term.mean.detach() * term.weight for term in terms]
            self._weights = weights
        else:
            self._sums = [
                kept + term.mean.detach() * term.weight
                for kept, term in zip(self._sums, terms, strict=True)
            ]
            self._weights = [kept + new for kept, new in zip(self._weights, weights, strict=True)]
        self.count += 1
        self._last, self.has_terms = terms, True
        self.weight = sum(self._weights[1:], self._weights[0])
        if self.count == 1 and self._expected is None:
            shares = [term.mean * term.scale for term in terms]
        else:
            shares = [
                term.mean * term.scale * _ratio(term.weight, reference)
                for term, reference in zip(terms, self._references, strict=True)
            ]
        total = shares[0]
        for share in shares[1:]:
            total = total + share
        self.loss = total.detach() if self.count == 1 else None
        return total

    def close(self, gradients: Sequence[Tensor]) -> None:
        """Bring gradients (in place) and loss of the window to their mean, and end it.

        Needed for several micro-batches or terms; one micro-batch of one mean is closed as it is.

        Raises:
            RunError: several terms had weights that did not grow alike, and were not expected.
        """
        several = self.count > 1
        expected, self._expected = self._expected, None
        if self.has_terms:
            self._close_terms(gradients, several=several, expected=expected)
        elif several:
            self._close_one(gradients)
        self.count = 0

    def abandon(self) -> None:
        """End the window without its mean."""
        self.count, self._expected = 0, None

    def _close_one(self, gradients: Sequence[Tensor]) -> None:
        assert self._sum is not None
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

    def _close_terms(
        self,
        gradients: Sequence[Tensor],
        *,
        several: bool,
        expected: tuple[float | Tensor, ...] | None,
    ) -> None:
        means = [
            total * _ratio(1.0, weight)
            for total, weight in zip(self._sums, self._weights, strict=True)
        ]
        self.terms = {
            term.name: mean for term, mean in zip(self._last, means, strict=True) if term.name
        }
        if not several and expected is None:
            return
        scaled = [
            mean * (term.scale.detach() if isinstance(term.scale, Tensor) else term.scale)
            for term, mean in zip(self._last, means, strict=True)
        ]
        self.loss = sum(scaled[1:], scaled[0])
        if expected is not None:
            self._check(expected)
            return
        ratios = [
            float(_ratio(reference, total))
            for reference, total in zip(self._references, self._weights, strict=True)
            if float(total)  # a term without weight has given no gradient
        ]
        factor = ratios[0] if ratios else 1.0
        if any(abs(ratio - factor) > 1e-6 * factor for ratio in ratios):
            raise RunError(
                "the terms of this loss (tasks, a teacher) count differently in the micro-batches "
                "of one optimizer step: hand the whole window to step(*batches), which knows all "
                "their weights beforehand"
            )
        if gradients and ratios:
            torch._foreach_mul_(list(gradients), factor)

    def _check(self, expected: tuple[float | Tensor, ...]) -> None:
        """What was expected has come; looked at where the host knows it."""
        for number, (announced, counted) in enumerate(zip(expected, self._weights, strict=True)):
            if isinstance(announced, Tensor) or isinstance(counted, Tensor):
                continue
            if not abs(announced - counted) <= 1e-4 * counted:  # also of NaN and infinity
                raise RunError(
                    f"compute_loss_weights gave {announced:g} for term {number} of this step, and "
                    f"compute_loss counted {counted:g}: both must come from the targets alone"
                )


def _reference(weight: float | Tensor) -> float | Tensor:
    """A weight to divide by."""
    return torch.where(weight > 0, weight, 1.0) if isinstance(weight, Tensor) else weight or 1.0


def _ratio(weight: float | Tensor, total: float | Tensor) -> float | Tensor:
    """`weight / total`; 0 where the total is 0."""
    if isinstance(total, Tensor):
        return torch.where(total > 0, weight / torch.where(total > 0, total, 1.0), 0.0)
    return weight / total if total else 0.0
