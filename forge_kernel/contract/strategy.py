"""How a run spreads over processes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn


class Trained(Protocol):
    """What a strategy sees of a run: its model, and the modules beside it by name."""

    model: nn.Module
    modules: dict[str, nn.Module]


class Strategy(Protocol):
    """What the loop asks of a way to distribute a run. Every decision is one for all ranks."""

    rank: int
    world_size: int

    def start(self) -> None:
        """Join the other processes."""
        ...

    def transform_model(self, run: Trained, model: nn.Module) -> nn.Module:
        """Wrap or shard the model."""
        ...

    def backward_scope(self, *, last: bool) -> AbstractContextManager[None]:
        """Surrounds a micro-batch; gradients need be in step only after the window's last."""
        ...

    def reduce(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks."""
        ...

    def decide(self, code: int) -> int:
        """The largest code of any rank, so that all ranks take the same way."""
        ...

    def model_state(self, run: Trained) -> dict[str, Tensor]:
        """Parameters and buffers by name, whole."""
        ...

    def load_model_state(self, run: Trained, state: Mapping[str, Tensor]) -> None:
        """Write parameters and buffers in place.

        Raises:
            KeyError, ValueError: names or shapes differ.
        """
        ...

    def finish(self) -> None:
        """Leave the other processes."""
        ...
