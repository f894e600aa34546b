"""A linear layer that applies few-level weights to few-level activations."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from forge_plugins.mathematics.quantization import evaluation, quantizers
from forge_plugins.mathematics.quantization.bit_layer import BitLayer, QuantizationState
from forge_plugins.mathematics.quantization.device_kernels import lacks_kernels
from forge_plugins.mathematics.quantization.quantized_linear import (
    Backward,
    fake_quant_linear,
    fits_integer_product,
    int8_linear,
    lacks_int8,
    multiplies_integers,
)
from forge_plugins.mathematics.quantization.scheme import Scheme

BACKWARD: Final[dict[str, Backward]] = {
    "int8": "own",
    "int8_bf16_backward": "bf16",
    "int8_backward": "int8",
}
"""What an arithmetic multiplies in on the way back."""


def autocast_type(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast multiplies in on the device, or None when it is off."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


class BitLinear(BitLayer, nn.Linear):
    """`y = Q(x) Q(W)^T + b`; the bias is added in full precision, after scaling.

    Args:
        scheme: what Q means; ternary weights per tensor and int8 activations per token otherwise.
        quantization: warm-up and sparsity, shared with other layers.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        scheme: Scheme | None = None,
        quantization: QuantizationState | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device=device, dtype=dtype)
        self.configure(scheme or Scheme(), quantization)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        scheme: Scheme | None = None,
        quantization: QuantizationState | None = None,
    ) -> BitLinear:
        """The same layer with the very same parameters, so that ties and dtypes stay.

        Raises:
            ValueError: the scheme's groups do not divide the rows.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.configure(scheme or Scheme(), quantization)
        layer.train(linear.training)
        return layer

    def configure(self, scheme: Scheme, quantization: QuantizationState | None = None) -> None:
        """See `BitLayer.configure`."""
        super().configure(scheme, quantization)
        if scheme.arithmetic != "exact":  # the compiler cannot ask by itself
            for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
                lacks_int8(kind)
                lacks_kernels(kind)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to shape (..., in_features)."""
        if self.sub_norm is not None:
            input = self.sub_norm(input)
        if self.warmup_lambda < 1.0 or not self.scheme.quantizes_weight:
            # the plain form: what is blended is on no grid
            return functional.linear(
                self.estimated_input(input), self.estimated_weight(), self.bias
            )
        if not (self.training or torch.is_grad_enabled()):
            return evaluation.evaluated_linear(self, input)
        return self._integer(input) if self.multiplies_integers(input) else self._exact(input)

    def multiplies_integers(self, input: Tensor) -> bool:
        """Whether this input is multiplied in whole numbers."""
        if self.scheme.arithmetic == "exact":
            return False
        rows = input.numel() // self.in_features
        return multiplies_integers(input.device.type) and fits_integer_product(rows, self.weight)

    def product_type(self, input: Tensor) -> torch.dtype:
        """The dtype of the product: autocast's, or the weight's."""
        return autocast_type(input.device) or self.weight.dtype

    def _exact(self, input: Tensor) -> Tensor:
        dtype = self.product_type(input)
        # in half precision the weight itself is as cheap to save as its levels are to turn back
        needed = torch.is_grad_enabled() and input.requires_grad and dtype is torch.float32
        with torch.no_grad():
            weight = self.quantized(dtype, as_int8=False, fresh=needed)
            values = self.values_of(input, dtype)
        assert weight.applied is not None
        handle = self._handle(weight.scale)
        levels = weight.levels if self.reference_scale is None else None
        return fake_quant_linear(
            input, handle, self.bias, values, weight.applied, levels, weight.scale
        )

    def values_of(self, input: Tensor, dtype: torch.dtype) -> Tensor:
        """The input to be multiplied, in the dtype of the product where autocast asks for one."""
        if not self.scheme.quantizes_activation:
            return input.detach().to(dtype if autocast_type(input.device) else input.dtype)

        kind = dtype if autocast_type(input.device) else input.dtype

        def derive() -> Tensor:
            return quantizers.activation_values(input, self.scheme, kind)

        if self.shared is None:
            return derive()
        result: Tensor = self.shared.take(input, dtype, derive)
        return result

    def levels_of(
        self, input: Tensor, kept: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The input in whole numbers.

        Args:
            input: shape (..., in_features).
            kept: also give what they stand for in this dtype.

        Returns:
            int8 levels (rows, in), their scale, and those values or None.
        """

        def derive() -> tuple[Tensor, Tensor, Tensor | None]:
            if kept is None:
                return *quantizers.activation_levels(input, self.scheme), None
            return quantizers.activation_levels_and_values(input, self.scheme, kept)

        if self.shared is None:
            return derive()
        result: tuple[Tensor, Tensor, Tensor | None]
        result = self.shared.take(input, (torch.int8, kept), derive)
        return result

    def _integer(self, input: Tensor) -> Tensor:
        dtype = self.product_type(input)
        backward = BACKWARD[self.scheme.arithmetic]
        kept = torch.bfloat16 if backward == "bf16" and torch.is_grad_enabled() else None
        with torch.no_grad():
            weight = self.quantized(dtype, as_int8=True)
            values = self.levels_of(input, kept)
        assert weight.levels is not None
        return int8_linear(
            input,
            self._handle(weight.scale),
            self.bias,
            values,
            (weight.levels.view(self.weight.shape), weight.scale),
            dtype,
            backward=backward,
        )
