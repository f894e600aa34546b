"""Ternary networks in one safetensors file: packed levels, all else as it is.

For a ternary weight `X` the file holds `X.levels` (uint8, see `packing`) and `X.scale` (fp32, the
factor `s` with applied weight = level / s); the layout's name and the shapes stand in the file's
metadata.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from forge_plugins.mathematics.packing import (
    pack_base_three,
    pack_two_bits,
    unpack_base_three,
    unpack_two_bits,
)
from forge_plugins.mathematics.ternary_layers import read_layers

Layout = Literal["two_bits", "base_three"]
LAYOUTS: Final[dict[Layout, str]] = {
    "two_bits": "forge.ternary.two_bits.1",
    "base_three": "forge.ternary.base_three.1",
}
_PACK: Final[dict[Layout, Callable[[Tensor], Tensor]]] = {
    "two_bits": pack_two_bits,
    "base_three": pack_base_three,
}
_UNPACK: Final[dict[str, Callable[[Tensor, tuple[int, ...]], Tensor]]] = {
    LAYOUTS["two_bits"]: unpack_two_bits,
    LAYOUTS["base_three"]: unpack_base_three,
}


def pack_model(
    model: nn.Module, layout: Layout = "two_bits"
) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """The tensors of a packed file.

    Args:
        model: with ternary layers; their latent weights are quantized once, here.
        layout: how the levels are packed.

    Returns:
        Tensors by name, and the shape of each packed weight.

    Raises:
        ValueError: the model has no ternary layer.
    """
    ternary = {
        f"{name}.weight" if name else "weight": layer for name, layer in read_layers(model).items()
    }
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in model.state_dict().items():
        layer = ternary.get(name)
        if layer is None:
            tensors[name] = tensor.detach().to("cpu").contiguous().clone()
            continue
        tensors[f"{name}.levels"] = _PACK[layout](layer.levels)
        tensors[f"{name}.scale"] = layer.scale.reshape(1)
        shapes[name] = list(layer.levels.shape)
    return tensors, shapes


def write_packed(
    file: Path,
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, list[int]],
    layout: Layout = "two_bits",
) -> None:
    """Write a packed file."""
    about = {"layout": LAYOUTS[layout], "shapes": json.dumps(dict(shapes))}
    save_file(dict(tensors), file, about)


def _shapes(file: Path, about: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """The shapes that the metadata tell, when they can be shapes."""
    try:
        found: Any = json.loads(about["shapes"])
        return {name: _shape(sizes) for name, sizes in found.items()}
    except (KeyError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{file}: its metadata tell no shapes: {error}") from error


def _shape(sizes: Any) -> tuple[int, ...]:
    whole = isinstance(sizes, list) and all(type(size) is int and size >= 0 for size in sizes)
    if not whole or len(sizes) > 8 or math.prod(sizes) >= 2**48:
        raise ValueError(f"{str(sizes)[:80]} is no shape")
    return tuple(sizes)


def read_packed(file: Path) -> dict[str, Tensor]:
    """The weights that are applied, bit for bit, and all other tensors.

    Raises:
        ValueError: the file is not of a known layout, is damaged, or its bytes do not fit its
            shapes.
    """
    try:
        with safe_open(file, "pt") as stored:
            about = stored.metadata() or {}
            unpack = _UNPACK.get(about.get("layout", ""))
            if unpack is None:
                known = ", ".join(_UNPACK)
                raise ValueError(
                    f"{file} has the layout {about.get('layout')!r}, which is none of {known}"
                )
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is no intact safetensors file: {error}") from error
    for name, shape in _shapes(file, about).items():
        levels, scale = tensors.pop(f"{name}.levels", None), tensors.pop(f"{name}.scale", None)
        if levels is None or scale is None or name in tensors:
            raise ValueError(f"{file} does not hold levels and scale of {name}, and them alone")
        if scale.dtype is not torch.float32 or scale.shape != (1,) or not 0 < float(scale) < 1e38:
            raise ValueError(f"{file}: the scale of {name} is no positive number in fp32")
        try:
            tensors[name] = unpack(levels, shape).float().div_(scale)
        except ValueError as error:
            raise ValueError(f"{file}: {name}: {error}") from error
    return tensors
