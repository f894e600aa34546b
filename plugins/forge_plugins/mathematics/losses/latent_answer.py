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
    layers = [item for item in modules if isinstance(item, BitLayer)]
    before = [(quantization, quantization.warmup_lambda) for quantization in {id(c): c for c in
              (item.quantization for item in layers)}.values()]  # fmt: skip
    modes = [(item, item.training) for item in modules if not isinstance(item, BitLayer)]
    try:
        for quantization, _ in before:
            quantization.warmup_lambda = 0.0
        for module, _ in modes:
            module.training = False
        return call()
    finally:
        for quantization, kept in before:
            quantization.warmup_lambda = kept
        for module, mode in modes:
            module.training = mode
