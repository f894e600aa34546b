"""What counts in a batch: sample weights, ignored targets and padding, applied once for all.

A loss gives values; the mean over what counts, and how much that is, is taken here. So a row that
counts for nothing changes no gradient and no metric, whichever loss or validator looks at it, and
micro-batches of any sizes add up to the whole batch.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from forge_kernel.errors import PluginError, RunError

if TYPE_CHECKING:
    from torch import Tensor

IGNORE_INDEX: Final = -100
"""The integer target that counts for nothing unless `run.ignore_index` says otherwise."""


@dataclass(frozen=True, slots=True)
class Counted:
    """How much each row of a batch counts.

    A row is a target where targets are integers, of which one value is ignored; otherwise (numbers,
    targets by name, none at all) a sample.

    Args:
        rows: how many there are.
        samples: how many samples they are of.
        weights: what each row counts, shape (rows,), fp32, >= 0; None: each counts 1.
        total: the sum of the weights; a number where the host knows it without waiting.
    """

    rows: int
    samples: int
    weights: Tensor | None
    total: float | Tensor

    def samplewise(self) -> Tensor | None:
        """What each sample counts, shape (samples,): the sum over its rows; None: all the same."""
        if self.weights is None or self.rows == self.samples:
            return self.weights
        return self.weights.view(self.samples, -1).sum(1)

    def by_row(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Values in one row each, and what each of them counts.

        Args:
            values: one for each row or for each sample; of numbers also several for each sample,
                which are averaged.

        Returns:
            Shapes (n,) and (n,), or None for equal weights.

        Raises:
            PluginError: there are neither as many values as rows nor as samples.
        """
        count, flat = values.numel(), values.reshape(-1)
        if count == self.rows:
            return flat, self.weights
        if count == self.samples:
            return flat, self.samplewise()
        if self.rows == self.samples and self.samples and count % self.samples == 0:
            return values.reshape(self.samples, -1).mean(1), self.weights
        raise PluginError(
            f"the loss gave {count} values for {self.rows} targets of {self.samples} samples: give "
            "one value for each target, one for each sample, or their mean as one number"
        )

    def mean(self, values: Tensor, factors: Tensor | None = None) -> tuple[Tensor, float | Tensor]:
        """`sum_i w_i v_i / sum_i w_i f_i`, and that divisor.

        Args:
            values: see `by_row`; or 0-d: the mean over what counts, taken already.
            factors: each value's part in the divisor beside its weight, >= 0; None: 1.

        Returns:
            The mean (0-d) and its weight; both 0 where nothing counts.
        """
        import torch

        if values.ndim == 0:
            return self._told(values), self.total
        flat, weights = self.by_row(values)
        if weights is not None:  # what a row of weight 0 holds, infinity even, is not read
            flat = torch.where(weights > 0, flat, 0.0) * weights
        if factors is None:
            if weights is None:
                return (flat.mean() if len(flat) else flat.sum()), float(len(flat))
            divisor: float | Tensor = self.total
        else:
            own = factors.detach().reshape(-1)
            divisor = (own if weights is None else own * weights).sum()
        if isinstance(divisor, torch.Tensor):
            return flat.sum() / torch.where(divisor > 0, divisor, 1.0), divisor
        return flat.sum() / (divisor or 1.0), divisor

    def _told(self, mean: Tensor) -> Tensor:
        """A mean that was taken already; 0 where nothing counts, since 0 / 0 is no number."""
        import torch

        if isinstance(self.total, torch.Tensor):
            return torch.where(self.total > 0, mean, 0.0)
        return mean if self.total else torch.zeros_like(mean)


def count(targets: Any, weights: Tensor | None, inputs: Any, ignore_index: int) -> Counted:
    """How much each row of a batch counts; read on the host where the targets lie there.

    Args:
        targets: integers of which `ignore_index` counts for nothing; or numbers, a mapping, None.
        weights: of each sample, shape (samples,), or of each target, in the targets' shape; None:
            equal.
        inputs: where the samples are counted when there are no targets, or they are a mapping.
        ignore_index: the integer target that counts for nothing.

    Raises:
        RunError: there are not as many weights as samples or targets, or a weight is below 0.
    """
    shape = targets.shape if hasattr(targets, "is_floating_point") else ()  # of a tensor
    if not shape:
        samples = samples_of(inputs)
        return _weighed(samples, samples, None, weights)
    samples, dtype = shape[0], targets.dtype
    whole = _WHOLE.get(dtype)
    if whole is None:
        whole = _WHOLE[dtype] = _is_whole(targets)
    if not whole:
        return _weighed(samples, samples, None, weights)
    rows, counts = (samples if len(shape) == 1 else targets.numel()), None
    if not targets.is_cpu or _holds(targets, rows, ignore_index):
        counts = (targets != ignore_index).reshape(-1).float()
    return _weighed(rows, samples, counts, weights)


_FEW: Final = 64
_MANY: Final = 4096
_WHOLE: Final[dict[Any, bool]] = {}
"""Whether a dtype is of integers, of those that were met."""


def _is_whole(targets: Tensor) -> bool:
    import torch

    number = targets.is_floating_point() or targets.is_complex()
    return not number and targets.dtype is not torch.bool


