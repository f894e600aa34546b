"""Training and validation batches: the protocol, and live loaders brought into it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final, Protocol

from forge_kernel.contract.values import Batch


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """What a model must know of the data; None where it does not apply or is not known."""

    vocabulary: int | None = None  # tokens are 0 .. vocabulary - 1
    sequence: int | None = None  # tokens in one sample
    features: int | None = None  # numbers in one sample
    classes: int | None = None  # targets are 0 .. classes - 1, or so many numbers each
    samples: int | None = None  # training samples in an epoch
    shape: tuple[int, ...] | None = None  # of a sample of several axes: channels, height, width
    labels: tuple[str, ...] | None = None  # names of the classes by number


class Data(Protocol):
    """Where batches come from. Order is a function of (seed, epoch, place).

    A place counts samples in the epoch's order, so that another batch size or another number of
    processes goes on where this one stood. One that draws or counts otherwise has `state_dict` and
    `load_state_dict`, which checkpoints keep. One that knows whether it has validation batches says
    so by `has_validation`. One that holds its samples by number has `take(epoch, places)`, the
    batch of the samples at a range of places.
    """

    spec: DataSpec
    batches_per_epoch: int | None

    def batches(self, epoch: int, place: int) -> Iterator[Batch]:
        """The training batches of an epoch from a place on: its first sample is the one there."""
        ...

    def validation(self) -> Iterable[Batch]:
        """The validation batches, in one fixed order; empty if there are none."""
        ...


def place_after(data: Data, epoch: int, batches: int) -> int:
    """The place in an epoch after so many batches, which older checkpoints counted.

    Args:
        data: as it was then; one that only its own replay can tell has a method of this name.
        epoch: in progress.
        batches: consumed.
    """
    own = getattr(data, "place_after", None)
    if own is not None:
        return int(own(epoch, batches))
    return sum(batch.samples for batch in islice(data.batches(epoch, 0), batches))


INPUTS: Final = ("input", "inputs", "x", "features", "data")
TARGETS: Final = ("target", "targets", "y", "label", "labels")
WEIGHTS: Final = ("weight", "weights", "sample_weight", "sample_weights")
