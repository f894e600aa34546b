"""What was done to a layer that an exchange for another layer would lose."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn

from forge_plugins.mathematics.quantization.bit_layer import BitLayer

_HARMLESS: Final = frozenset(
    {
        "__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__annotations__",
        "__annotate__", "__annotate_func__", "__annotations_cache__", "__firstlineno__",
        "__static_attributes__", "__parameters__", "__orig_bases__", "__constants__", "__init__",
        "reset_parameters", "extra_repr", "in_features", "out_features", "weight", "bias",
    }
)  # fmt: skip
"""What a subclass may have of its own without doing anything else than its base."""


def own_behaviour(cls: type, base: type) -> list[str]:
    """The names that a subclass defines, beside those that change nothing, in order of the text."""
    lines = cls.__mro__[: cls.__mro__.index(base)]
    return [name for item in lines for name in vars(item) if name not in _HARMLESS]


def replaced_calls(module: nn.Module) -> str:
    """Whether a layer is called otherwise than its class says; empty: it is not."""
    own = vars(module)
    if "forward" in own:
        return "its forward was replaced on the instance"
    if own.get("_compiled_call_impl") is not None:
        return "it was compiled by itself"
    hooks = sorted(name.strip("_") for name, value in own.items() if "hooks" in name and value)
    return f"it has hooks, which the new layer would lose ({', '.join(hooks)})" if hooks else ""


def lost_by_exchange(module: nn.Module, base: type[nn.Module], taken: type[BitLayer]) -> str:
    """Why a layer of a plain kind cannot be exchanged; empty: it can.

    Args:
        module: the layer.
        base: the plain kind that it is of: `nn.Linear`, `nn.Conv2d`, or `Conv1D` of transformers.
        taken: the kind that would take its place.

    Returns:
        A forward pass, calls, parameters, modules or behaviour of its own, by name. Buffers and
        attributes are no reason: the plain forward pass does not read them, and they are kept
        (`carry_over`), unless the new layer has a use of its own for the name.
    """
    cls = type(module)
    called, behaviour = replaced_calls(module), own_behaviour(cls, base)
    further = sorted(module._parameters.keys() - {"weight", "bias"})
    given = (*further_attributes(module, base), *module._buffers)
    used = [name for name in given if hasattr(taken, name) or name in BitLayer.__annotations__]
    reasons = (
        (cls.forward is not base.forward, f"{cls.__name__} has a forward pass of its own"),
        (called, called),
        (further, f"it has parameters of its own ({', '.join(further)})"),
        ("bias" not in module._parameters, "its bias is computed (parametrized), not a parameter"),
        (module._modules, f"it holds modules of its own ({', '.join(module._modules)})"),
        (behaviour, f"{cls.__name__} has {', '.join(behaviour[:3])} of its own"),
        (used, f"the new layer has another use for its {', '.join(used)}"),
    )
    return next((text for wrong, text in reasons if wrong), "")


def further_attributes(module: nn.Module, base: type[nn.Module]) -> dict[str, Any]:
    """What somebody set on a layer, beside what every layer of its kind has."""
    with torch.device("meta"):
        plain = base(1, 1, *([1] if base is nn.Conv2d else []))  # nothing done to it
    known = vars(plain).keys() | {"__annotations__"}
    return {name: value for name, value in vars(module).items() if name not in known}


def carry_over(module: nn.Module, base: type[nn.Module], layer: nn.Module) -> None:
    """Give a new layer the buffers and attributes that were set on the old one."""
    for name, value in module._buffers.items():
        kept = name not in module._non_persistent_buffers_set
        layer.register_buffer(name, value, persistent=kept)
    vars(layer).update(further_attributes(module, base))
