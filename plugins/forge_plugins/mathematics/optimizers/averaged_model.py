"""A second model of other weights that follows the one in training in all else."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from forge_plugins.mathematics.optimizers.plain_parameters import HALVES


class ShadowModel:
    """A copy without gradients; its weights are written by its owner.

    The owner writes into averages, which are fp32 where the model is of half precision (there a
    slow average would lose its increments); `follow` rounds them to the copy's weights.

    Args:
        model: the one in training. State of its layers that goes on with the training (names in a
            layer's `follows`) is shared, buffers are copied by `follow`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)
        self.model.requires_grad_(False)
        self._leader = model
        self._averages = {
            name: parameter.detach().float() if parameter.dtype in HALVES else parameter.detach()
            for name, parameter in self.model.named_parameters()
        }
        for own, other in zip(self.model.modules(), model.modules(), strict=True):
            for name in getattr(other, "follows", ()):
                setattr(own, name, getattr(other, name))

    def weights(self) -> list[Tensor]:
        """The averages, in the order of the model's parameters, to be written in place."""
        return list(self._averages.values())

    def named_weights(self) -> dict[str, Tensor]:
        """The same by name."""
        return dict(self._averages)

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Write all weights by name."""
        with torch.no_grad():
            for name, value in self._averages.items():
                value.copy_(weights[name])
        self.follow()

    def follow(self) -> None:
        """The averages were written: round them, take the buffers, drop what layers keep."""
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                if weight.dtype in HALVES:
                    weight.copy_(self._averages[name])
        for own, other in zip(self.model.buffers(), self._leader.buffers(), strict=True):
            own.copy_(other)
        for module in self.model.modules():
            forget = getattr(module, "invalidate", None)
            if callable(forget):
                forget()
