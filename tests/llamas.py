"""Small ternary Llamas for the tests of exporters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from forge_plugins.mathematics.networks.llama import Llama, LlamaShape
from forge_plugins.mathematics.quantization.conversion import convert_linears
from forge_plugins.mathematics.quantization.scheme import Scheme

VOCABULARY = 257


def ternary_llama(*, bits: float = 1.58, **shape: Any) -> Llama:
    """Random, with biases and norms that do something."""
    torch.manual_seed(0)
    sizes = {"width": 256, "layers": 2, "heads": 4, "groups": 2, "hidden": 512, **shape}
    model = Llama(LlamaShape(vocabulary=VOCABULARY, context=64, **sizes)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
        elif "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    convert_linears(model, lambda name: name != "head", Scheme(weight_bits=bits))
    return model


def prompts(rows: int, length: int) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(3))


def distances(found: Tensor, reference: Tensor) -> Tensor:
    """Relative L2 of each row of prompts."""
    difference = (found.double() - reference.double()).flatten(1).norm(dim=1)
    return difference / reference.double().flatten(1).norm(dim=1)
