"""Logits that are computed a piece at a time, where they are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


class DeferredLogits:
    """What stands before a model's head, and the head.

    A language model's logits are `tokens x vocabulary` numbers, often more than all else together.

    Args:
        hidden: shape (..., width).
        head: gives (n, vocabulary) of (n, width).
        piece: rows of logits that are there at a time.
    """

    def __init__(self, hidden: Tensor, head: nn.Module, piece: int) -> None:
        assert piece >= 1, "a piece has rows"
        self.hidden = hidden
        self.head = head
        self.piece = piece

    def at(self, positions: slice | Tensor) -> DeferredLogits:
        """Those of some positions of the sequence (dimension 1)."""
        return DeferredLogits(self.hidden[:, positions], self.head, self.piece)

    def pieces(self) -> Iterator[Tensor]:
        """Logits, shape (at most `piece`, vocabulary), in the order of the rows."""
        for rows in self.hidden.flatten(0, -2).split(self.piece):
            yield self.head(rows)


_PASSING = nn.Identity()


@contextmanager
def without_head(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The model with its head left out, for a forward pass; gives the head.

    Args:
        model: whose last layer is the head.
        name: of the head among its modules.

    Raises:
        KeyError: there is no such module.
    """
    parent_name, _, own = name.rpartition(".")
    try:
        parent, head = model.get_submodule(parent_name), model.get_submodule(name)
    except AttributeError as error:
        raise KeyError(name) from error
    setattr(parent, own, _PASSING)
    try:
        yield head
    finally:
        setattr(parent, own, head)
