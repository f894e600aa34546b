"""A product of two narrow matrices beside a linear layer that stays as it is (LoRA)."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from forge_plugins.mathematics.losses.deferred_logits import head_name
from forge_plugins.mathematics.networks.llama import Llama
from forge_plugins.mathematics.quantization.bit_conv1d import BitConv1D, is_conv1d
from forge_plugins.mathematics.quantization.bit_layer import BitLayer
from forge_plugins.mathematics.quantization.conversion import (
    convert_linears,
    packed_form,
    quantizes_online,
)
from forge_plugins.mathematics.quantization.fixed_linear import FixedLinear

NAME: Final = "lora"
"""Of the adapter among the modules of its layer."""


class LowRankAdapter(nn.Module):
    """`alpha / rank * B A dropout(x)`, added to what a layer gives for x.

    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685),
    section 4.1; A is drawn as `nn.Linear` draws, B begins at 0, so that the sum begins as the
    layer.

    Args:
        features: numbers that the layer takes and gives.
        rank: of the product.
        alpha: numerator of its factor.
        dropout: share of x that is left out while training.
        generator: of A, on the CPU; None: A is 0 until something is loaded.

    Attributes:
        A: shape (rank, in), fp32, since small updates are lost in half precision.
        B: shape (out, rank), fp32.
    """

    def __init__(
        self,
        features: tuple[int, int],
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        wide = torch.zeros(rank, features[0])
        if generator is not None:
            nn.init.kaiming_uniform_(wide, a=math.sqrt(5), generator=generator)
        self.A, self.B = nn.Parameter(wide), nn.Parameter(torch.zeros(features[1], rank))

    @property
    def factor(self) -> float:
        """Of the product."""
        return self.alpha / self.rank

    def forward(self, inputs: Tensor) -> Tensor:
        """Shape (..., in) to (..., out), in fp32 or in autocast's type."""
        values = functional.dropout(inputs.to(self.A.dtype), self.dropout, self.training)
        return functional.linear(functional.linear(values, self.A), self.B) * self.factor

    def product(self) -> Tensor:
        """What it adds to a weight of shape (out, in); fp32, no gradient."""
        return (self.B.detach() @ self.A.detach()) * self.factor

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"rank={self.rank}, alpha={self.alpha:g}, dropout={self.dropout:g}"


def _add(
    module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Tensor
) -> Tensor:
    """The hook of a layer with an adapter; it is told the layer, so that copies have theirs."""
    inputs = given[0] if given else named["input"]
    adapter = module._modules[NAME]
    assert adapter is not None
    result: Tensor = (output + adapter(inputs)).to(output.dtype)
    return result


def features_of(layer: nn.Module) -> tuple[int, int]:
    """Numbers that a linear layer takes and gives."""
    if is_conv1d(layer):
        rows, columns = layer._parameters["weight"].shape  # type: ignore[union-attr]
        return int(rows), int(columns)
    return int(layer.in_features), int(layer.out_features)  # type: ignore[arg-type]


def is_transposed(layer: nn.Module) -> bool:
    """Whether the layer's parameter has shape (in, out), as GPT-2's."""
    return is_conv1d(layer) or isinstance(layer, BitConv1D)


def set_beside(layer: nn.Module, adapter: LowRankAdapter) -> None:
    """Add what an adapter gives to what a layer gives; the layer's own parameters stay."""
    own = layer._parameters.get("weight")
    layer.add_module(NAME, adapter if own is None else adapter.to(own.device))
    layer.register_forward_hook(_add, with_kwargs=True)


def adapters(model: nn.Module) -> dict[str, LowRankAdapter]:
    """The adapters of a model by the names of their layers."""
    found = ((name, module._modules.get(NAME)) for name, module in model.named_modules())
    return {name: adapter for name, adapter in found if isinstance(adapter, LowRankAdapter)}


def differentiable(model: nn.Module) -> tuple[nn.Module, int]:
    """A model whose quantized layers of the transformers library are exchanged for ours.

    Theirs pass no gradient on to their input (packed), or compile themselves in each process; ours
    apply the same levels.

    Args:
        model: changed in place.

    Returns:
        The model, and how many layers were exchanged.
    """
    wanted = {
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if packed_form(module) or quantizes_online(module)
    }
    if not wanted:
        return model, 0
    model, layers = convert_linears(model, lambda name: name in wanted)
    return model, len(layers)


