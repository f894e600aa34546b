"""Layers of a model exchanged for quantized ones, in place, with an account of each."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from forge_plugins.mathematics.bit_conv2d import BitConv2d
from forge_plugins.mathematics.bit_layer import BitLayer, Control
from forge_plugins.mathematics.bit_linear import BitLinear
from forge_plugins.mathematics.grid import continue_from, plain_weight, step_of, unpack_rows
from forge_plugins.mathematics.scheme import SKIPPED, Scheme
from forge_plugins.mathematics.shared_input import SharedInput

Origin = Literal["latent", "grid", "packed", "converted before"]


@dataclass(slots=True)
class ConversionReport:
    """What became of each layer that could have been quantized.

    Args:
        layers: the quantized layers by name.
        origins: where each one's weight came from: `latent` (full precision), `grid` (found on its
            levels, continued from there), `packed` (unpacked, continued), `converted before`.
        left: the others by name, with the reason.
    """

    layers: dict[str, BitLayer] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def to_data(self) -> dict[str, Any]:
        """Plain data."""
        weights = {id(layer.weight): layer.weight.numel() for layer in self.layers.values()}
        return {
            "converted": {
                name: {
                    "kind": type(layer).__name__,
                    "shape": list(layer.weight.shape),
                    "origin": self.origins[name],
                }
                for name, layer in self.layers.items()
            },
            "left": dict(self.left),
            "converted_weights": sum(weights.values()),
        }


def convert_model_to_bitnet(
    model: nn.Module,
    scheme: Scheme | None = None,
    *,
    control: Control | None = None,
    skip: Sequence[str] = SKIPPED,
    convolutions: bool = False,
    sub_norm: Sequence[str] = (),
) -> tuple[nn.Module, ConversionReport]:
    """Exchange `nn.Linear` (and `nn.Conv2d`) for quantized layers.

    Parameters stay the very same objects, so that ties, dtypes, devices and optimizers go on. A
    layer that is quantized already is taken over as it is: converting twice changes nothing. A
    weight that is found on its grid keeps, to the bit, the values that it had, and is trained on
    from there; so does a layer that the transformers library packed.

    Args:
        model: changed in place; a bare layer is exchanged as a whole.
        scheme: of the new layers.
        control: of the new layers.
        skip: names of layers that stay; `*` and `?` stand for any letters.
        convolutions: exchange `nn.Conv2d` too.
        sub_norm: names of layers that get an RMSNorm in front (SubLN, arXiv 2310.11453), such as
            those that write into the residual stream.

    Returns:
        The model (for a bare layer the new one), and the account.

    Raises:
        ValueError: the scheme does not fit a layer; the message names it.
    """
    scheme = scheme or Scheme()
    control = control or Control()
    report = ConversionReport()
    found: dict[int, BitLayer | None] = {}  # a module that stands in two places stays one
    owners = _owners(model)
    continued: set[int] = set()
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not _could_be(module):
            continue
        if id(module) not in found:
            reason = _reason_to_leave(model, name, module, skip, owners, convolutions=convolutions)
            if reason:
                report.left[name] = reason
                continue
            try:
                found[id(module)] = _exchanged(module, name, scheme, control, continued, report)
            except ValueError as error:
                raise ValueError(f"{name or type(module).__name__}: {error}") from error
        layer = found[id(module)]
        assert layer is not None
        report.layers[name] = layer
        report.origins.setdefault(name, "converted before")
        if name:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
        else:
            model = layer
    _add_norms(report, sub_norm)
    _share_inputs(report)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # its fast path would read the latent weights
    return model, report


def convert_linears(
    model: nn.Module, wanted: Callable[[str], bool], scheme: Scheme | None = None
) -> tuple[nn.Module, dict[str, BitLayer]]:
    """Exchange the linear layers whose names are wanted.

    Args:
        model: changed in place; a bare linear layer is exchanged as a whole.
        wanted: asked by the layer's name (`""` for a bare layer).
        scheme: of the new layers.

    Returns:
        The model, and its quantized layers by name.
    """
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if not wanted(name)]
    found, report = convert_model_to_bitnet(model, scheme, skip=[_literal(name) for name in names])
    return found, report.layers


def _literal(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _packed(module: nn.Module) -> Literal["", "inverted", "direct"]:
    """Whether a layer is one of the transformers library that holds levels and a scale."""
    scale, weight = getattr(module, "weight_scale", None), getattr(module, "weight", None)
    if not isinstance(scale, Tensor) or not isinstance(weight, Tensor):
        return ""
    if isinstance(module, nn.Linear):
        return "direct"
    return "inverted" if weight.dtype is torch.uint8 else ""


def _could_be(module: nn.Module) -> bool:
    linear = isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding | nn.MultiheadAttention)
    return linear or bool(_packed(module))


def _owners(model: nn.Module) -> dict[int, str]:
    """The embedding that a parameter belongs to, by the parameter's id."""
    return {
        id(module.weight): name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }


