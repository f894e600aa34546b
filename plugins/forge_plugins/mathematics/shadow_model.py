"""A second model of other weights that follows the one in training in all else."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class ShadowModel:
    """A copy without gradients; its weights are written by its owner.

    Args:
        model: the one in training. State of its layers that goes on with the training (names in a
            layer's `follows`) is shared, buffers are copied by `follow`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)
        self.model.requires_grad_(False)
        self._leader = model
        for own, other in zip(self.model.modules(), model.modules(), strict=True):
            for name in getattr(other, "follows", ()):
                setattr(own, name, getattr(other, name))

    def weights(self) -> list[Tensor]:
        """Its own, in the order of the model's parameters, to be written in place."""
        return [parameter.detach() for parameter in self.model.parameters()]

    def named_weights(self) -> dict[str, Tensor]:
        """The same by name."""
        return {name: value.detach() for name, value in self.model.named_parameters()}

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Write all weights by name."""
        with torch.no_grad():
            for name, value in self.named_weights().items():
                value.copy_(weights[name])
        self.follow()

    def follow(self) -> None:
        """Its weights were written: take the buffers, drop what layers keep of old weights."""
        for own, other in zip(self.model.buffers(), self._leader.buffers(), strict=True):
            own.copy_(other)
        for module in self.model.modules():
            forget = getattr(module, "forget", None)
            if callable(forget):
                forget()
