"""The random numbers of the Grokfast paper's experiment, in the order of its published code.

Lee et al. 2024, arXiv 2405.20233, section 3.1. There one stream of torch's gives the network's
first weights, then the split of the table into halves, then, before each epoch, a shuffle of what
the epoch before has left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from forge_plugins.mathematics.networks.modular_arithmetic import operation_table
from forge_plugins.mathematics.networks.transformer import Decoder

MODULUS = 97
EQUALS, OPERATOR = MODULUS, MODULUS + 1
TOKENS = MODULUS + 2
LENGTH = 5  # the network has a place for the answer too, though nothing is ever read there


def table() -> tuple[Tensor, Tensor]:
    """`x * y (mod 97)`, y from 1.

    Returns:
        Tokens `[x, operator, y, equals]` of shape (9312, 4) and answers of shape (9312,), int64.
    """
    tokens, answers = operation_table("mul", MODULUS)
    tokens[:, 1], tokens[:, 3] = OPERATOR, EQUALS
    return tokens, answers


def network() -> Decoder:
    """The paper's network, its weights drawn from torch's stream."""
    return Decoder(
        vocabulary=TOKENS,
        classes=TOKENS,
        length=LENGTH,
        width=128,
        layers=2,
        heads=4,
        residual="normed",
        xavier=True,
    )


class Draws:
    """Split and shuffles of a seed.

    Attributes:
        training: rows of the table that are trained on, shape (4656,).
        validation: the others.
    """

    def __init__(self, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            _ = torch.manual_seed(seed)
            _ = network()  # the stream goes on from behind the first weights
            state = torch.get_rng_state()
        self._generator = torch.Generator()
        _ = self._generator.set_state(state)
        pairs = MODULUS * (MODULUS - 1)
        order = torch.randperm(pairs, generator=self._generator)
        self.training, self.validation = order[: pairs // 2], order[pairs // 2 :]
        self._begin = self._generator.get_state()
        self._order, self._known = torch.arange(pairs // 2), 0  # after so many shuffles

    def order(self, epoch: int) -> Tensor:
        """Places in `training` in the order of an epoch (from 0), shape (4656,)."""
        if epoch + 1 < self._known:
            _ = self._generator.set_state(self._begin)
            self._order, self._known = torch.arange(len(self.training)), 0
        for _ in range(epoch + 1 - self._known):
            shuffle = torch.randperm(len(self.training), generator=self._generator)
            self._order = self._order[shuffle]
        self._known = max(self._known, epoch + 1)
        return self._order
