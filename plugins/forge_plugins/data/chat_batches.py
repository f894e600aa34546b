"""Conversations dealt out in batches: packed with each other, or padded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from forge_kernel.api import Batch, DataSpec, stream_seed
from forge_plugins.data.permutations import permuted
from forge_plugins.mathematics.text.packing import best_fit

if TYPE_CHECKING:
    from forge_plugins.data.chat_config import ChatConfig
    from forge_plugins.data.chat_rows import ChatRows
    from forge_plugins.mathematics.text.tokenizer_library import LibraryTokenizer

Numbers = NDArray[np.int64]


class Sequences:
    """Sequences of one or several conversations, in one fixed order.

    Args:
        rows: the conversations as tokens.
        chosen: numbers of those that are meant.
        config: sizes; whether they are packed.
        filler: the token in room that is left.
        ignore_index: the target of what is not learned.
    """

    def __init__(
        self, rows: ChatRows, chosen: Numbers, config: ChatConfig, filler: int, ignore_index: int
    ) -> None:
        self._rows, self._config = rows, config
        self._filler, self._ignore_index = filler, ignore_index
        self._lengths = np.minimum(rows.lengths(), config.sequence_length)
        self._begins = np.concatenate([[0], np.asarray(rows.ends)[:-1]])
        lengths = self._lengths[chosen]
        if config.packing:
            packs = best_fit(lengths, config.sequence_length)
            order = np.array([number for pack in packs for number in pack], np.int64)
            self._chosen = chosen[order]
            self._bounds = np.cumsum([0, *map(len, packs)])
        else:
            self._chosen, self._bounds = chosen, np.arange(len(chosen) + 1)
        self.count = len(self._bounds) - 1
        self.conversations = len(chosen)
        self.filled = int(lengths.sum()) / max(1, self.count * config.sequence_length)

    def batch(self, places: Numbers) -> Batch:
        """Some sequences.

        Inputs and targets are int64, (sequences, length). Packed, the inputs are named, and
        `position_ids` begins anew with each conversation: that is where attention ends.

        Args:
            places: of the sequences.
        """
        packs = [
            self._chosen[self._bounds[place] : self._bounds[place + 1]] for place in places.tolist()
        ]
        packing = self._config.packing
        length = self._config.sequence_length
        if not packing:
            length = max(int(self._lengths[pack].sum()) for pack in packs)
        inputs = np.full((len(packs), length), self._filler, np.int64)
        targets = np.full((len(packs), length), self._ignore_index, np.int64)
        positions = np.zeros((len(packs), length), np.int64)
        for row, pack in enumerate(packs):
            end = 0
            for number in pack.tolist():
                begin, size = int(self._begins[number]), int(self._lengths[number])
                place = slice(end, end + size)
                end += size
                tokens = np.asarray(self._rows.tokens[begin : begin + size + 1], np.int64)
                learned = np.asarray(self._rows.answers[begin + 1 : begin + size + 1]) != 0
                inputs[row, place] = tokens[:-1]
                targets[row, place] = np.where(learned, tokens[1:], self._ignore_index)
                positions[row, place] = np.arange(size)
            positions[row, end:] = np.arange(length - end)
        if not packing:
            return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))
        named = {"input_ids": torch.from_numpy(inputs), "position_ids": torch.from_numpy(positions)}
        return Batch(named, torch.from_numpy(targets))


class ChatSequences:
    """The batches of conversations; `tokenizer` tells what the tokens mean.

    Which conversations share a sequence is a function of their lengths; an epoch's order is one of
    (seed, epoch), of which any place is computed. Of several processes each reads a stride of the
    global batch.

    Args:
        training: sequences that are trained on.
        validation: sequences for validation, in their own order.
        config: sizes.
        seed: of the orders.
        tokenizer: of the tokens.
        rank: of this process.
        world: processes that train together.
    """

    def __init__(
        self,
        training: Sequences,
        validation: Sequences,
        config: ChatConfig,
        seed: int,
        tokenizer: LibraryTokenizer,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        assert 0 <= rank < world
        self.tokenizer = tokenizer
        self._training, self._validation = training, validation
        self._config, self._seed = config, seed
        self._rank, self._world = rank, world
        self.spec = DataSpec(
            vocabulary=tokenizer.vocabulary, sequence=config.sequence_length,
            classes=tokenizer.vocabulary, samples=training.count,
        )  # fmt: skip
        self.batches_per_epoch: int | None = -(-training.count // (config.batch_size * world))
        self.has_validation = validation.count > 0

    def _ordered(self, epoch: int, places: Numbers) -> Numbers:
        return permuted(places, self._training.count, stream_seed(self._seed, "order", epoch))

    def take(self, epoch: int, places: range) -> Batch:
        """The sequences at some places of an epoch's order."""
        return self._training.batch(self._ordered(epoch, np.array(places, np.int64)))

    def batches(self, epoch: int, place: int) -> Iterator[Batch]:
        """The epoch's batches from a place on, counted in sequences over all processes."""
        size, count = self._config.batch_size * self._world, self._training.count
        for begin in range(place, count, size):
            places = np.arange(begin, min(begin + size, count), dtype=np.int64)
            mine = places[self._rank :: self._world]
            batch = self._training.batch(self._ordered(epoch, mine if len(mine) else places[:1]))
            if not len(mine):  # all processes take each step
                batch.weights = torch.zeros(1)
            yield batch

    def validation(self) -> Iterator[Batch]:
        """The held-out sequences; of several processes, each has its stride."""
        size, count = self._config.validation_batch_size * self._world, self._validation.count
        for begin in range(0, count, size):
            end = min(begin + size, count)
            places = np.arange(begin + self._rank, end, self._world, dtype=np.int64)
            if len(places):
                yield self._validation.batch(places)
