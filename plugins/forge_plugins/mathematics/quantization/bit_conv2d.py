"""A convolution that applies few-level weights to few-level activations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from forge_plugins.mathematics.quantization.bit_layer import BitLayer, QuantizationState
from forge_plugins.mathematics.quantization.scheme import Scheme

_SETTINGS = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "transposed",
    "output_padding", "groups", "padding_mode", "_reversed_padding_repeated_twice",
)  # fmt: skip


class BitConv2d(BitLayer, nn.Conv2d):
    """`y = Q(x) * Q(W) + b`; rows are output channels, what stands for a token is a sample.

    A kernel mixes positions, so a scale for each position could not be taken out of the sum: the
    samples of a batch have one each. Always in exact arithmetic.

    Args:
        scheme: what Q means; ternary weights per tensor and int8 activations otherwise.
        quantization: warm-up and sparsity, shared with other layers.
    """

    def __init__(  # noqa: PLR0913, PLR0917  those of nn.Conv2d
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        scheme: Scheme | None = None,
        quantization: QuantizationState | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Conv2d.__init__(
            self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
            bias, padding_mode, device=device, dtype=dtype,  # type: ignore[arg-type]
        )  # fmt: skip
        self.configure(scheme or Scheme(), quantization)

    @classmethod
    def from_conv2d(
        cls,
        convolution: nn.Conv2d,
        scheme: Scheme | None = None,
        quantization: QuantizationState | None = None,
    ) -> BitConv2d:
        """The same layer with the very same parameters.

        Raises:
            ValueError: the scheme's groups do not divide the rows.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        for name in _SETTINGS:
            setattr(layer, name, getattr(convolution, name))
        layer.weight, layer.bias = convolution.weight, convolution.bias
        layer.configure(scheme or Scheme(), quantization)
        layer.train(convolution.training)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to shape (batch, channels, height, width), or without the batch."""
        if self.sub_norm is not None:
            input = self.sub_norm(input)
        single = input.dim() == 3
        inputs = input.unsqueeze(0) if single else input
        quantized = self.estimated_input(inputs, channels=True)
        result: Tensor = self._conv_forward(quantized, self.estimated_weight(), self.bias)
        return result.squeeze(0) if single else result
