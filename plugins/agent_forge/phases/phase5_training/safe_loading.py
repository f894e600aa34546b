"""What the default `torch.load` may build: this project's layers, and torch's own.

A Phase 4 file that holds a whole module names the classes of its layers. `torch.load` refuses every
class that it was not told of; these hold tensors and numbers and do nothing when they are built.
The class of the model itself is the program's to allow (`torch.serialization.add_safe_globals`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from forge_plugins.mathematics.networks import mlp, transformer
from forge_plugins.mathematics.quantization import bit_layer, scheme, weight_cache
from forge_plugins.mathematics.quantization.bit_conv2d import BitConv2d
from forge_plugins.mathematics.quantization.bit_linear import BitLinear
from forge_plugins.mathematics.quantization.shared_input import SharedInput


def safe_classes() -> list[Any]:
    """The classes, in a fixed order."""
    torchs = [
        value
        for _, value in sorted(vars(nn).items())
        if isinstance(value, type) and issubclass(value, nn.Module)
    ]
    own: list[Any] = [
        BitLinear,
        BitConv2d,
        bit_layer.QuantizationState,
        weight_cache.QuantizedWeightCache,
        scheme.Scheme,
        SharedInput,
        mlp.Mlp,
    ]
    inner = [
        value
        for _, value in sorted(vars(transformer).items())
        if isinstance(value, type) and value.__module__ == transformer.__name__
    ]
    return [*torchs, *own, *inner, set]


def allow_layers() -> None:
    """Tell `torch.load`; once is enough, twice does no harm."""
    torch.serialization.add_safe_globals(safe_classes())
