"""Networks on few levels in one safetensors file: packed levels, all else as it is.

For a weight `X` on levels the file holds `X.levels` (uint8, see `packing`) and either `X.scale`
(fp32: applied = level / scale) or `X.step` (applied = level * step), one number for each equal,
contiguous part of the weight: the tensor, a row, or a group of a row. The layout's name and the
shapes stand in the file's metadata.

The layouts `forge.ternary.*.1` hold fp32 weights of three levels with one scale each. What goes
beyond that is told by further entries under the layout `forge.levels.2`: `packings` (of weights
that are packed otherwise than most), `dtypes` (of applied weights that are not fp32) and `ties`
(names of tensors that stand in the file under another name).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from forge_plugins.interchange.grid_weight import (
    GridWeight,
    applied_state,
    grid_weight,
    need_grid_layers,
    scaled,
)
from forge_plugins.mathematics.optimizers.tied_tensors import tied_names
from forge_plugins.mathematics.quantization import packing
from forge_plugins.mathematics.quantization.bit_layer import BitLayer, as_stored

Layout = Literal["two_bits", "base_three"]
Packing = Literal["one_bit", "two_bits", "base_three", "four_bits", "eight_bits"]
LAYOUTS: Final[dict[Layout, str]] = {
    "two_bits": "forge.ternary.two_bits.1",
    "base_three": "forge.ternary.base_three.1",
}
LEVELS: Final = "forge.levels.2"
_PACK: Final[dict[Packing, Callable[[Tensor], Tensor]]] = {
    "one_bit": packing.pack_one_bit,
    "two_bits": packing.pack_two_bits,
    "base_three": packing.pack_base_three,
    "four_bits": packing.pack_four_bits,
    "eight_bits": packing.pack_eight_bits,
}
_UNPACK: Final[dict[Packing, Callable[[Tensor, tuple[int, ...]], Tensor]]] = {
    "one_bit": packing.unpack_one_bit,
    "two_bits": packing.unpack_two_bits,
    "base_three": packing.unpack_base_three,
    "four_bits": packing.unpack_four_bits,
    "eight_bits": packing.unpack_eight_bits,
}
_DTYPES: Final = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
}


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """How a weight stands in the file."""

    shape: tuple[int, ...]
    packing: Packing
    dtype: torch.dtype = torch.float32
    plain: bool = True
    """One scale for the whole weight, which divides."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What the tensors of a packed file stand for.

    Args:
        weights: the packed ones by name.
        ties: for each name whose tensor stands under another one: that name.
        left_out: entries of the state that are no tensors.
    """

    weights: Mapping[str, PackedWeight]
    ties: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


def _packing_of(weight: GridWeight, layout: Layout) -> Packing:
    """The smallest form that holds the levels; of three levels the one that is asked for."""
    if weight.bits == 8:
        return "eight_bits"
    if weight.bits == 4:
        return "four_bits"
    if weight.bits == 1 and bool(weight.levels.all()):
        return "one_bit"
    return layout  # a sparse 1-bit weight has zeros; 2 bits are -1, 0 and 1


def pack_model(model: nn.Module, layout: Layout = "two_bits") -> tuple[dict[str, Tensor], Contents]:
    """The tensors of a packed file.

    Args:
        model: with quantized layers; their latent weights are quantized once, here.
        layout: how ternary levels are packed.

    Returns:
        Tensors by name, each that is shared once, and what they stand for.

    Raises:
        ValueError: the model has no quantized layer, or is still on its way to its levels.
    """
    layers = {
        f"{name}.weight" if name else "weight": layer
        for name, layer in need_grid_layers(model).items()
    }
    whole = applied_state(model)
    state = {name: value for name, value in whole.items() if isinstance(value, Tensor)}
    ties = tied_names(state)
    tensors: dict[str, Tensor] = {}
    weights: dict[str, PackedWeight] = {}
    for name, tensor in state.items():
        if name in ties:
            continue
        if name not in layers:
            tensors[name] = tensor.detach().to("cpu").contiguous().clone()
            continue
        weight = _as_stored(layers[name], name)
        kind = _packing_of(weight, layout)
        plain = not weight.multiplied and len(weight.factor) == 1
        tensors[f"{name}.levels"] = _PACK[kind](weight.levels)
        tensors[f"{name}.{'step' if weight.multiplied else 'scale'}"] = weight.factor
        weights[name] = PackedWeight(tuple(weight.levels.shape), kind, weight.dtype, plain)
    left_out = tuple(sorted(whole.keys() - state.keys()))
    return tensors, Contents(weights, ties, left_out)


def _as_stored(layer: BitLayer, name: str) -> GridWeight:
    """Levels and factors of a layer's weight as the state has it.

    Raises:
        ValueError: it is stored transposed, which more than one scale does not follow.
    """
    weight = grid_weight(layer)
    levels = as_stored(layer, weight.levels)
    if layer.transposed and len(weight.factor) > 1:
        raise ValueError(
            f"{name} is stored transposed, and has a scale for each {layer.scheme.granularity}: "
            "train with granularity tensor, or export with state_dict (weights: applied)"
        )
    return replace(weight, levels=levels)


def layout_name(contents: Contents, layout: Layout) -> str:
    """What a file with these contents says that it is."""
    plain = all(
        item.packing == layout and item.dtype is torch.float32 and item.plain
        for item in contents.weights.values()
    )
    return LAYOUTS[layout] if plain and not contents.ties else LEVELS


def write_packed(
    file: Path, tensors: Mapping[str, Tensor], contents: Contents, layout: Layout = "two_bits"
) -> None:
    """Write a packed file."""
    weights, name = contents.weights, layout_name(contents, layout)
    about = {
        "layout": name,
        "shapes": json.dumps({key: item.shape for key, item in weights.items()}),
    }
    if name == LEVELS:
        dtypes = {key: str(item.dtype).removeprefix("torch.") for key, item in weights.items()}
        packings = {key: item.packing for key, item in weights.items()}
        about |= {
            "packings": json.dumps(packings),
            "dtypes": json.dumps(dtypes),
            "ties": json.dumps(dict(contents.ties)),
        }
    save_file(dict(tensors), file, about)


def _table(file: Path, about: Mapping[str, str], entry: str, kind: type) -> dict[str, Any]:
    """An entry of the metadata: names and values of one kind."""
    try:
        result: Any = json.loads(about[entry])
        values = result.values()
    except (KeyError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{file}: its metadata tell no {entry}: {error}") from error
    if not all(isinstance(value, kind) for value in values):
        raise ValueError(f"{file}: its metadata tell no {entry}")
    return dict(result)


def _shape(sizes: list[Any]) -> tuple[int, ...]:
    whole = all(type(size) is int and size >= 0 for size in sizes)
    if not whole or len(sizes) > 8 or math.prod(sizes) >= 2**48:
        raise ValueError(f"{str(sizes)[:80]} is no shape")
    return tuple(sizes)


def _contents(file: Path, about: Mapping[str, str]) -> Contents:
    """What the metadata tell.

    Raises:
        ValueError: it is no known layout, or they tell something else than it needs.
    """
    known = {name: layout for layout, name in LAYOUTS.items()}
    layout_name = about.get("layout", "")
    if layout_name != LEVELS and layout_name not in known:
        raise ValueError(
            f"{file} has the layout {about.get('layout')!r}, which is none of "
            f"{', '.join((*known, LEVELS))}"
        )
    shapes = _table(file, about, "shapes", list)
    packings, dtypes, ties = dict.fromkeys(shapes, known.get(layout_name)), {}, {}
    if layout_name == LEVELS:
        packings, dtypes, ties = (
            _table(file, about, entry, str) for entry in ("packings", "dtypes", "ties")
        )
    weights: dict[str, PackedWeight] = {}
    for name, sizes in shapes.items():
        kind, dtype = packings.get(name), dtypes.get(name, "float32")
        if kind not in _UNPACK or dtype not in _DTYPES:
            raise ValueError(f"{file}: {name} is packed as {kind} for {dtype}, which is not known")
        try:
            weights[name] = PackedWeight(_shape(sizes), kind, _DTYPES[dtype], layout_name != LEVELS)
        except ValueError as error:
            raise ValueError(f"{file}: {name}: {error}") from error
    return Contents(weights, ties)


def _unpacked(tensors: dict[str, Tensor], name: str, weight: PackedWeight) -> Tensor:
    """One weight, its levels and factors taken out of the tensors."""
    levels = tensors.pop(f"{name}.levels", None)
    scale, step = (tensors.pop(f"{name}.{kind}", None) for kind in ("scale", "step"))
    factor = step if scale is None else scale
    if (
        levels is None
        or factor is None
        or name in tensors
        or (scale is step)
        or (scale is not None and step is not None)
    ):
        raise ValueError("it does not hold levels and scale of it, and them alone")
    parts, count = factor.numel(), math.prod(weight.shape)
    numbers = factor.dtype is torch.float32 and factor.ndim == 1 and parts > 0
    if not numbers or not bool(((factor > 0) & (factor < 1e38)).all()):
        raise ValueError("its scale is no positive number in fp32")
    if count % parts or (weight.plain and (parts != 1 or step is not None)):
        raise ValueError(f"its {parts} scales do not part {count} weights")
    unpacked = _UNPACK[weight.packing](levels, weight.shape)
    return scaled(unpacked, factor, weight.dtype, multiplied=step is not None)


def read_packed(file: Path) -> dict[str, Tensor]:
    """The weights that are applied, bit for bit, and all other tensors; tied ones are one tensor.

    Raises:
        ValueError: the file is not of a known layout, is damaged, or its bytes do not fit its
            shapes.
    """
    try:
        with safe_open(file, "pt") as stored:
            contents = _contents(file, stored.metadata() or {})
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is no intact safetensors file: {error}") from error
    for name, weight in contents.weights.items():
        try:
            tensors[name] = _unpacked(tensors, name, weight)
        except ValueError as error:
            raise ValueError(f"{file}: {name}: {error}") from error
    for name, first in contents.ties.items():
        if first not in tensors or name in tensors:
            raise ValueError(f"{file}: {name} is tied to {first}, which is not there")
        tensors[name] = tensors[first]
    return tensors
