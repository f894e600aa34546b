"""Logits that are computed a piece at a time, where they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


class DeferredLogits:
    """What stands before a model's head, and the head.

    A language model's logits are `tokens x vocabulary` numbers, often more than all else together.
    Whoever knows of this class reads `pieces`; for all others (`outputs.argmax(-1)`, a function of
    torch) it is the tensor of all logits, computed then.

    Args:
        hidden: shape (..., width).
        head: gives (n, vocabulary) of (n, width).
        piece: rows of logits that are there at a time.
    """

    def __init__(self, hidden: Tensor, head: nn.Module, piece: int) -> None:
        assert piece >= 1, "a piece has rows"
        self.hidden = hidden
        self.head = head
        self.piece = piece

    def at(self, positions: slice | Tensor) -> DeferredLogits:
        """Those of some positions of the sequence, dimension 1 of (samples, positions, width)."""
        return DeferredLogits(self.hidden[:, positions], self.head, self.piece)

    def whole(self) -> Tensor:
        """All logits, shape (..., vocabulary)."""
        return self.head(self.hidden)  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.whole(), name)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Any,
        given: tuple[Any, ...] = (),
        named: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        plain = [each.whole() if isinstance(each, cls) else each for each in given]
        named = {
            name: each.whole() if isinstance(each, cls) else each
            for name, each in (named or {}).items()
        }
        return function(*plain, **named)

    def pieces(self) -> Iterator[Tensor]:
        """Logits, shape (at most `piece`, vocabulary), in the order of the rows."""
        for rows in torch.split(self.hidden.flatten(0, -2), self.piece):
            yield self.head(rows)


class _Passing(nn.Identity):
    """Stands in a head's place and gives what it is given; models ask a head's weight for its type.

    Args:
        head: whose place it takes; it holds the weight without having it for a parameter.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.__dict__["weight"] = getattr(head, "weight", None)


_PASSING: WeakKeyDictionary[nn.Module, _Passing] = WeakKeyDictionary()
"""One for each head: a compiler would trace a new one anew."""


@contextmanager
def without_head(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The model with its head left out, for a forward pass; gives the head.

    Args:
        model: whose last layer is the head.
        name: of the head among its modules.

    Raises:
        KeyError: there is no such module.
    """
    parent_name, _, own = name.rpartition(".")
    try:
        parent, head = model.get_submodule(parent_name), model.get_submodule(name)
    except AttributeError as error:
        raise KeyError(name) from error
    if head not in _PASSING:
        _PASSING[head] = _Passing(head)
    setattr(parent, own, _PASSING[head])
    try:
        yield head
    finally:
        setattr(parent, own, head)


def head_name(model: nn.Module) -> str:
    """The name of the layer that a model's `get_output_embeddings()` gives; empty: it says none."""
    give = getattr(model, "get_output_embeddings", None)
    try:
        head = give() if callable(give) else None
    except (AttributeError, NotImplementedError, TypeError):
        return ""  # the transformers library has models that raise for "none"
    return next((name for name, module in model.named_modules() if module is head), "")


_LARGE: Final = 1000.0
"""As large as no logit is: what caps them shows."""


def changes_after_head(model: nn.Module, head: nn.Module, answer: Callable[[], Tensor]) -> bool:
    """Whether a model does more to what its head gives than to scale it.

    Large numbers are given in the head's place. A factor is the same before a head without bias.

    Args:
        model: looked at in evaluation mode, so that nothing is drawn.
        head: its last layer.
        answer: what the model gives for a few samples.
    """
    probes: list[Tensor] = []

    def probe(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        del module, inputs
        numbers = torch.linspace(-_LARGE, _LARGE, output.numel(), device=output.device)
        probes.append(numbers.view(output.shape).to(output.dtype))
        return probes[-1]

    modes = {module: module.training for module in model.modules()}
    handle = head.register_forward_hook(probe)
    model.eval()
    try:
        with torch.no_grad():
            given = answer().double()
    finally:
        handle.remove()
        for module, training in modes.items():
            module.training = training
    if len(probes) != 1 or probes[0].shape != given.shape:
        return True
    meant = probes[0].double()
    factor = (given * meant).sum() / (meant * meant).sum()
    if getattr(head, "bias", None) is not None and abs(float(factor) - 1.0) > _NEAR:
        return True
    return bool((given - factor * meant).norm() > _NEAR * given.norm())


_NEAR: Final = 1e-2
"""What half precision rounds."""
