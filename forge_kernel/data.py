"""Training and validation batches: the protocol, and live loaders brought into it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from forge_kernel.errors import RunError
from forge_kernel.state import Batch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """What a model must know of the data; None where it does not apply or is not known."""

    vocabulary: int | None = None  # tokens are 0 .. vocabulary - 1
    sequence: int | None = None  # tokens in one sample
    features: int | None = None  # numbers in one sample
    classes: int | None = None  # targets are 0 .. classes - 1, or so many numbers each
    samples: int | None = None  # training samples in an epoch


class Data(Protocol):
    """Where batches come from. Order is a function of (seed, epoch, position)."""

    spec: DataSpec
    batches_per_epoch: int | None

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """The training batches of an epoch from position `start` on (counted in batches)."""
        ...

    def validation(self) -> Iterable[Batch]:
        """The validation batches, in one fixed order; empty if there are none."""
        ...


def stream_seed(seed: int, *keys: str | int) -> int:
    """A seed of its own for each random stream of a run, so that no two streams share numbers.

    Args:
        seed: of the run.
        keys: what the stream is for (`"order", epoch`).
    """
    text = "/".join(str(part) for part in (seed, *keys))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def batch_from(value: Any) -> Batch:
    """Bring what a loader yields into a `Batch`.

    Args:
        value: a `Batch`, a pair `(inputs, targets)`, a mapping with `input` / `inputs` and
            `target` / `targets`, or inputs alone.
    """
    if isinstance(value, Batch):
        return value
    if isinstance(value, Mapping):
        known = {str(key).rstrip("s"): value[key] for key in value}
        if "input" not in known:
            raise RunError(f"a batch needs the key 'input'; it has {sorted(map(str, value))}")
        return Batch(known["input"], known.get("target"), known.get("weight"))
    if isinstance(value, list | tuple):
        if not 1 <= len(value) <= 3:
            raise RunError(f"a batch is (inputs, targets[, weights]), not {len(value)} parts")
        return Batch(*value)
    return Batch(value)


class LiveData:
    """Any iterable of batches (a DataLoader, a list) as `Data`.

    Its order is its own, so a resume replays: the kernel restores the random states that the
    epoch began with and the batches before the position are drawn and dropped.
    """

    def __init__(
        self, training: Iterable[Any], validation: Iterable[Any] = (), spec: DataSpec | None = None
    ) -> None:
        self.spec = spec or DataSpec()
        self._training = training
        self._validation = validation
        try:
            self.batches_per_epoch: int | None = len(training)  # type: ignore[arg-type]
        except TypeError:
            self.batches_per_epoch = None

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """Iterate once over the training iterable, without its first `start` batches."""
        sampler = getattr(self._training, "sampler", None)
        if sampler is not None and hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        for position, value in enumerate(self._training):
            if position >= start:
                yield batch_from(value)

    def validation(self) -> Iterator[Batch]:
        """Iterate over the validation iterable."""
        for value in self._validation:
            yield batch_from(value)


class TensorData:
    """Samples in memory, shuffled by a permutation that is a function of (seed, epoch).

    Args:
        inputs: training inputs, shape (n, ...).
        targets: training targets, shape (n, ...).
        batch_size: samples in a batch; the last one of an epoch may be smaller.
        seed: start of the order; None keeps the samples' own order.
        held_out: validation inputs and targets.
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
        held_out: tuple[Tensor, Tensor] | None = None,
        validation_batch_size: int | None = None,
        positions: Any = None,
    ) -> None:
        if len(inputs) != len(targets) or not len(inputs):
            raise RunError(f"{len(inputs)} inputs and {len(targets)} targets make no data set")
        self.spec = dataclasses.replace(spec or DataSpec(), samples=len(inputs))
        self._inputs, self._targets = inputs, targets
        self._batch_size = batch_size
        self._seed = seed
        self._held_out = held_out
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

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """The epoch's batches from `start` on; nothing before it is computed."""
        order = self.order(epoch)
        for begin in range(start * self._batch_size, len(self._inputs), self._batch_size):
            chosen = slice(begin, begin + self._batch_size)
            index = chosen if order is None else order[chosen]
            yield Batch(self._inputs[index], self._targets[index], None, self._positions)

    def validation(self) -> Iterator[Batch]:
        """The held-out samples in their own order."""
        if self._held_out is None:
            return
        inputs, targets = self._held_out
        for begin in range(0, len(inputs), self._validation_batch_size):
            chosen = slice(begin, begin + self._validation_batch_size)
            yield Batch(inputs[chosen], targets[chosen], None, self._positions)
