"""Ternary networks in a file: levels two bits each, all else as it is.

For a ternary weight `X` the file holds `X.levels` (uint8, four to a byte) and `X.scale` (fp32, the
factor `s` with applied weight = level / s); the shapes stand in the file's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from forge_plugins.mathematics.bit_linear import BitLinear
from forge_plugins.mathematics.bitnet import ternary_levels, ternary_scale
from forge_plugins.mathematics.packing import pack_two_bits, unpack_two_bits

LAYOUT: Final = "forge.ternary.2bit.1"


def pack_model(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """The tensors of a packed file.

    Args:
        model: with `BitLinear` layers; their latent weights are quantized once, here.

    Returns:
        Tensors by name, and the shape of each packed weight.
    """
    ternary = {
        f"{name}.weight" if name else "weight": layer
        for name, layer in model.named_modules()
        if isinstance(layer, BitLinear)
    }
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in model.state_dict().items():
        value = tensor.detach()
        if name not in ternary:
            tensors[name] = value.to("cpu").contiguous().clone()
            continue
        scale = ternary_scale(value)
        levels = ternary_levels(value, scale).to(torch.int8)
        tensors[f"{name}.levels"] = pack_two_bits(levels.cpu())
        tensors[f"{name}.scale"] = scale.reshape(1).cpu()
        shapes[name] = list(value.shape)
    return tensors, shapes


def write_packed(
    file: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, list[int]]
) -> None:
    """Write a packed file."""
    save_file(dict(tensors), file, {"layout": LAYOUT, "shapes": json.dumps(dict(shapes))})


def read_packed(file: Path) -> dict[str, Tensor]:
    """The weights that are applied, bit for bit, and all other tensors.

    Raises:
        ValueError: the file is not of this layout, or its bytes do not fit its shapes.
    """
    with safe_open(file, "pt") as stored:
        about = stored.metadata() or {}
        if about.get("layout") != LAYOUT:
            raise ValueError(f"{file} has the layout {about.get('layout')!r}, not {LAYOUT!r}")
        shapes = json.loads(about["shapes"])
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    for name, shape in shapes.items():
        levels = unpack_two_bits(tensors.pop(f"{name}.levels"), tuple(shape))
        tensors[name] = levels.float().div_(tensors.pop(f"{name}.scale"))
    return tensors