def _holds(targets: Tensor, rows: int, ignore_index: int) -> bool:
    """Whether any target on the host is the ignored one, in a fraction of torch's own time.

    Each step asks it. Few are quickest as Python's own numbers. Of more the bytes are searched;
    what looks like the ignored one there may lie across two targets, so it is looked at again.
    """
    if rows <= _FEW:
        values = targets.tolist() if targets.ndim == 1 else targets.reshape(-1).tolist()
        return ignore_index in values
    held = targets.numpy()
    if rows <= _MANY and held.itemsize == 8:
        sought = ignore_index.to_bytes(8, sys.byteorder, signed=True)
        if sought not in held.tobytes():
            return False
    return bool((held == ignore_index).any())


_EQUAL: Final[dict[tuple[int, int], Counted]] = {}
"""Batches of so many rows in which each counts 1: nearly all, and all the same."""


def _weighed(rows: int, samples: int, counts: Tensor | None, weights: Tensor | None) -> Counted:
    """Join what the targets say with the sample weights."""
    if weights is None and counts is None:
        known = _EQUAL.get((rows, samples))
        if known is None:
            if len(_EQUAL) > _FEW:
                _EQUAL.clear()
            known = _EQUAL[rows, samples] = Counted(rows, samples, None, float(rows))
        return known
    if weights is not None:
        given = weights.detach().float().reshape(-1)
        if len(given) == samples and samples != rows:
            given = given.view(samples, 1).expand(samples, rows // max(samples, 1)).reshape(-1)
        if len(given) != rows:
            raise RunError(
                f"a batch has {weights.numel()} weights for {samples} samples ({rows} targets): "
                "give one for each sample"
            )
        if given.is_cpu and bool((given < 0).any()):
            raise RunError("a batch has a weight below 0: a weight is how much a sample counts")
        counts = given if counts is None else counts.to(given.device) * given
    assert counts is not None
    total = counts.sum()
    return Counted(rows, samples, counts, float(total) if total.is_cpu else total)


def samples_of(inputs: Any) -> int:
    """How many samples inputs hold: the length of the first thing in them that has one."""
    result = inputs
    for _ in range(8):  # a mapping of lists of tensors is not deeper
        if isinstance(result, Mapping) and result:
            result = next(iter(result.values()))
        elif isinstance(result, list | tuple) and result and not _is_number(result[0]):
            result = result[0]
        else:
            break
    shape = getattr(result, "shape", None)
    if shape is not None:
        return int(shape[0]) if len(shape) else 1
    return len(result) if hasattr(result, "__len__") else 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | str)


@dataclass(frozen=True, slots=True)
class LossTerm:
    """A part of a loss: values whose mean over what counts is taken by the kernel.

    Args:
        values: one for each target or for each sample, any shape; or 0-d: their mean over what
            counts, taken already.
        factors: each value's part in the divisor of the mean beside what it counts, such as its
            class's weight; computed from targets alone. None: 1.
        scale: factor on the mean, a number or 0-d (learned weights of tasks, say).
        counted: what counts, where that is not what counts in the batch (a task's own targets).
        weight: what a 0-d mean was taken over, where it is not what counts in the batch.
        name: under which `step.losses` shows the mean; empty: not shown.
    """

    values: Tensor
    factors: Tensor | None = None
    scale: float | Tensor = 1.0
    counted: Counted | None = None
    weight: float | Tensor | None = None
    name: str = ""

    def mean(self, counted: Counted) -> tuple[Tensor, float | Tensor]:
        """The mean over what counts (0-d), without the scale, and its weight.

        Args:
            counted: of the batch.
        """
        if self.weight is not None:
            return self.values, self.weight
        return (self.counted or counted).mean(self.values, self.factors)


LossAnswer = Any
"""What `compute_loss` gives: a tensor, a `LossTerm`, several of them, or (mean, weight)."""


def loss_terms(answer: LossAnswer) -> tuple[LossTerm, ...]:
    """The terms of a loss, in whichever form it was given.

    Args:
        answer: a tensor (see `LossTerm.values`); a `LossTerm`; a list of them, whose scaled means
            are added up; or a pair of a mean (0-d) and its weight, for a loss that counts itself.

    Raises:
        PluginError: it is none of these.
    """
    import torch

    if isinstance(answer, torch.Tensor):
        return (LossTerm(answer),)
    if isinstance(answer, LossTerm):
        return (answer,)
    if isinstance(answer, tuple) and len(answer) == 2 and not isinstance(answer[0], LossTerm):
        mean, weight = answer
        if isinstance(mean, torch.Tensor) and not mean.ndim:
            return (LossTerm(mean, weight=weight),)
    elif (
        isinstance(answer, Sequence)
        and answer
        and all(isinstance(term, LossTerm) for term in answer)
    ):
        return tuple(answer)
    raise PluginError(
        f"compute_loss gave {_shown(answer)}: give a tensor of values (one for each target or "
        "sample), their mean as a 0-d tensor, a LossTerm, or a list of them"
    )


def _shown(answer: Any) -> str:
    if isinstance(answer, list | tuple):
        return f"a {type(answer).__name__} of {', '.join(type(one).__name__ for one in answer)}"
    return f"a {type(answer).__name__}"


def loss_weights(loss: Any, run: Any, batch: Any) -> list[float | Tensor]:
    """What each term of a nested loss counts in a batch: `compute_loss_weights`, if it answers.

    Args:
        loss: the plugin.
        run: the run.
        batch: with the targets that the loss is given.
    """
    asked = getattr(loss, "compute_loss_weights", None)
    return [batch.counted.total] if asked is None else list(asked(run, batch))
