"""Quantized layers of a copy made ready for torch's ONNX exporter: with packed weights in them.

A plain export would keep the full-precision weights in the file and quantize them at each call.
"""

from __future__ import annotations

import functools
from typing import Any, Final, Literal, NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from forge_plugins.interchange.grid_weight import (
    GridWeight,
    grid_layers,
    grid_weight,
    need_grid_layers,
)
from forge_plugins.interchange.onnx_weight import Form, PackedWeight, fitting_block
from forge_plugins.mathematics.quantization import quantizers
from forge_plugins.mathematics.quantization.bit_conv2d import BitConv2d
from forge_plugins.mathematics.quantization.bit_layer import BitLayer, latent
from forge_plugins.mathematics.quantization.bit_linear import BitLinear

Encoding = Literal["matmul_nbits", "int2", "matmul_integer"]
PACKED: Final = "packed"
"""The name of the module with the weight's bytes, in its layer."""


def check_layer(layer: BitLayer, encoding: Encoding) -> None:
    """Refuse what an encoding cannot hold, whatever the weights are.

    Raises:
        ValueError: the message says what can.
    """
    scheme = layer.scheme
    if type(layer).forward not in {BitLinear.forward, BitConv2d.forward}:
        raise ValueError(
            f"its class {type(layer).__name__} has a forward of its own, which would be left out: "
            "export with packed_ternary, or with state_dict (weights: applied)"
        )
    if encoding != "matmul_integer":
        return
    if not scheme.quantizes_activation:
        raise ValueError(
            f"it has {scheme.activation_bits}-bit activations, which are no integers to multiply: "
            "choose the weights matmul_nbits or int2, or train with activation_bits of 8 or 4"
        )
    if isinstance(layer, nn.Conv2d) and scheme.granularity == "group":
        raise ValueError(
            f"it is a convolution with a scale for each group of {scheme.group_size} weights, "
            "whose integer sums cannot be taken apart: choose the weights matmul_nbits or int2, "
            "or train with granularity row or tensor"
        )


def check_layers(model: nn.Module, encoding: Encoding) -> None:
    """Refuse, before anything is trained, layers that an encoding cannot hold.

    Raises:
        ValueError: the model has no quantized layer, or one that cannot be held; the message names
            it.
    """
    for name, layer in need_grid_layers(model).items():
        try:
            check_layer(layer, encoding)
        except ValueError as error:
            raise ValueError(f"{name or 'the model'}: {error}") from error


def form_of(layer: BitLayer, encoding: Encoding) -> Form:
    """How a layer's weight is read: convolutions and odd groups have no operator of their own."""
    if encoding == "matmul_integer":
        return "integer"
    scheme = layer.scheme
    fits = scheme.granularity != "group" or fitting_block(scheme.group_size) is not None
    if encoding == "matmul_nbits" and isinstance(layer, nn.Linear) and fits:
        return "matmul_nbits"
    return "dequantize"


class PackedLayer(NamedTuple):
    """What stands in the graph, and what it was made from."""

    packed: PackedWeight
    weight: GridWeight


def pack_layers(copy: nn.Module, encoding: Encoding, *, finished: bool) -> dict[str, PackedLayer]:
    """Give the quantized layers of a copy their packed weights, and forward passes that read them.

    Args:
        copy: of the model, fp32, on the CPU; changed in place.
        encoding: of the weights.
        finished: refuse layers that are not on their levels yet.

    Returns:
        By the layer's name; layers that share a weight, on the same levels, share what is packed.

    Raises:
        ValueError: a layer is still on its way to its levels.
    """
    result: dict[str, PackedLayer] = {}
    last = _LastInput()
    weights: dict[int, list[PackedLayer]] = {}
    layers: dict[int, PackedLayer] = {}
    for name, layer in grid_layers(copy).items():
        if id(layer) in layers:  # stands in two places
            result[name] = layers[id(layer)]
            continue
        if not finished:
            layer.quantization.warmup_lambda = 1.0  # the copy's own
        weight, form = grid_weight(layer), form_of(layer, encoding)
        alike = weights.setdefault(id(latent(layer)), [])
        held = next(
            (item for item in alike if item.packed.form == form and _same(item, weight)), None
        )
        if held is None:
            held = PackedLayer(PackedWeight(weight, form), weight)
            alike.append(held)
        layer.add_module(PACKED, held.packed)
        result[name] = layers[id(layer)] = held
    for module in copy.modules():
        if isinstance(module, BitLayer):
            run = _convolution if isinstance(module, nn.Conv2d) else _linear
            forward: Any = functools.partial(run, module, last)
            module.forward = forward
    return result


