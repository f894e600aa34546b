"""Training and validation batches: the protocol, and live loaders brought into it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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


class Data(Protocol):
    """Where batches come from. Order is a function of (seed, epoch, position).

    One that draws or counts otherwise has `state_dict` and `load_state_dict`, which checkpoints
    keep. One that knows whether it has validation batches says so by `has_validation`.
    """

    spec: DataSpec
    batches_per_epoch: int | None

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """The training batches of an epoch from position `start` on (counted in batches)."""
        ...

    def validation(self) -> Iterable[Batch]:
        """The validation batches, in one fixed order; empty if there are none."""
        ...


INPUTS: Final = ("input", "inputs", "x", "features", "data")
TARGETS: Final = ("target", "targets", "y", "label", "labels")
WEIGHTS: Final = ("weight", "weights", "sample_weight", "sample_weights")
