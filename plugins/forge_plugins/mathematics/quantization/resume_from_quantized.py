"""Weights that are on their grid already: found, unpacked, and trained on from where they are.

Quantizing them as if they were latent would shrink them: the mean of |W| of a ternary weight is
its density times the step (0.69 for Gaussian ones). Their step is max |W|.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from forge_plugins.mathematics.quantization import quantizers
from forge_plugins.mathematics.quantization.bit_layer import BitLayer
from forge_plugins.mathematics.quantization.scheme import Scheme

SPREAD: Final = 2.0**-4
NUDGES: Final = tuple(sign * count for count in range(1, 9) for sign in (1, -1))


def step_of(weight: Tensor, scheme: Scheme) -> Tensor | None:
    """The step of a weight that holds no values but levels times a step.

    Args:
        weight: any shape and dtype.
        scheme: says the levels and what shares a step; 1 and 1.58 bits are looked at (the finer
            grids take their step from the largest weight, which is on the grid: nothing shrinks).

    Returns:
        max |W| of what shares a step, fp32; None for a weight with other values (a latent one).
    """
    if scheme.weight_bits not in (1, 1.58):
        return None
    sizes = quantizers.arranged(weight.detach(), scheme).float().abs()
    step = sizes.amax() if scheme.granularity == "tensor" else sizes.amax(-1, keepdim=True)
    if sizes.numel() < 2 * step.numel() or not bool(step.any()):
        return None
    on_grid = sizes == step
    if scheme.weight_bits == 1.58:
        on_grid |= sizes == 0
    return step if bool(on_grid.all()) else None


def continue_from(layer: BitLayer, step: Tensor) -> bool:
    """Give a layer a latent weight with which it applies, bit for bit, what its weight holds now.

    The latent weight is the levels, each of a size one sixteenth above or below a common one, so
    that their mean (median) is the step: that is where the latent weights of a trained network
    lie, and it is on no grid, so that it is not taken for a quantized weight a second time. A
    step that no mean gives in fp32 (or in the weight's dtype) is kept in the layer as
    `reference_scale`.

    Args:
        layer: with the quantized weight as its latent one; changed in place.
        step: from `step_of`.

    Returns:
        Whether it could be done; if not, the weight is as it was. (A weight with more zeros than
        half under absmedian has no such latent weight; a 1-bit block of one sign is all mean.)
    """
    scheme = layer.scheme
    with torch.no_grad():
        before = layer.weight.detach().clone(memory_format=torch.contiguous_format)
        file = quantizers.arranged(before, scheme).float()
        levels = file.sign()
        sizes = torch.full_like(levels.view(-1), 1.0 - SPREAD)
        sizes[::2] = 1.0 + SPREAD
        pattern = levels * sizes.view(levels.shape)
        measure = quantizers.unclamped_measure(pattern.view(before.shape), scheme)
        filled = step > 0
        if bool((filled & (measure == 0)).any()):
            return False
        latent = pattern * torch.where(filled, step / measure.clamp(min=1e-30), 0.0)
        wrong = torch.ones_like(step, dtype=torch.bool)
        best = latent
        for nudge in (0, *NUDGES):
            best = torch.where(wrong, latent * (1.0 + nudge * 2.0**-23), best)
            layer.weight.copy_(best.view(before.shape))
            wrong = _wrong(layer, before)
            if not bool(wrong.any()):
                break
        else:
            layer.weight.copy_(latent.view(before.shape))
            result = quantizers.unclamped_measure(layer.weight, scheme)
            item = torch.ones_like(step)
            reference_scale = torch.stack(
                [torch.where(filled, step, item), torch.where(filled, result, item)]
            )
            layer.reference_scale = reference_scale
            if bool(_wrong(layer, before).any()):
                layer.reference_scale = None
                layer.weight.copy_(before)
                return False
        layer.continued = True
    return True


def _wrong(layer: BitLayer, wanted: Tensor) -> Tensor:
    """Which of what shares a step is applied otherwise than wanted: the scale's shape."""
    levels, _ = layer.levels()
    result = layer.dequantized(levels.float(), layer.scale(), wanted.dtype)
    different = quantizers.arranged(result != wanted, layer.scheme)
    if layer.scheme.granularity == "tensor":
        return different.any()
    return different.any(-1, keepdim=True)


# -- files -----------------------------------------------------------------------------------------


def unpack_rows(packed: Tensor) -> Tensor:
    """Ternary levels from the packed layout of the transformers library.

    Args:
        packed: uint8, shape (out / 4, in); byte row r holds rows r, r + R, r + 2R, r + 3R of the
            weight (R = out / 4) in its bit pairs, lowest first, each as level + 1.

    Returns:
        int8, shape (out, in).

    Raises:
        ValueError: a bit pair holds no level.
    """
    parts = [(packed >> shift) & 3 for shift in (0, 2, 4, 6)]
    levels = torch.cat(parts).to(torch.int8).sub_(1)
    if bool((levels > 1).any()):
        raise ValueError("the packed weight holds a bit pair of 3, which is no ternary level")
    return levels


def dequantized_state(
    state: Mapping[str, Tensor], *, quantization: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """A state dict with packed ternary weights as plain ones.

    Args:
        state: tensors by name; a packed weight `X.weight` (uint8) has `X.weight_scale` beside it.
        quantization: `quantization_config` of the model's `config.json`. It says what
            `weight_scale` means, which the tensors do not: with `linear_class` "bitlinear" the
            weight is level / scale, with "autobitlinear" level * scale (and the bias is stored
            divided by the scale).

    Returns:
        Names without `weight_scale`; weights with the dtype of their scale. A converted model
        that loads them recognises them as quantized.

    Raises:
        ValueError: there are packed weights, and nothing says what their scale means.
    """
    packed = [name for name in state if f"{name}_scale" in state]
    if not packed:
        return dict(state)
    kind = (quantization or {}).get("linear_class", "bitlinear" if quantization else None)
    if kind not in ("bitlinear", "autobitlinear"):
        raise ValueError(
            f"{packed[0]} is packed, and its scale can mean two opposite things: give "
            "quantization={'linear_class': 'bitlinear'} (level / scale) or 'autobitlinear' "
            "(level * scale), as the model's config.json says"
        )
    result = {name: tensor for name, tensor in state.items() if not name.endswith(".weight_scale")}
    for name in packed:
        scale = state[f"{name}_scale"]
        stored = state[name]
        levels = unpack_rows(stored) if stored.dtype is torch.uint8 else stored
        bias = name.removesuffix("weight") + "bias"
        result[name], plain_bias = plain_weight(
            levels, scale, state.get(bias), inverted=kind == "bitlinear"
        )
        if plain_bias is not None:
            result[bias] = plain_bias
    return result


def plain_weight(
    levels: Tensor, scale: Tensor, bias: Tensor | None, *, inverted: bool
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer of the transformers library, in the scale's dtype.

    Args:
        levels: shape (out, in).
        scale: its `weight_scale`, one number.
        bias: its bias, or None.
        inverted: `BitLinear`: level / scale, bias added afterwards; otherwise `AutoBitLinear`:
            product and bias together are multiplied by the scale.
    """
    factor = scale.float().reshape(())
    values = levels.float()
    if inverted:
        return values.div_(factor).to(scale.dtype), bias
    plain_bias = None if bias is None else (bias.float() * factor).to(bias.dtype)
    return values.mul_(factor).to(scale.dtype), plain_bias
