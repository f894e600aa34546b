"""Data in tensors: every sample in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from forge_kernel.contract.data import DataSpec
from forge_kernel.contract.seeds import stream_seed
from forge_kernel.contract.values import Batch
from forge_kernel.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor


class TensorData:
    """Samples in memory, shuffled by a permutation that is a function of (seed, epoch).

    Args:
        inputs: training inputs, shape (n, ...).
        targets: training targets, shape (n, ...).
        batch_size: samples in a batch; the last one of an epoch may be smaller.
        seed: start of the order; None keeps the samples' own order.
        validation: validation inputs and targets.
        positions: positions of the sequence that the loss reads (see `Batch`).

    Data that a tokenizer made may offer it as `tokenizer`.
    """

    tokenizer: Any  # set by whoever has one

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        *,
        batch_size: int,
        seed: int | None,
        spec: DataSpec | None = None,
        validation: tuple[Tensor, Tensor] | None = None,
        validation_batch_size: int | None = None,
        positions: Any = None,
    ) -> None:
        if len(inputs) != len(targets) or not len(inputs):
            raise RunError(f"{len(inputs)} inputs and {len(targets)} targets make no data set")
        self.spec = dataclasses.replace(spec or DataSpec(), samples=len(inputs))
        self._inputs, self._targets = inputs, targets
        self._batch_size = batch_size
        self._seed = seed
        self._validation = validation
        self._validation_batch_size = validation_batch_size or batch_size
        self._positions = positions
        self.batches_per_epoch: int | None = -(-len(inputs) // batch_size)

    def order(self, epoch: int) -> Tensor | None:
        """Indices of an epoch's samples, shape (n,); None: as they lie."""
        import torch

        if self._seed is None:
            return None
        generator = torch.Generator().manual_seed(stream_seed(self._seed, "order", epoch))
        return torch.randperm(len(self._inputs), generator=generator)

    def batches(self, epoch: int, place: int) -> Iterator[Batch]:
        """The epoch's batches from a place on; nothing before it is computed."""
        order = self.order(epoch)
        for begin in range(place, len(self._inputs), self._batch_size):
            yield self._at(order, slice(begin, begin + self._batch_size))

    def take(self, epoch: int, places: range) -> Batch:
        """The samples at some places of an epoch's order."""
        return self._at(self.order(epoch), slice(places.start, places.stop, places.step))

    def _at(self, order: Tensor | None, places: slice) -> Batch:
        index = places if order is None else order[places]
        return Batch(self._inputs[index], self._targets[index], None, self._positions)

    @property
    def has_validation(self) -> bool:
        """Whether samples were held out."""
        return self._validation is not None and len(self._validation[0]) > 0

    def validation(self) -> Iterator[Batch]:
        """The held-out samples in their own order."""
        if self._validation is None:
            return
        inputs, targets = self._validation
        for begin in range(0, len(inputs), self._validation_batch_size):
            chosen = slice(begin, begin + self._validation_batch_size)
            yield Batch(inputs[chosen], targets[chosen], None, self._positions)
