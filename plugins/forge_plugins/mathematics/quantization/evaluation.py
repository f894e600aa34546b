"""What a quantized linear layer gives where nobody trains: the one place for a faster kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch.nn import functional

from forge_plugins.mathematics.quantization.device_kernels import scaled_product

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from forge_plugins.mathematics.quantization.weight_cache import Quantized


class EvaluatedLayer(Protocol):
    """What is asked of a layer; see `BitLinear`."""

    out_features: int

    @property
    def weight(self) -> Tensor:
        """Shape (out_features, in_features)."""

    @property
    def bias(self) -> Tensor | None:
        """Shape (out_features,)."""

    def multiplies_integers(self, input: Tensor) -> bool:
        """Whether this input is multiplied in whole numbers."""

    def product_type(self, input: Tensor) -> torch.dtype:
        """The dtype of the product."""

    def quantized(self, dtype: torch.dtype, *, as_int8: bool, keep: bool) -> Quantized:
        """The weight on its grid."""

    def levels_of(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The input in whole numbers, int8 (rows, in_features), and their scale, (rows, 1)."""

    def values_of(self, input: Tensor, dtype: torch.dtype) -> Tensor:
        """The input on its grid: its shape, in the dtype of the product."""


def evaluated_linear(layer: EvaluatedLayer, input: Tensor) -> Tensor:
    """`Q(x) Q(W)^T + b`, bit for bit what the layer gives with gradients.

    The quantized weight is kept from call to call, as long as it is the same weight.

    Args:
        layer: in evaluation, its warm-up over, with a quantized weight.
        input: shape (..., in_features), after the layer's norm.

    Returns:
        Shape (..., out_features), in the layer's dtype, or in that of autocast.
    """
    dtype = layer.product_type(input)
    if layer.multiplies_integers(input):
        weight = layer.quantized(dtype, as_int8=True, keep=True)
        values, scale, _ = layer.levels_of(input)
        assert weight.levels is not None
        levels = weight.levels.view(layer.weight.shape)
        product = scaled_product(values, scale, levels, weight.scale, layer.bias, dtype)
        return product.view(*input.shape[:-1], layer.out_features)
    weight = layer.quantized(dtype, as_int8=False, keep=True)
    assert weight.applied is not None
    return functional.linear(layer.values_of(input, dtype), weight.applied, layer.bias)