def chosen(
    model: nn.Module, patterns: Sequence[str] | None, full: Sequence[str] = ()
) -> dict[str, nn.Module]:
    """The linear layers that names stand for.

    Args:
        model: whose quantized layers are ours (see `differentiable`).
        patterns: glob patterns of module names; None: all linear layers but a language model's
            head, and those that are trained in full.
        full: names of modules that are.

    Raises:
        ValueError: a pattern names no module, none that is a linear layer (each is named), or one
            that is trained in full.
    """
    modules = dict(model.named_modules())
    linear = {name: module for name, module in modules.items() if takes_adapter(modules, name)}
    if patterns is None:
        head = head_name(model) or ("head" if isinstance(model, Llama) else None)
        inner = {
            name: module for name, module in linear.items()
            if name != head and not any(is_inside(name, other) for other in full)
        }  # fmt: skip
        if not inner:
            raise ValueError(f"{type(model).__name__} has no linear layer to set an adapter beside")
        return inner
    hits = {
        pattern: [name for name in modules if fnmatch.fnmatchcase(name, pattern)]
        for pattern in patterns
    }
    faults = [
        f"'{pattern}' (no layer has such a name)" if not names
        else f"'{pattern}' ({names[0]} is of type {type(modules[names[0]]).__name__})"
        for pattern, names in hits.items()
        if not any(name in linear for name in names)
    ]  # fmt: skip
    if faults:
        some = ", ".join(list(linear)[:4]) or "none"
        raise ValueError(
            f"no linear layer is named by {', '.join(faults)}; linear layers are such as {some}"
        )
    wanted = {name for names in hits.values() for name in names}
    both = [name for name in wanted & linear.keys() if any(is_inside(name, o) for o in full)]
    if both:
        raise ValueError(f"{both[0]} is trained in full (also), and needs no adapter")
    return {name: module for name, module in linear.items() if name in wanted}


def trained_in_full(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """The modules, outermost first, whose own parameters are trained beside the adapters.

    Args:
        model: whole.
        patterns: glob patterns of module names.

    Raises:
        ValueError: a pattern names no module with parameters; each is named.
    """
    found: dict[str, None] = {}
    empty = []
    for pattern in patterns:
        names = [
            name for name, module in model.named_modules()
            if fnmatch.fnmatchcase(name, pattern) and any(True for _ in module.parameters())
        ]  # fmt: skip
        if not names:
            empty.append(f"'{pattern}'")
        found |= dict.fromkeys(names)
    if empty:
        raise ValueError(f"no module with parameters is named by {', '.join(empty)}")
    return [name for name in found if not any(is_inside(name, o) for o in found if o != name)]


def is_inside(name: str, other: str) -> bool:
    """Whether a module is another or a part of it."""
    return name == other or not other or name.startswith(f"{other}.")


def takes_adapter(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Whether a module is a linear layer that adds up what stands beside it.

    Args:
        modules: of the whole model, by name.
        name: of the module.
    """
    module = modules[name]
    if not isinstance(module, nn.Linear | FixedLinear) and not is_conv1d(module):
        return False
    # nn.MultiheadAttention reads its output layer's weight past the layer
    parent = modules.get(name.rpartition(".")[0]) if name else None
    return not isinstance(parent, nn.MultiheadAttention)


def freeze_running_means(model: nn.Module, but: Sequence[str] = ()) -> None:
    """Let layers that write their running means while training read them instead.

    Args:
        model: whole.
        but: names of modules that are trained in full.
    """
    for name, module in model.named_modules():
        trained = any(is_inside(name, other) for other in but)
        if getattr(module, "track_running_stats", False) and not trained:
            module.register_forward_pre_hook(_in_evaluation)


def _in_evaluation(module: nn.Module, given: tuple[Any, ...]) -> None:
    del given
    module.training = False


def check_mergeable(model: nn.Module) -> None:
    """Refuse to add adapters to weights that cannot hold the sum.

    Raises:
        ValueError: a layer is on levels, or shares its weight with another; the message names it.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name in adapters(model):
        layer = model.get_submodule(name)
        quantized = isinstance(layer, BitLayer) and layer.scheme.quantizes_weight
        if quantized or isinstance(layer, FixedLinear):
            raise ValueError(
                f"{name} has its weight on few levels, and the sum of levels and an adapter is on "
                "none: keep the adapter apart (layout: adapter)"
            )
        shared = owners[id(layer._parameters["weight"])]
        if len(shared) > 1:
            raise ValueError(
                f"{shared[0]} and {shared[1]} are one weight, and only one of them has an adapter: "
                "keep the adapter apart (layout: adapter), or leave the layer out of the targets"
            )


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of the same model without adapters, which are added to the weights.

    The sums are computed in fp32 and rounded to each weight's dtype.

    Raises:
        ValueError: see `check_mergeable`.
    """
    check_mergeable(model)
    parts = adapters(model)
    state = {
        name: value for name, value in model.state_dict().items() if not is_of_adapter(name, parts)
    }
    for name, adapter in parts.items():
        key = f"{name}.weight" if name else "weight"
        weight = state[key]
        product = adapter.product()
        added = product.t() if is_transposed(model.get_submodule(name)) else product
        state[key] = (weight.float() + added).to(weight.dtype)
    return state


def is_of_adapter(name: str, layers: Mapping[str, Any]) -> bool:
    """Whether a tensor's name is that of an adapter's matrix."""
    layer, _, own = name.rpartition(f"{NAME}.")
    return own in {"A", "B"} and layer.removesuffix(".") in layers
