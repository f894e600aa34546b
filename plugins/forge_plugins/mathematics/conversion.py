"""Linear layers of a model exchanged for quantized ones, in place."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from forge_plugins.mathematics.bit_linear import BitLinear


def convert_linears(
    model: nn.Module, wanted: Callable[[str], bool], *, activation_bits: int = 8
) -> tuple[nn.Module, dict[str, BitLinear]]:
    """Exchange `nn.Linear` for `BitLinear`; parameters, ties, dtype and device stay.

    A layer that is one already is taken over as it is, so converting twice changes nothing.

    Args:
        model: changed in place; a bare linear layer is exchanged as a whole.
        wanted: asked by the layer's name (`""` for a bare layer).
        activation_bits: of the new layers.

    Returns:
        The model, and its quantized layers by name.
    """
    if isinstance(model, nn.Linear):
        if not wanted(""):
            return model, {}
        layer = (
            model
            if isinstance(model, BitLinear)
            else BitLinear.from_linear(model, activation_bits=activation_bits)
        )
        return layer, {"": layer}
    layers: dict[str, BitLinear] = {}
    exchanged: dict[int, BitLinear] = {}  # a module that stands in two places stays one
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, nn.Linear) or not wanted(name):
            continue
        found = exchanged.get(id(module))
        if found is None:
            found = (
                module
                if isinstance(module, BitLinear)
                else BitLinear.from_linear(module, activation_bits=activation_bits)
            )
            exchanged[id(module)] = found
        parent_name, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent_name), child, found)
        layers[name] = found
    return model, layers