def _reason_to_leave(  # noqa: PLR0911  one reason each
    model: nn.Module,
    name: str,
    module: nn.Module,
    skip: Sequence[str],
    owners: dict[int, str],
    *,
    convolutions: bool,
) -> str:
    """Why a layer stays as it is; empty when it does not."""
    pattern = next((item for item in skip if fnmatch.fnmatchcase(name, item)), None)
    if pattern is not None:
        return f"named by skip ({pattern})"
    if isinstance(module, BitLayer) or _packed(module):
        return ""
    if isinstance(module, nn.Embedding):
        return "an embedding"
    if isinstance(module, nn.MultiheadAttention):
        return "nn.MultiheadAttention multiplies by parameters of its own, no layer to exchange"
    parent, _, child = name.rpartition(".")
    if name and isinstance(model.get_submodule(parent), nn.MultiheadAttention):
        return f"nn.MultiheadAttention reads {child}.weight past the layer"
    if id(module.weight) in owners:
        return f"shares its weight with the embedding {owners[id(module.weight)]}"
    if "weight" not in module._parameters:
        return "its weight is computed (parametrized), not a parameter"
    if isinstance(module.weight, nn.parameter.UninitializedParameter):
        return "its weight has no shape yet (lazy): call the model once first"
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    if any(hooks):
        return "it has hooks, which the new layer would lose"
    if isinstance(module, nn.Conv2d):
        if not convolutions:
            return "a convolution (set convolutions)"
        plain = type(module).forward is nn.Conv2d.forward
    else:
        plain = type(module).forward is nn.Linear.forward or _is_online(module)
    return "" if plain else f"{type(module).__name__} has a forward pass of its own"


def _is_online(module: nn.Module) -> bool:
    """A layer of the transformers library that quantizes a latent weight as we do."""
    return type(module).__name__ == "AutoBitLinear" and bool(getattr(module, "online_quant", False))


def _exchanged(
    module: nn.Module,
    name: str,
    scheme: Scheme,
    control: Control,
    continued: set[int],
    report: ConversionReport,
) -> BitLayer:
    if isinstance(module, BitLayer):
        report.origins[name] = "converted before"
        return module
    origin: Origin = "latent"
    if isinstance(module, nn.Conv2d):
        layer: BitLayer = BitConv2d.from_conv2d(module, scheme, control)
    else:
        packed = _packed(module)
        linear = _unpacked(module, inverted=packed == "inverted") if packed else module
        assert isinstance(linear, nn.Linear)
        layer = BitLinear.from_linear(linear, scheme, control)
        norm = getattr(module, "rms_norm", None)
        layer.sub_norm = norm if isinstance(norm, nn.Module) else None
        origin = "packed" if packed else "latent"
    weight = layer.weight
    if id(weight) in continued:
        layer.continued = True
        origin = "grid"
    elif scheme.quantizes_weight:
        step = step_of(weight, scheme)
        if step is not None and continue_from(layer, step):
            continued.add(id(weight))
            origin = origin if origin == "packed" else "grid"
    report.origins[name] = origin
    return layer


def _unpacked(module: nn.Module, *, inverted: bool) -> nn.Linear:
    """A plain linear layer with the weight that a packed one applies."""
    stored, scale, bias = module.weight, module.weight_scale, module.bias
    assert isinstance(stored, Tensor)
    assert isinstance(scale, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    levels = unpack_rows(stored) if stored.dtype is torch.uint8 else stored.detach()
    weight, told = plain_weight(levels, scale, bias, inverted=inverted)
    linear = nn.Linear(1, 1, bias=told is not None, device="meta")
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight)
    if told is not None:
        linear.bias = nn.Parameter(told.detach().clone())
    linear.train(module.training)
    return linear


def _add_norms(report: ConversionReport, patterns: Sequence[str]) -> None:
    for name, layer in report.layers.items():
        if layer.sub_norm is not None or not any(
            fnmatch.fnmatchcase(name, pattern) for pattern in patterns
        ):
            continue
        if not isinstance(layer, BitLinear):
            raise ValueError(  # noqa: TRY004  the user named it
                f"{name}: a norm can be set before a linear layer only"
            )
        weight = layer.weight
        layer.sub_norm = nn.RMSNorm(
            layer.in_features, eps=1e-6, device=weight.device, dtype=weight.dtype
        )


def _share_inputs(report: ConversionReport) -> None:
    """Layers of one parent with equally wide inputs may read the same tensor: they share a note.

    Whether they do is seen in each forward pass, by the identity of the tensor.
    """
    groups: dict[tuple[str, int, Scheme], list[BitLinear]] = {}
    for name, layer in report.layers.items():
        if isinstance(layer, BitLinear) and layer.sub_norm is None:
            key = (name.rpartition(".")[0], layer.in_features, layer.scheme)
            members = groups.setdefault(key, [])
            if layer not in members:
                members.append(layer)
    for members in groups.values():
        shared = next((layer.shared for layer in members if layer.shared is not None), None)
        if len(members) > 1:
            shared = shared or SharedInput()
            for layer in members:
                layer.shared = shared
