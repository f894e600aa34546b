"""A model's answers and the targets that they are for, one beside the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from forge_plugins.mathematics.losses.deferred_logits import DeferredLogits


def main_output(outputs: Any) -> Any:
    """The answers among what a model gives, whichever form it has.

    A tensor is the answers; so are `logits` of an object or mapping (models of transformers), and
    the first tensor of a tuple or list. A mapping without `logits` (tasks by name) stays as it is.
    """
    if isinstance(outputs, Tensor | DeferredLogits):
        return outputs
    if isinstance(outputs, Mapping):
        return outputs.get("logits", outputs)
    result = getattr(outputs, "logits", None)
    if isinstance(result, Tensor):
        return result
    if isinstance(outputs, tuple | list) and outputs and isinstance(outputs[0], Tensor):
        return outputs[0]
    return outputs


def at_targets(outputs: Any, targets: Any, positions: Any) -> Any:
    """What a model gives at the positions that have targets, where it answers at all of them.

    Args:
        outputs: logits, shape (samples, positions, classes), or anything else, which stays.
        targets: integers, shape (samples, those positions that have any), or anything else.
        positions: index of the sequence (second dimension) that the targets are of; None: all.
    """
    if positions is None or not isinstance(targets, Tensor) or targets.ndim < 2:
        return outputs
    everywhere = isinstance(outputs, Tensor) and outputs.ndim == 3
    if everywhere and outputs.shape[1] != targets.shape[1]:
        return outputs[:, positions]
    return outputs


def answer_pieces(
    outputs: Any, targets: Tensor, positions: Any = None
) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Rows of logits with their targets, all at once or, where they are deferred, in pieces.

    Args and Raises: as `answer_rows`; `outputs` may be `DeferredLogits` too.

    Yields:
        Logits, targets, and which rows of all they are.
    """
    outputs = main_output(outputs)
    if not isinstance(outputs, DeferredLogits):
        rows, wanted = answer_rows(outputs, targets, positions)
        yield rows, wanted, slice(0, len(rows))
        return
    wanted, begin = targets.reshape(-1), 0
    for rows in outputs.pieces():
        place = slice(begin, begin + len(rows))
        yield rows, wanted[place], place
        begin += len(rows)
    if begin != len(wanted):
        raise ValueError(f"{begin} answers for {len(wanted)} targets")


def answer_rows(outputs: Any, targets: Tensor, positions: Any = None) -> tuple[Tensor, Tensor]:
    """One row of logits for each target.

    Args:
        outputs: logits, shape (..., classes), or what `main_output` finds them in; a model that
            answers at all positions of a sequence where fewer have targets is read at `positions`.
        targets: integers, shape (...).
        positions: index of the sequence (second dimension) that the targets are of.

    Returns:
        Shapes (n, classes) and (n,).

    Raises:
        ValueError: there are not as many rows as targets, or they lie in another order.
    """
    outputs = main_output(outputs)
    if not isinstance(outputs, Tensor) or outputs.ndim < 1:
        raise ValueError(
            f"the model gives {_shown(outputs)}, where a tensor with one row of logits for each "
            "target is wanted"
        )
    outputs = at_targets(outputs, targets, positions)
    leading = outputs.shape[:-1]
    if leading.numel() != targets.numel() or not _same_order(leading, targets.shape):
        raise ValueError(
            f"{leading.numel()} answers for {targets.numel()} targets (outputs "
            f"{tuple(outputs.shape)}, targets {tuple(targets.shape)}): the model must give one row "
            "of logits for each target, in the targets' shape"
        )
    return outputs.reshape(-1, outputs.shape[-1]), targets.reshape(-1)


def number_pairs(outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers that a model gives, beside those that they are to be.

    Args:
        outputs: numbers, shape (samples, ...), or what `main_output` finds them in.
        targets: in the same shape but for dimensions of 1.

    Returns:
        Both in the outputs' shape and dtype.

    Raises:
        ValueError: the shapes differ: numbers would be paired wrongly.
    """
    outputs = main_output(outputs)
    if not isinstance(outputs, Tensor):
        raise ValueError(  # noqa: TRY004  what a model gives is a value to whoever calls this
            f"the model gives {_shown(outputs)}, where a tensor of numbers is wanted"
        )
    alike = _without_ones(outputs.shape) == _without_ones(targets.shape)
    if not alike or (outputs.ndim and targets.ndim and len(outputs) != len(targets)):
        raise ValueError(
            f"outputs of shape {tuple(outputs.shape)} for targets of shape {tuple(targets.shape)}: "
            "they must be the same but for dimensions of 1"
        )
    return outputs, targets.to(outputs.dtype).reshape(outputs.shape)


def _same_order(rows: Any, targets: Any) -> bool:
    """Whether rows and targets, as many, lie alike: the same shape, or one of them already flat."""
    left, right = _without_ones(rows), _without_ones(targets)
    return len(left) <= 1 or len(right) <= 1 or left == right


def _without_ones(shape: Any) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _shown(outputs: Any) -> str:
    if isinstance(outputs, Mapping):
        return f"a mapping with the keys {sorted(map(str, outputs))}"
    if isinstance(outputs, Tensor):
        return f"a tensor of shape {tuple(outputs.shape)}"
    return f"a {type(outputs).__name__}"
