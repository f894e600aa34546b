"""What exporters read of quantized layers: whole levels and the numbers that scale them.

The scale is never taken from weights that are on their grid already: the mean of a ternary tensor
is its density times the level, so a second quantization would shrink it (by a third, for Gaussian
weights).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from forge_plugins.mathematics.quantization.bit_layer import BitLayer, as_stored, latent


@dataclass(frozen=True, slots=True)
class GridWeight:
    """A weight in numbers; on the CPU.

    Args:
        levels: int8, the weight's shape.
        factor: fp32, one for each equal, contiguous part of the flat weight: shape (parts,).
        multiplied: whether applied = level * factor (a step), else level / factor (a scale).
        bits: of the scheme.
        dtype: of the weight that is applied.
    """

    levels: Tensor
    factor: Tensor
    multiplied: bool
    bits: float
    dtype: torch.dtype

    @property
    def applied(self) -> Tensor:
        """The weight that the forward pass multiplies with, bit for bit, in its dtype."""
        return scaled(self.levels, self.factor, self.dtype, multiplied=self.multiplied)


def scaled(levels: Tensor, factor: Tensor, dtype: torch.dtype, *, multiplied: bool) -> Tensor:
    """Levels as weights.

    Args:
        levels: int8, any shape.
        factor: fp32, shape (parts,); parts divides the number of levels.
        dtype: of the answer.
        multiplied: level * factor, else level / factor.
    """
    parts = levels.reshape(len(factor), -1).float()
    result = parts.mul_(factor[:, None]) if multiplied else parts.div_(factor[:, None])
    return result.view(levels.shape).to(dtype)


def grid_layers(model: nn.Module) -> dict[str, BitLayer]:
    """The layers whose weights have levels; one that stands in two places has both names."""
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, BitLayer) and module.scheme.quantizes_weight
    }


def need_grid_layers(model: nn.Module) -> dict[str, BitLayer]:
    """`grid_layers`, of which there must be one.

    Raises:
        ValueError: the weights were never trained to be on levels.
    """
    result = grid_layers(model)
    if not result:
        raise ValueError(
            "the model has no quantized layer: its weights were never trained to be ternary (or on "
            "other levels) and would not survive it; add a quantizer and train, or export with "
            "state_dict"
        )
    return result


def check_plain(model: nn.Module) -> None:
    """Refuse to write as they are weights that the network applies on levels.

    Raises:
        ValueError: there is a quantized layer; the message names it.
    """
    layers = (
        name for name, module in model.named_modules()
        if isinstance(module, BitLayer)
        and (module.scheme.quantizes_weight or module.scheme.quantizes_activation)
    )  # fmt: skip
    first = next(layers, None)
    if first is not None:
        raise ValueError(
            f"{first} is quantized, and the layout plain would lose it: take the layout bitlinear, "
            "autobitlinear or online"
        )


def check_finished(layer: BitLayer) -> None:
    """Refuse what is still on its way to its levels.

    Raises:
        ValueError: the levels are blended in only in part.
    """
    if layer.warmup_lambda != 1.0:
        raise ValueError(
            f"the warm-up has blended in {layer.warmup_lambda:.0%} of the levels only: the weights "
            "are not on them yet; train on, or shorten warmup_steps"
        )


def grid_weight(layer: BitLayer) -> GridWeight:
    """Levels and factors of a layer, as it applies them in evaluation.

    Raises:
        ValueError: the quantization is not complete yet.
    """
    check_finished(layer)
    levels, scale = layer.levels()
    step = layer.step()
    factor = scale if step is None else step
    return GridWeight(
        levels.reshape(layer.weight.shape).cpu(),
        factor.detach().float().reshape(-1).cpu(),
        step is not None,
        layer.scheme.weight_bits,
        layer.weight.dtype,
    )


def applied_weight(layer: BitLayer) -> Tensor:
    """The weight that a layer applies in evaluation, in its dtype, on the CPU."""
    training = layer.training
    layer.eval()  # stochastic rounding draws while training only
    try:
        return layer.applied_weight().detach().cpu()
    finally:
        layer.train(training)


def applied_state(model: nn.Module) -> dict[str, Any]:
    """The state of the same model with plain layers, whose weights are those that are applied.

    Returns:
        By name what `state_dict` holds (tensors, and what modules keep beside them); weights that
        were tied stay tied where they are applied alike.
    """
    state: dict[str, Any] = dict(model.state_dict())
    known: dict[int, list[Tensor]] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if not isinstance(layer, BitLayer):
            continue
        prefix = f"{name}." if name else ""
        if layer.scheme.quantizes_weight:
            mine = as_stored(layer, applied_weight(layer))
            alike = known.setdefault(id(latent(layer)), [])
            result = next((item for item in alike if torch.equal(item, mine)), None)
            if result is None:
                result = mine
                alike.append(mine)
            state[f"{prefix}weight"] = result
        for own in ("threshold", "reference_scale"):
            state.pop(f"{prefix}{own}", None)
    return state
