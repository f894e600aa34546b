"""Ternary layers as the clients' formats hold them: whole levels and one scale for each weight.

The levels are -1, 0 and 1: what 1, 1.58 and 2 bits give.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from torch import Tensor, nn

from forge_plugins.interchange.grid_weight import check_finished, grid_weight, need_grid_layers
from forge_plugins.mathematics.quantization.bit_layer import BitLayer
from forge_plugins.mathematics.quantization.bit_linear import BitLinear

ELSEWHERE: Final = "export with packed_ternary, or with state_dict (weights: applied)"


@dataclass(frozen=True, slots=True)
class TernaryLayer:
    """A layer in numbers: applied weight = levels / scale; on the CPU.

    Args:
        levels: int8 in {-1, 0, 1}, shape (out, in).
        scale: fp32, 0-d, positive.
        activation_bits: of the layer's inputs.
    """

    levels: Tensor
    scale: Tensor
    activation_bits: int

    @property
    def applied(self) -> Tensor:
        """The weight that the forward pass multiplies with, fp32, before it takes its dtype."""
        return self.levels.float().div_(self.scale)


def check_layer(layer: BitLayer) -> None:
    """Refuse what no client's format holds, whatever the weights are.

    Raises:
        ValueError: the layer's levels, scales or activations are others, or a norm stands in front
            of the layer.
    """
    scheme = layer.scheme
    if not isinstance(layer, BitLinear):
        raise ValueError(  # noqa: TRY004  a layer of the user's network
            f"a {type(layer).__name__} has no place in the format: {ELSEWHERE}"
        )
    if scheme.qmax > 1 or scheme.granularity != "tensor":
        raise ValueError(
            f"weights of {scheme.weight_bits:g} bits with a scale for each {scheme.granularity}: "
            "the format holds levels of -1, 0 and 1 (weight_bits of 1, 1.58 or 2) with one scale "
            f"for a tensor; {ELSEWHERE}"
        )
    if scheme.activation_bits == 4 or scheme.activation_granularity != "token":
        raise ValueError(
            f"activations of {scheme.activation_bits} bits per {scheme.activation_granularity}: "
            "no client rounds so; set activation_bits: 8 per token (or 16) before training, or "
            f"{ELSEWHERE}"
        )
    if layer.sub_norm is not None:
        raise ValueError(
            "a norm in front of a quantized layer (sub_norm) has no place in the format: use a "
            f"model that has such norms itself (llama_decoder), or {ELSEWHERE}"
        )


def check_layers(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Refuse, before anything is trained, a model that no client's format holds.

    Returns:
        Shapes (out, in) of the ternary weights by the layer's name.

    Raises:
        ValueError: it has no ternary layer, or one that cannot be held; the message names it.
    """
    result: dict[str, tuple[int, ...]] = {}
    for name, layer in need_grid_layers(model).items():
        try:
            check_layer(layer)
        except ValueError as error:
            raise ValueError(f"{name}: {error}" if name else str(error)) from error
        result[name] = tuple(layer.weight.shape)
    return result


def read_layer(layer: BitLayer) -> TernaryLayer:
    """Levels and scale of a layer, as it applies them in evaluation.

    Raises:
        ValueError: see `check_layer`; or the quantization is not complete yet.
    """
    check_layer(layer)
    check_finished(layer)
    weight = grid_weight(layer)
    factor = weight.factor.reshape(())
    scale = 1.0 / factor if weight.multiplied else factor
    return TernaryLayer(weight.levels, scale, layer.scheme.activation_bits)


def read_layers(model: nn.Module) -> dict[str, TernaryLayer]:
    """All ternary layers of a model, by name.

    Raises:
        ValueError: there is none, so the weights were never trained to be ternary, or one cannot
            be held; the message names it.
    """
    _ = check_layers(model)
    return {name: read_layer(layer) for name, layer in need_grid_layers(model).items()}
