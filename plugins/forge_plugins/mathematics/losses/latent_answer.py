"""What a network answers when its quantized layers apply their latent weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from forge_plugins.mathematics.quantization.bit_layer import BitLayer

Answer = TypeVar("Answer")


@torch.no_grad()
def latent_answer(model: nn.Module, call: Callable[[], Answer]) -> Answer:
    """A call of the model in full precision, as in evaluation, without gradient.

    Layers beside the quantized ones are in evaluation mode meanwhile, so that no running average
    moves and nothing is dropped out.

    Args:
        model: left as it was.
        call: runs it.
    """
    modules = list(model.modules())
    layers = [one for one in modules if isinstance(one, BitLayer)]
    blends = [(control, control.blend) for control in {id(c): c for c in
              (one.control for one in layers)}.values()]  # fmt: skip
    modes = [(one, one.training) for one in modules if not isinstance(one, BitLayer)]
    try:
        for control, _ in blends:
            control.blend = 0.0
        for module, _ in modes:
            module.training = False
        return call()
    finally:
        for control, blend in blends:
            control.blend = blend
        for module, mode in modes:
            module.training = mode
