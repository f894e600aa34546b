"""One quantized input for the layers that read the same tensor (q, k and v; gate and up)."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class SharedInput:
    """Remembers what was last derived from an input, for as long as that input lives.

    Layers that share one of these ask it with the tensor that they were called with. The answer is
    reused only for the very same tensor object in the same version, so that layers that turn out
    to read different tensors merely compute for themselves. Nothing outlives the input: when it is
    freed, so is the answer (unless autograd still needs it). Values are the same with and without
    sharing; each layer has its own node in the graph, so gradients are too. Copies of a model
    begin empty.

    While torch.compile traces, and for inference tensors (which have no version), nothing is
    shared.
    """

    __slots__ = ("__weakref__", "_entry")

    def __init__(self) -> None:
        self._entry: tuple[weakref.ref[Tensor], int, object, Any] | None = None

    def take(self, inputs: Tensor, kind: object, derive: Callable[[], Any]) -> Any:
        """What is derived from `inputs`, perhaps from the last call.

        Args:
            inputs: a layer's input.
            kind: what else the answer depends on (its dtype).
            derive: computes it, without gradient.
        """
        if torch.compiler.is_compiling() or inputs.is_inference():
            return derive()
        entry = self._entry  # read once: another thread may replace it
        version = inputs._version
        if entry is not None and entry[0]() is inputs and entry[1] == version and entry[2] == kind:
            return entry[3]
        answer = derive()
        holder = weakref.ref(self)

        def clear(dead: weakref.ref[Tensor]) -> None:
            alive = holder()
            if alive is not None and alive._entry is not None and alive._entry[0] is dead:
                alive._entry = None

        self._entry = (weakref.ref(inputs, clear), version, kind, answer)
        return answer

    def __reduce__(self) -> tuple[type[SharedInput], tuple[()]]:
        return SharedInput, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedInput:
        result = memo[id(self)] = SharedInput()
        return result
