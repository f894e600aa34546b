"""Quantized layers of the transformers library where nobody trains: their weight unpacked once."""

from __future__ import annotations

from typing import Final

from torch import Tensor, nn
from torch.nn import functional

from forge_plugins.mathematics.quantization import quantizers
from forge_plugins.mathematics.quantization.conversion import (
    convert_model_to_bitnet,
    packed_form,
    quantizes_online,
    unpacked_linear,
)
from forge_plugins.mathematics.quantization.scheme import Scheme

_SCHEME: Final = Scheme()  # that of the library's layers


class FixedLinear(nn.Module):
    """A layer with a weight on its levels, which cannot be trained.

    `Q(x) W^T + b`, as `BitLinear` computes it in evaluation, without a latent weight: finding one
    takes longer than many forward passes.

    Args:
        linear: its weight is what is applied; kept, not copied.
        norm: of the inputs, or None.
    """

    def __init__(self, linear: nn.Linear, norm: nn.Module | None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.norm = norm

    def forward(self, input: Tensor) -> Tensor:
        """Shape (..., in_features) to (..., out_features)."""
        input = input if self.norm is None else self.norm(input)
        values = quantizers.activation_values(input, _SCHEME, input.dtype)
        return functional.linear(values, self.weight, self.bias)


def fix_quantized(model: nn.Module) -> nn.Module:
    """Exchange the layers that the transformers library has quantized for ones that evaluate fast.

    There a packed weight is unpacked, and an online one quantized, for each call.

    Args:
        model: changed in place.

    Returns:
        The model, for evaluation alone.
    """
    linears = dict(model.named_modules())
    online = {name for name, item in linears.items() if quantizes_online(item)}
    for name, item in linears.items():
        form = packed_form(item)
        if form and name:
            norm = getattr(item, "rms_norm", None)
            fixed = FixedLinear(unpacked_linear(item, inverted=form == "inverted"), norm)
            model.set_submodule(name, fixed)
    if online:
        others = [name for name in linears if name not in online]
        model = convert_model_to_bitnet(model, skip=others)[0]
    return model
