"""The transposed linear layer of GPT-2, with few-level weights and activations."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from forge_plugins.mathematics.quantization.bit_layer import QuantizationState
from forge_plugins.mathematics.quantization.bit_linear import BitLinear
from forge_plugins.mathematics.quantization.scheme import Scheme
from forge_plugins.mathematics.quantization.weight_cache import Quantized


class BitConv1D(BitLinear):
    """`BitLinear` whose parameter stands as `Conv1D` of transformers has it: shape (in, out).

    State dicts, optimizers and files see the parameter as it was, contiguous; the layer works with
    `weight`, a view of it of shape (out, in).
    """

    transposed: ClassVar[bool] = True

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """A view of the parameter, shape (out, in)."""
        parameter = self._parameters["weight"]
        assert parameter is not None
        return parameter.t()

    @classmethod
    def from_conv1d(
        cls,
        layer: nn.Module,
        scheme: Scheme | None = None,
        quantization: QuantizationState | None = None,
    ) -> BitConv1D:
        """The same layer with the very same parameters, so that ties and dtypes stay.

        Raises:
            ValueError: the scheme's groups do not divide the rows.
        """
        result = cls.__new__(cls)
        nn.Module.__init__(result)
        parameter = layer._parameters["weight"]
        assert parameter is not None
        result.in_features, result.out_features = parameter.shape
        result._parameters["weight"] = parameter
        result._parameters["bias"] = layer._parameters["bias"]
        result.configure(scheme or Scheme(), quantization)
        result.train(layer.training)
        return result

    def _computed(self, kind: tuple[bool, torch.dtype, bool], *, fresh: bool) -> Quantized:
        result = super()._computed(kind, fresh=fresh)
        levels = None if result.levels is None else result.levels.contiguous()
        return result._replace(levels=levels)  # what products of whole numbers read


def is_conv1d(module: nn.Module) -> bool:
    """Whether a layer is `Conv1D` of the transformers library, which need not be installed."""
    cls = type(module)
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"
