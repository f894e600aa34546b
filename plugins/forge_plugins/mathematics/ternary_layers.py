"""What exporters read of ternary layers: whole levels and one scale, from the latent weights.

The scale is never taken from weights that are ternary already: the mean of a ternary tensor is its
density times the level, so a second quantization would shrink it (by a third, for Gaussian
weights).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from forge_plugins.mathematics.bit_linear import BitLinear


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
        """The weight that the forward pass multiplies with, fp32, bit for bit."""
        return self.levels.float().div_(self.scale)


def read_layer(layer: BitLinear) -> TernaryLayer:
    """Levels and scale of a layer, as it applies them in evaluation.

    Raises:
        ValueError: the layer's levels or scales are others than the formats hold, the quantization
            is not complete yet, or a norm stands in front of the layer.
    """
    scheme = layer.scheme
    if scheme.weight_bits not in (1, 1.58) or scheme.granularity != "tensor":
        raise ValueError(
            f"weights of {scheme.weight_bits:g} bits with a scale for each {scheme.granularity}: "
            "the format holds 1 or 1.58 bits with one scale for a tensor; export with state_dict "
            "(weights: applied)"
        )
    if scheme.activation_bits == 4 or scheme.activation_granularity != "token":
        raise ValueError(
            f"activations of {scheme.activation_bits} bits per {scheme.activation_granularity}: "
            "no client rounds so; set activation_bits: 8 per token (or 16) before training"
        )
    if layer.blend != 1.0:
        raise ValueError(
            f"the warm-up has blended in {layer.blend:.0%} of the levels only: the weights are not "
            "ternary yet; train on, or shorten warmup_steps"
        )
    if layer.sub_norm is not None:
        raise ValueError(
            "a norm in front of a quantized layer (sub_norm) has no place in the format: use a "
            "model that has such norms itself (llama_decoder), or export with state_dict"
        )
    levels, scale = layer.levels()
    return TernaryLayer(levels.cpu(), scale.reshape(()).cpu(), scheme.activation_bits)


def ternary_layers(model: nn.Module) -> dict[str, BitLinear]:
    """The ternary layers of a model by name; a layer that stands in two places has both names."""
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, BitLinear)
    }


def read_layers(model: nn.Module) -> dict[str, TernaryLayer]:
    """All ternary layers of a model, by name.

    Raises:
        ValueError: there is none, so the weights were never trained to be ternary.
    """
    found = {name: read_layer(layer) for name, layer in ternary_layers(model).items()}
    if not found:
        raise ValueError(
            "the model has no ternary layer: its weights were never trained to be ternary and "
            "would not survive it; add a quantizer and train, or export with state_dict"
        )
    return found
