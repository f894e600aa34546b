"""Quantized weights that are kept from one forward pass to the next."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

SAMPLED: Final = 256
"""Numbers of a weight that are compared before what is kept of it is used."""


class Quantized(NamedTuple):
    """A weight on its grid: what is multiplied, the same as int8, and the scale."""

    applied: Tensor | None  # the weight's shape
    levels: Tensor | None  # int8, arranged as the scheme says
    scale: Tensor


class QuantizedWeightCache:
    """The quantized weight of a layer, kept in two ways.

    `entries` while somebody promises to say when the weight changes (`enabled`). `evaluated` in
    evaluation without gradients, where nobody trains: it is used as long as the parameters are the
    same memory with the same version, and SAMPLED numbers of the weight are what they were, since
    a write through `.data` or by a fused optimizer leaves no other trace. The next forward pass in
    training mode drops it.

    A copy of a layer begins with an empty one: nobody watches the copy's weight.
    """

    __slots__ = ("enabled", "entries", "evaluated")

    def __init__(self) -> None:
        self.enabled = False
        self.entries: dict[Any, Quantized] = {}
        self.evaluated: dict[Any, tuple[Evidence, Quantized]] = {}

    def __reduce__(self) -> tuple[type[QuantizedWeightCache], tuple[()]]:
        return QuantizedWeightCache, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedWeightCache:
        result = memo[id(self)] = QuantizedWeightCache()
        return result

    def clear(self) -> None:
        """Drop all that is kept."""
        self.entries.clear()
        self.evaluated.clear()


class Evidence(NamedTuple):
    """What a quantized weight was computed from, as far as it costs next to nothing to compare."""

    facts: tuple[Any, ...]
    sample: Tensor

    @classmethod
    def of(cls, parts: tuple[Tensor, ...], settings: tuple[Any, ...]) -> Evidence | None:
        """Of a weight (first) with what else it depends on; None where nothing can be compared.

        Args:
            parts: tensors; the first is the weight.
            settings: numbers.
        """
        weight = parts[0]
        if torch.compiler.is_compiling() or not weight.is_contiguous():
            return None
        if type(weight) not in (Tensor, torch.nn.Parameter) or any(
            part.is_inference()
            or part.is_meta
            or torch._C._functorch.is_functorch_wrapped_tensor(part)
            for part in parts
        ):
            return None  # without memory or a version of their own
        facts = tuple((part.data_ptr(), part._version, part.dtype, part.device) for part in parts)
        flat = weight.detach().view(-1)
        return cls((facts, settings), flat[:: max(1, flat.numel() // SAMPLED)])

    def copied(self) -> Evidence:
        """The same with a sample of its own."""
        return self._replace(sample=self.sample.clone())

    def agrees(self, other: Evidence) -> bool:
        """Whether nothing speaks for another weight."""
        return self.facts == other.facts and torch.equal(self.sample, other.sample)