def _same(held: PackedLayer, weight: GridWeight) -> bool:
    old = held.weight
    return (
        old.multiplied is weight.multiplied
        and old.bits == weight.bits
        and old.factor.equal(weight.factor)
        and old.levels.equal(weight.levels)
    )


class _LastInput:
    """The last layer's input on its grid: layers side by side often have the same one."""

    def __init__(self) -> None:
        self._entry: tuple[Any, ...] = (None,)

    def grid(self, layer: BitLayer, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Whole numbers in fp32 and their scale."""
        scheme, channels = layer.scheme, isinstance(layer, nn.Conv2d)
        kind = (scheme.activation_bits, scheme.activation_granularity, scheme.parity, channels)
        entry = self._entry
        if entry[0] is not inputs or entry[1:3] != (inputs._version, kind):
            result = quantizers.activation_grid(inputs, scheme, channels=channels)
            self._entry = entry = (inputs, inputs._version, kind, *result)
        return entry[3], entry[4]

    def values(self, layer: BitLayer, inputs: Tensor) -> Tensor:
        """Whole numbers by their scale; the input itself if it has no grid."""
        if not layer.scheme.quantizes_activation:
            return inputs
        whole, scale = self.grid(layer, inputs)
        return whole / scale


def _linear(layer: BitLayer, last: _LastInput, inputs: Tensor) -> Tensor:
    """What `BitLinear` computes in evaluation."""
    assert isinstance(layer, BitLinear)
    if layer.sub_norm is not None:
        inputs = layer.sub_norm(inputs)
    if inputs.shape[-1] != layer.in_features:  # the packed products would not notice
        raise ValueError(f"inputs of width {inputs.shape[-1]} for {layer.in_features} features")
    bias: Tensor | None = layer.bias
    packed = layer._modules.get(PACKED)
    if not isinstance(packed, PackedWeight):  # its activations alone are quantized
        return functional.linear(last.values(layer, inputs), layer.weight, bias)
    if packed.form == "integer":
        whole, scale = last.grid(layer, inputs)
        outputs = packed.matmul_integer(whole) / scale
    elif packed.form == "dequantize":
        return functional.linear(last.values(layer, inputs), packed.dequantized(), bias)
    else:
        outputs = packed.matmul_nbits(last.values(layer, inputs))
    return outputs if bias is None else outputs + bias


def _convolution(layer: BitLayer, last: _LastInput, inputs: Tensor) -> Tensor:
    """What `BitConv2d` computes in evaluation."""
    assert isinstance(layer, BitConv2d)
    if layer.sub_norm is not None:
        inputs = layer.sub_norm(inputs)
    single = inputs.dim() == 3
    inputs = inputs.unsqueeze(0) if single else inputs
    packed = layer._modules.get(PACKED)
    if isinstance(packed, PackedWeight) and packed.form == "integer":
        whole, scale = last.grid(layer, inputs)
        outputs = _integer_convolution(layer, packed, whole) / scale
        outputs = outputs if layer.bias is None else outputs + layer.bias.view(-1, 1, 1)
    else:
        weight = packed.dequantized() if isinstance(packed, PackedWeight) else layer.weight
        outputs = layer._conv_forward(last.values(layer, inputs), weight, layer.bias)
    return outputs.squeeze(0) if single else outputs


def _integer_convolution(layer: BitConv2d, packed: PackedWeight, whole: Tensor) -> Tensor:
    left, right, above, below = layer._reversed_padding_repeated_twice
    margins = (above, left, below, right)
    if layer.padding_mode != "zeros":
        whole = functional.pad(whole, (left, right, above, below), mode=layer.padding_mode)
        margins = (0, 0, 0, 0)
    return packed.convolution_integer(whole, layer, margins)
