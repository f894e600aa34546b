"""Sequences over one row of tokens, dealt out in batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from forge_kernel.api import Batch, DataSpec, stream_seed
from forge_plugins.data.permutations import permuted
from forge_plugins.formats.columns.gather import Column, overlapping
from forge_plugins.mathematics.text.chunks import sequence_count

if TYPE_CHECKING:
    from forge_plugins.data.text_config import TextConfig
    from forge_plugins.mathematics.text.tokenizers import Tokenizer

FEW: Final = 2**20
"""Sequences up to which an epoch's order is drawn and held; of more, any place is computed."""


class Sequences:
    """Sequences of one length that begin anywhere in a row of tokens.

    Args:
        tokens: shape (n,), integers; mapped or in memory.
        length: tokens in a sequence.
        begins: the token with which a text begins that sees no other; None: each sequence is one.
    """

    def __init__(self, tokens: Column, length: int, begins: int | None = None) -> None:
        self._begins = begins
        plain = np.asarray(tokens)
        self._kind, self._length = plain.dtype, length
        item = plain.dtype.itemsize
        raw = plain.view(np.uint8) if plain.flags.c_contiguous else plain.copy().view(np.uint8)
        self._elements = overlapping(raw, (length + 1) * item, item)

    def rows(self, starts: Column) -> Column:
        """Inputs and, one place on, targets: shape (sequences, length + 1), as they are in the row.

        Args:
            starts: of the sequences, shape (sequences,).
        """
        result = self._elements[starts].view(self._kind)
        return result.reshape(len(starts), self._length + 1)

    def batch(self, starts: Column) -> Batch:
        """Inputs and targets as int64, both (sequences, length): two views of one block.

        Of texts that do not see each other the inputs are named, with `position_ids` beside them.
        """
        block = torch.from_numpy(self.rows(starts).astype(np.int64))
        inputs, targets = block[:, :-1], block[:, 1:]
        if self._begins is None:
            return Batch(inputs, targets)
        places = torch.arange(self._length)
        latest = torch.where(inputs == self._begins, places, 0).cummax(1).values
        return Batch({"input_ids": inputs, "position_ids": places - latest}, targets)


class TokenSequences:
    """Sequences over one row of tokens; `tokenizer` tells what the tokens mean.

    Each epoch cuts the row at another offset and takes the sequences in another order, both
    functions of (seed, epoch), so that any place can be taken up without drawing the earlier
    ones. Of several processes each reads a stride of the global batch.

    Args:
        training: tokens, shape (n,).
        validation: tokens for validation, cut from offset 0 and in their own order.
        config: sizes.
        seed: of offsets and orders.
        tokenizer: of the tokens.
        rank: of this process.
        world: processes that train together.
    """

    def __init__(
        self,
        training: Column,
        validation: Column,
        config: TextConfig,
        seed: int,
        tokenizer: Tokenizer,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        assert 0 <= rank < world
        vocabulary = tokenizer.vocabulary
        self.tokenizer = tokenizer
        begins = tokenizer.end if config.document_mask else None
        self._training = Sequences(training, config.sequence_length, begins)
        self._validation = Sequences(validation, config.sequence_length, begins)
        self._validation_sequences = sequence_count(len(validation), config.sequence_length)
        self._config, self._seed = config, seed
        self._rank, self._world = rank, world
        # whatever the offset is, an epoch has as many sequences
        self._sequences = (len(training) - config.sequence_length) // config.sequence_length
        self.spec = DataSpec(
            vocabulary=vocabulary,
            sequence=config.sequence_length,
            classes=vocabulary,
            samples=self._sequences,
        )
        self.batches_per_epoch: int | None = -(-self._sequences // (config.batch_size * world))
        self._drawn: tuple[int, int, Any] | None = None

    def _order(self, epoch: int) -> tuple[int, Any]:
        """The epoch's offset, and its permutation; None for one that is computed."""
        if self._drawn is None or self._drawn[0] != epoch:
            # the name of the stream is part of what it draws: published runs keep theirs
            generator = torch.Generator().manual_seed(stream_seed(self._seed, "windows", epoch))
            offset = int(torch.randint(self._config.sequence_length, (1,), generator=generator))
            few = self._sequences <= FEW
            order = torch.randperm(self._sequences, generator=generator).numpy() if few else None
            self._drawn = epoch, offset, order
        return self._drawn[1:]

    def starts(self, epoch: int, begin: int, end: int) -> Any:
        """Where the sequences at some places of an epoch begin in the row of tokens."""
        offset, order = self._order(epoch)
        if order is not None:
            return offset + order[begin:end] * self._config.sequence_length
        places = np.arange(begin, min(end, self._sequences), dtype=np.int64)
        key = stream_seed(self._seed, "order", epoch)
        return offset + permuted(places, self._sequences, key) * self._config.sequence_length

    def take(self, epoch: int, places: range) -> Batch:
        """The sequences at some places of an epoch's order."""
        starts = self.starts(epoch, places.start, places.stop)
        return self._training.batch(starts[:: places.step])

    def batches(self, epoch: int, place: int) -> Iterator[Batch]:
        """The epoch's batches from a place on, counted in sequences over all processes."""
        size = self._config.batch_size * self._world
        for begin in range(place, self._sequences, size):
            starts = self.starts(epoch, begin, begin + size)
            mine = starts[self._rank :: self._world]
            batch = self._training.batch(mine if len(mine) else starts[:1])
            if not len(mine):  # all processes take each step
                batch.weights = torch.zeros(1)
            yield batch

    def validation(self) -> Iterator[Batch]:
        """The held-out text from its beginning; of several processes, each has its stride."""
        length, size = (
            self._config.sequence_length,
            self._config.validation_batch_size * self._world,
        )
        for begin in range(0, self._validation_sequences, size):
            end = min(begin + size, self._validation_sequences)
            places = np.arange(begin + self._rank, end, self._world, dtype=np.int64)
            if len(places):
                yield self._validation.batch(places * length)
