"""The random states from which an epoch is replayed."""

from __future__ import annotations

from typing import Any

from forge_kernel.random_state import read_random_state, write_random_state


class EpochRandom:
    """Makes an epoch that is resumed in its middle draw what it would have drawn.

    A loader's iterator draws from the streams when it is made, as it did when the epoch began. So
    on resume the streams are set to the epoch's first states until the first batch is there, and
    only then to those that the next step needs.
    """

    def __init__(self) -> None:
        self.first: dict[str, Any] | None = None  # None between epochs; checkpoints keep it
        self._next_step: dict[str, Any] | None = None

    def begin(self) -> None:
        """Before the iterator of an epoch, or of the rest of one, is made."""
        self._next_step = None
        if self.first is None:
            self.first = read_random_state()
        else:
            self._next_step = read_random_state()
            write_random_state(self.first)

    def settle(self) -> None:
        """After the first batch has been drawn, or none was left."""
        if self._next_step is not None:
            write_random_state(self._next_step)
            self._next_step = None

    def end(self) -> None:
        """The epoch is over."""
        self.first = None
