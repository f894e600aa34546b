"""How a model is called with the inputs of a batch: as one argument, or with each by its name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from forge_kernel.errors import RunError

if TYPE_CHECKING:
    from torch import nn

    from forge_kernel.contract.values import Batch

_BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class ModelCall:
    """Calls a model as its `forward` wants to be called.

    A tensor is its one argument. A mapping is spread by name where `forward` has arguments of these
    names, a tuple or list by place where it needs several; else either is the one argument.

    Args:
        model: whose `forward` is looked at, once.
    """

    def __init__(self, model: nn.Module) -> None:
        import torch

        self._tensor = torch.Tensor
        self._name = type(model).__name__
        try:
            result = list(inspect.signature(_innermost(model).forward).parameters.values())
        except (TypeError, ValueError):
            result = []
        self._names = {
            item.name for item in result if item.kind in (*_BY_PLACE[1:], item.KEYWORD_ONLY)
        }
        self._any_name = any(item.kind is item.VAR_KEYWORD for item in result)
        places = [item for item in result if item.kind in _BY_PLACE]
        self._needed = sum(item.default is item.empty for item in places)
        self._places = len(places)
        self.takes_positions = "positions" in self._names

    def __call__(self, model: nn.Module, batch: Batch) -> Any:
        """What the model gives.

        Raises:
            RunError: inputs by name that `forward` does not know.
        """
        inputs = batch.inputs
        options: dict[str, Any] = {}
        if batch.positions is not None and self.takes_positions:
            options["positions"] = batch.positions
        if isinstance(inputs, self._tensor):
            return model(inputs, **options)
        if isinstance(inputs, Mapping) and self._spreads(inputs):
            return model(**inputs, **options)
        if isinstance(inputs, list | tuple) and self._needed > 1:
            if not self._needed <= len(inputs) <= self._places:
                raise RunError(
                    f"the batch has {len(inputs)} inputs, and {self._name}.forward takes "
                    f"{self._needed} arguments"
                )
            return model(*inputs, **options)
        return model(inputs, **options)

    def _spreads(self, inputs: Mapping[Any, Any]) -> bool:
        known = {name for name in inputs if name in self._names}
        if len(known) == len(inputs) or (self._any_name and self._needed != 1):
            return True
        if known or self._needed > 1:
            raise RunError(
                f"the batch has inputs named {sorted(map(str, inputs))}, and {self._name}.forward "
                f"takes {sorted(self._names)}"
            )
        return False


def call_model(model: nn.Module, batch: Batch) -> Any:
    """What a model gives for a batch, called as its `forward` wants to be called.

    Raises:
        RunError: see `ModelCall`.
    """
    import torch

    if isinstance(batch.inputs, torch.Tensor) and batch.positions is None:
        return model(batch.inputs)
    return ModelCall(model)(model, batch)


def _innermost(model: nn.Module) -> nn.Module:
    """The module whose `forward` the caller wrote, behind a compiler's or a replica's."""
    from torch import nn

    for _ in range(8):
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(
            model, nn.DataParallel | nn.parallel.DistributedDataParallel
        ):
            inner = model.module
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model
