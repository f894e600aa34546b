"""A model's answers and the targets that they are for, one beside the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from forge_plugins.mathematics.deferred_logits import DeferredLogits


def answer_pieces(
    outputs: Any, targets: Tensor, positions: Any = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of logits with their targets, all at once or, where they are deferred, in pieces.

    Args and Raises: as `answer_rows`; `outputs` may be `DeferredLogits` too.
    """
    if not isinstance(outputs, DeferredLogits):
        yield answer_rows(outputs, targets, positions)
        return
    wanted, begin = targets.reshape(-1), 0
    for rows in outputs.pieces():
        yield rows, wanted[begin : begin + len(rows)]
        begin += len(rows)
    if begin != len(wanted):
        raise ValueError(f"{begin} answers for {len(wanted)} targets")


def answer_rows(outputs: Any, targets: Tensor, positions: Any = None) -> tuple[Tensor, Tensor]:
    """One row of logits for each target.

    Args:
        outputs: logits, shape (..., classes); a model that answers at all positions of a sequence
            where fewer have targets is read at `positions`.
        targets: integers, shape (...).
        positions: index of the sequence (second dimension) that the targets are of.

    Returns:
        Shapes (n, classes) and (n,).

    Raises:
        ValueError: there are not as many rows as targets.
    """
    everywhere = outputs.ndim == 3 and targets.ndim > 1 and outputs.shape[1] != targets.shape[1]
    if everywhere and positions is not None:
        outputs = outputs[:, positions]
    rows, wanted = outputs.reshape(-1, outputs.shape[-1]), targets.reshape(-1)
    if len(rows) != len(wanted):
        raise ValueError(
            f"{len(rows)} answers for {len(wanted)} targets (outputs {tuple(outputs.shape)}, "
            f"targets {tuple(targets.shape)}): the model must give one row of logits for each"
        )
    return rows, wanted
