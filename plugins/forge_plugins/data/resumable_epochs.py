"""One epoch of a file's samples after the other, from a position that can be kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from forge_plugins.data.file_batches import FileData

STATE_FORMAT: Final = 2
"""Of `Epochs.state_dict`."""


class Epochs:
    """One epoch after the other, from a position that can be kept and taken up.

    The position counts the samples that were handed out, not those fetched ahead: it does not
    depend on workers, and on processes and batch sizes only by where a batch ends.

    Args:
        data: the samples.
    """

    def __init__(self, data: FileData) -> None:
        self._data = data
        self.epoch, self._place = 0, 0

    def __len__(self) -> int:
        assert self._data.batches_per_epoch is not None
        return self._data.batches_per_epoch

    def __iter__(self) -> Iterator[Any]:
        """The rest of the epoch; the next call gives the next one."""
        data, first = self._data, self._place
        size = data.global_batch
        left = data.batches_from_place(first)
        for number, batch in enumerate(data.batches(self.epoch, first)):
            if number == left - 1:
                self.epoch, self._place = self.epoch + 1, 0
            else:
                self._place = first + (number + 1) * size
            yield batch

    def begin(self) -> None:
        """Leave the rest of an epoch that was begun."""
        if self._place:
            self.epoch, self._place = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int | str]:
        """The position, at most 300 bytes of JSON."""
        return {
            "format": STATE_FORMAT,
            "seed": self._data.seed,
            "epoch": self.epoch,
            "place": self._place,
            "samples": self._data.sampler.training,
            "content": self._data.table.content[:16],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at a position.

        Raises:
            ValueError: it is of other data, of another seed or split; says what differs.
        """
        own = self.state_dict()
        for name in ("format", "seed", "samples", "content"):
            if state.get(name) != own[name]:
                raise ValueError(
                    f"the position is of other data: {name} is {state.get(name)}, here {own[name]}"
                )
        self.epoch, self._place = int(state["epoch"]), int(state["place"])
