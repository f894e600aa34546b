from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from forge_plugins.mathematics.quantization.bit_layer import QuantizationState
from forge_plugins.mathematics.quantization.bit_linear import BitLinear
from forge_plugins.mathematics.quantization.conversion import convert_linears
from forge_plugins.mathematics.quantization.scheme import Scheme
from forge_plugins.mathematics.quantization.ternary_layers import read_layer, read_layers


def layer_of(**scheme: Any) -> BitLinear:
    layer, _ = convert_linears(nn.Linear(8, 4), lambda name: True, Scheme(**scheme))
    assert isinstance(layer, BitLinear)
    return layer


@pytest.mark.parametrize("bits", [1, 1.58])
def test_levels_over_scale_is_what_the_layer_applies(bits: float) -> None:
    layer = layer_of(weight_bits=bits).eval()
    found = read_layer(layer)
    assert torch.equal(found.applied, layer.applied_weight())
    assert set(found.levels.unique().tolist()) <= {-1, 0, 1}


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ({"weight_bits": 4}, "4 bits"),
        ({"weight_bits": 1.58, "granularity": "row"}, "each row"),
        ({"activation_bits": 4}, "4 bits per token"),
        ({"activation_granularity": "tensor"}, "8 bits per tensor"),
    ],
)
def test_what_no_format_holds_is_refused_by_name(scheme: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_layer(layer_of(**scheme))


def test_weights_that_are_not_ternary_yet_are_refused() -> None:
    layer = layer_of()
    layer.quantization = QuantizationState(warmup_lambda=0.4)
    with pytest.raises(ValueError, match="40% of the levels"):
        read_layer(layer)


def test_a_norm_in_front_is_refused_with_the_mend() -> None:
    layer = layer_of()
    layer.sub_norm = nn.RMSNorm(8)
    with pytest.raises(ValueError, match="llama_decoder"):
        read_layer(layer)


def test_a_model_without_a_ternary_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="never trained"):
        read_layers(nn.Linear(4, 4))
