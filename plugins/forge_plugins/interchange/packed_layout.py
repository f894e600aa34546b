"""How transformers holds ternary layers: packed levels, or latent weights quantized online.

Layouts, as the client's `integrations/bitnet.py` reads them:

- `bitlinear`: packed levels, `weight_scale` is the factor `s` (applied = level / s), the bias is
  added after the scaling;
- `autobitlinear`: packed levels, `weight_scale` is `1 / s`, and the bias is added *before* the
  scaling, so the file holds `bias * s`;
- `online`: latent weights, quantized by the client in each forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from forge_plugins.interchange.grid_weight import need_grid_layers
from forge_plugins.mathematics.optimizers.tied_tensors import same_bits
from forge_plugins.mathematics.quantization.bit_layer import BitLayer
from forge_plugins.mathematics.quantization.packing import pack_two_bits
from forge_plugins.mathematics.quantization.resume_from_quantized import unpack_rows
from forge_plugins.mathematics.quantization.ternary_layers import TernaryLayer, check_layers

Layout = Literal["bitlinear", "autobitlinear", "online"]


def check_layouts(model: nn.Module, layout: Layout) -> None:
    """Refuse ternary layers that a layout cannot hold.

    Raises:
        ValueError: there is no ternary layer, or one that does not fit; the message names it.
    """
    shapes, layers = check_layers(model), need_grid_layers(model)
    for name, (rows, _) in shapes.items():
        bits = layers[name].scheme.activation_bits
        if bits != 8:
            raise ValueError(
                f"{name} has {bits}-bit activations, the client's layers round to 8 bits: set "
                "quantizer.with.activation_bits: 8"
            )
        if layout != "online" and rows % 4:
            raise ValueError(
                f"{name} has {rows} rows, which is not a multiple of 4: the packed layouts hold "
                "four rows in one; change the model's width, groups or hidden, or use the layout "
                "'online'"
            )
        if layout == "online" and not _is_quantized_alike(layers[name]):
            raise ValueError(
                f"{name} is not quantized as the client would quantize its latent weight again "
                "(weight_bits 1.58 by absmean, to the nearest level, without target_sparsity): use "
                "the layout 'bitlinear', which holds the levels"
            )


def _is_quantized_alike(layer: BitLayer) -> bool:
    """Whether the levels are those that the client takes from the latent weight."""
    scheme = layer.scheme
    plain = scheme.is_reference and scheme.parity == "hf" and layer.threshold is None
    return plain and layer.reference_scale is None and not layer.quantization.sparsity


def ternary_tensors(
    name: str, layer: TernaryLayer, bias: Tensor | None, layout: Layout, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of a packed layer.

    Args:
        name: of the layer in the file.
        layer: its levels and scale.
        bias: shape (out,), or None.
        layout: a packed one.
        dtype: of scale and bias.
    """
    rows, columns = layer.levels.shape
    scale = layer.scale.reshape(1)
    result = {f"{name}.weight": pack_two_bits(layer.levels).view(rows // 4, columns)}
    if layout == "bitlinear":
        result[f"{name}.weight_scale"] = scale.to(dtype)
        if bias is not None:
            result[f"{name}.bias"] = bias.to(dtype)
    else:
        result[f"{name}.weight_scale"] = (1.0 / scale).to(dtype)
        if bias is not None:
            result[f"{name}.bias"] = (bias.float() * scale).to(dtype)
    return result


def quantization_entry(layout: Layout, plain: list[str]) -> dict[str, Any]:
    """The `quantization_config` of `config.json`.

    Args:
        layout: of the file.
        plain: names of the linear layers that have no levels.
    """
    result: dict[str, Any] = {"quant_method": "bitnet", "modules_to_not_convert": plain}
    if layout != "bitlinear":
        result["linear_class"] = "autobitlinear"
        result["quantization_mode"] = "online" if layout == "online" else "offline"
    return result


def wrong_tensors(
    layout: Layout,
    tensors: Mapping[str, Tensor],
    stored: Mapping[str, Tensor],
    levels: Mapping[str, Tensor],
) -> list[str]:
    """The tensors of a file that are not what was meant, the levels of packed ones unpacked.

    Args:
        layout: of the file.
        tensors: what was to be written.
        stored: what was read.
        levels: of the packed weights, by their names in the file.
    """
    wrong = [
        name
        for name, tensor in tensors.items()
        if name not in stored or not same_bits(stored[name], tensor)
    ]
    if layout == "online":
        return wrong
    for name, meant in levels.items():
        held = stored.get(name)
        if name not in wrong and (held is None or not torch.equal(unpack_rows(held), meant)):
            wrong.append(name)
    return wrong
