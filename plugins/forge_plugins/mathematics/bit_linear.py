"""A linear layer that applies ternary weights to int8 activations."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from forge_plugins.mathematics.bitnet import (
    quantize_activation,
    quantize_weight,
    straight_through,
)


class BitLinear(nn.Linear):
    """`y = Q(x) Q(W)^T + b` with a latent full-precision weight as its plain parameter.

    The layer keeps nothing by itself. Who knows when weights change (the quantizer plugin) may
    set `keeps` to let it hold the quantized weight from one forward pass to the next, and must
    then call `forget` whenever the weight has changed: torch's fused optimizers do not raise the
    version counter that a guess could go by.

    Args:
        activation_bits: 8 quantizes activations per token, 16 leaves them as they are.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        activation_bits: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        if activation_bits not in (8, 16):
            raise ValueError(f"activation_bits is 8 or 16, not {activation_bits}")
        self.activation_bits = activation_bits
        self.keeps = False
        self._kept: Tensor | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, activation_bits: int = 8) -> BitLinear:
        """The same layer with the very same parameters, so that ties and dtypes stay."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.activation_bits = activation_bits
        layer.keeps = False
        layer._kept = None
        layer.train(linear.training)
        return layer

    def applied_weight(self) -> Tensor:
        """The weight that the forward pass multiplies with: shape (out, in), no gradient."""
        if self._kept is not None:
            return self._kept
        with torch.no_grad():
            quantized = quantize_weight(self.weight)
        if self.keeps:
            self._kept = quantized
        return quantized

    def forget(self) -> None:
        """Drop the quantized weight: the latent one has changed."""
        self._kept = None

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to shape (..., in_features)."""
        weight = straight_through(self.weight, self.applied_weight())
        if self.activation_bits == 8:
            with torch.no_grad():
                quantized = quantize_activation(input)
            input = straight_through(input, quantized)
        return functional.linear(input, weight, self.bias)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{super().extra_repr()}, ternary, activation_bits={self.activation_bits}"
