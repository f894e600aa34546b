"""Layers of a model exchanged for quantized ones, in place, with an account of each."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor, nn

from forge_plugins.mathematics.metrics.layer_changes import (
    carry_over,
    lost_by_exchange,
    replaced_calls,
)
from forge_plugins.mathematics.quantization.bit_conv1d import BitConv1D, is_conv1d
from forge_plugins.mathematics.quantization.bit_conv2d import BitConv2d
from forge_plugins.mathematics.quantization.bit_layer import BitLayer, QuantizationState, latent
from forge_plugins.mathematics.quantization.bit_linear import BitLinear
from forge_plugins.mathematics.quantization.resume_from_quantized import (
    continue_from,
    plain_weight,
    step_of,
    unpack_rows,
)
from forge_plugins.mathematics.quantization.scheme import OUTPUT_EMBEDDINGS, SKIPPED, Scheme
from forge_plugins.mathematics.quantization.shared_input import SharedInput

Origin = Literal["latent", "grid", "packed", "converted before"]
VECTORS: Final = "norms, biases and other vectors"


class Reason(NamedTuple):
    """Why weights stay as they are: the kind, for a count, and the whole reason."""

    kind: str
    text: str


@dataclass(slots=True)
class ConversionReport:
    """What became of each layer that could have been quantized, and of all other weights.

    Args:
        layers: the quantized layers by name.
        origins: where each one's weight came from: `latent` (full precision), `grid` (found on its
            levels, continued from there), `packed` (unpacked, continued), `converted before`.
        left: the others by name, with the reason: layers, and what else multiplies by matrices.
        left_weights: how many weights each of them has; one that is shared is told at each name.
        left_kinds: weights left by kind of reason, each counted once, the most first.
        weights: all weights of the model, each once.
    """

    layers: dict[str, BitLayer] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    left_weights: dict[str, int] = field(default_factory=dict)
    left_kinds: dict[str, int] = field(default_factory=dict)
    weights: int = 0

    @property
    def converted_weights(self) -> int:
        """Weights that have levels, each once."""
        return sum(
            {id(latent(item)): item.weight.numel() for item in self.layers.values()}.values()
        )

    def fraction(self, weights: int) -> float:
        """A number of weights as a fraction of all."""
        return weights / self.weights if self.weights else 0.0

    def summary(self) -> str:
        """One sentence: how many weights have levels, how many have not, and why."""
        done = self.converted_weights
        message = f"{done:,} of {self.weights:,} weights ({self.fraction(done):.1%}) are quantized"
        left = ", ".join(
            f"{count:,} ({self.fraction(count):.1%}) {kind}"
            for kind, count in self.left_kinds.items()
        )
        return f"{message}; left as they are: {left}" if left else message

    def to_data(self) -> dict[str, Any]:
        """Plain data."""
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
            "left_weights": dict(self.left_weights),
            "left_shares": {
                name: round(self.fraction(count), 6) for name, count in self.left_weights.items()
            },
            "left_kinds": dict(self.left_kinds),
            "converted_weights": self.converted_weights,
            "weights": self.weights,
        }


def convert_model_to_bitnet(
    model: nn.Module,
    scheme: Scheme | None = None,
    *,
    quantization: QuantizationState | None = None,
    skip: Sequence[str] = SKIPPED,
    convolutions: bool = False,
    sub_norm: Sequence[str] = (),
) -> tuple[nn.Module, ConversionReport]:
    """Exchange `nn.Linear`, `Conv1D` of transformers (and `nn.Conv2d`) for quantized layers.

    Parameters stay the very same objects, so that ties, dtypes, devices and optimizers go on. A
    layer that is quantized already is taken over as it is: converting twice changes nothing. A
    weight that is found on its grid keeps, to the bit, the values that it had, and is trained on
    from there; so does a layer that the transformers library packed.

    Args:
        model: changed in place; a bare layer is exchanged as a whole.
        scheme: of the new layers.
        quantization: of the new layers.
        skip: names of layers that stay; `*` and `?` stand for any letters, `output_embeddings`
            also for what the model's `get_output_embeddings()` gives.
        convolutions: exchange `nn.Conv2d` too.
        sub_norm: names of layers that get an RMSNorm in front (SubLN, arXiv 2310.11453), such as
            those that write into the residual stream.

    Returns:
        The model (for a bare layer the new one), and the account.

    Raises:
        ValueError: the scheme does not fit a layer; the message names it.
    """
    scheme = scheme or Scheme()
    quantization = quantization or QuantizationState()
    report = ConversionReport()
    result: dict[int, BitLayer | None] = {}  # a module that stands in two places stays one
    place = _Place(model, tuple(skip), convolutions)
    reasons: dict[str, Reason] = {}
    continued: set[int] = set()
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not _could_be(module):
            continue
        if id(module) not in result:
            reason = _reason_to_leave(place, name, module)
            if reason:
                reasons[name] = reason
                continue
            try:
                result[id(module)] = _exchanged(
                    module, name, scheme, quantization, continued, report
                )
            except ValueError as error:
                raise ValueError(f"{name or type(module).__name__}: {error}") from error
        layer = result[id(module)]
        assert layer is not None
        report.layers[name] = layer
        report.origins.setdefault(name, "converted before")
        if name:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
        else:
            model = layer
    _account(report, model, reasons)
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
    result, report = convert_model_to_bitnet(model, scheme, skip=[_literal(name) for name in names])
    return result, report.layers


def _literal(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def packed_form(module: nn.Module) -> Literal["", "inverted", "direct"]:
    """Whether a layer is one of the transformers library that holds levels and a scale."""
    scale, weight = getattr(module, "weight_scale", None), getattr(module, "weight", None)
    if not isinstance(scale, Tensor) or not isinstance(weight, Tensor):
        return ""
    if isinstance(module, nn.Linear):
        return "direct"
    return "inverted" if weight.dtype is torch.uint8 else ""


def _could_be(module: nn.Module) -> bool:
    kinds = nn.Linear | nn.Conv2d | nn.Embedding | nn.EmbeddingBag | nn.MultiheadAttention
    return isinstance(module, kinds) or is_conv1d(module) or bool(packed_form(module))


class _Place:
    """What a layer's surroundings say about whether it is exchanged.

    Args:
        model: the whole.
        skip: names of layers that stay.
        convolutions: whether `nn.Conv2d` is exchanged.
    """

    def __init__(self, model: nn.Module, skip: tuple[str, ...], convolutions: bool) -> None:
        self.model = model
        self.skip = skip
        self.convolutions = convolutions
        self.embeddings = {
            id(module.weight): name
            for name, module in model.named_modules()
            if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        }
        self.outputs = _output_layers(model) if OUTPUT_EMBEDDINGS in skip else {}


def _output_layers(model: nn.Module) -> dict[int, str]:
    """What modules say makes their outputs (`get_output_embeddings`), with who says it."""
    result: dict[int, str] = {}
    for module in model.modules():
        give = getattr(module, "get_output_embeddings", None)
        try:
            layer = give() if callable(give) else None
        except (AttributeError, NotImplementedError, TypeError):
            continue  # the transformers library has models that raise for "none"
        if isinstance(layer, nn.Module):
            result[id(layer)] = type(module).__name__
    return result


def _reason_to_leave(place: _Place, name: str, module: nn.Module) -> Reason | None:
    """Why a layer stays as it is; None when it does not."""
    pattern = next((item for item in place.skip if fnmatch.fnmatchcase(name, item)), None)
    if pattern is not None:
        return Reason("named by skip", f"named by skip ({pattern})")
    if id(module) in place.outputs:
        message = f"what {place.outputs[id(module)]}.get_output_embeddings() gives"
        return Reason("named by skip", f"named by skip ({OUTPUT_EMBEDDINGS}): {message}")
    if isinstance(module, BitLayer):
        return None
    if packed_form(module):
        changed = replaced_calls(module)
        return Reason("in changed layers", changed) if changed else None
    return _reason_of_kind(place, name, module) or _reason_of_change(module)


def _reason_of_kind(place: _Place, name: str, module: nn.Module) -> Reason | None:
    """Why a layer stays that is of a kind, or in a place, that is not exchanged."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return Reason("in embeddings", "an embedding")
    if isinstance(module, nn.MultiheadAttention):
        text = "nn.MultiheadAttention multiplies by parameters of its own, no layer to exchange"
        return Reason("in nn.MultiheadAttention", text)
    parent, _, child = name.rpartition(".")
    if name and isinstance(place.model.get_submodule(parent), nn.MultiheadAttention):
        text = f"nn.MultiheadAttention reads {child}.weight past the layer"
        return Reason("in nn.MultiheadAttention", text)
    if id(module.weight) in place.embeddings:
        text = f"shares its weight with the embedding {place.embeddings[id(module.weight)]}"
        return Reason("in embeddings", text)
    if isinstance(module, nn.Conv2d) and not place.convolutions:
        return Reason("in convolutions", "a convolution (set convolutions)")
    return None


def _reason_of_change(module: nn.Module) -> Reason | None:
    """Why a layer stays to which something was done that its exchange would lose."""
    weight = module._parameters.get("weight")
    if weight is None:
        return Reason("in changed layers", "its weight is computed (parametrized), not a parameter")
    if isinstance(weight, nn.parameter.UninitializedParameter):
        text = "its weight has no shape yet (lazy): call the model once first"
        return Reason("in lazy layers", text)
    if type(weight.data) is not Tensor or weight.dtype not in _TRAINED:
        text = f"its weight is a {type(weight).__name__} of {weight.dtype}"
        return Reason("in changed layers", text)
    if quantizes_online(module):
        changed = replaced_calls(module)
    elif is_conv1d(module):
        changed = lost_by_exchange(module, type(module), BitConv1D)
    elif isinstance(module, nn.Conv2d):
        changed = lost_by_exchange(module, nn.Conv2d, BitConv2d)
    else:
        changed = lost_by_exchange(module, nn.Linear, BitLinear)
    return Reason("in changed layers", changed) if changed else None


_TRAINED: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _other_reason(module: nn.Module, names: Sequence[str]) -> Reason:
    """Why matrices stay that belong to no layer of a kind that is exchanged."""
    kind = type(module).__name__
    if isinstance(module, nn.modules.conv._ConvNd):
        return Reason("in convolutions", f"a {kind}: of convolutions nn.Conv2d is quantized")
    text = f"{kind} holds parameters of its own ({', '.join(names)}), no layer to exchange"
    return Reason(f"in {kind}", text)


def _account(report: ConversionReport, model: nn.Module, reasons: dict[str, Reason]) -> None:
    """Count all weights of a model, and name whatever is not quantized."""
    modules = dict(model.named_modules(remove_duplicate=False))
    named = list(model.named_parameters(remove_duplicate=False))
    sizes = {
        name: 0 if isinstance(one, nn.parameter.UninitializedParameter) else one.numel()
        for name, one in named
    }
    done = {id(latent(layer)) for layer in report.layers.values()}
    named_modules = reasons.keys() | report.layers.keys()
    loose: dict[str, list[str]] = {}  # matrices that no layer has, by module
    owners: dict[str, str | None] = {}
    for name, one in named:
        owner = _owner(name, named_modules)
        if owner is None and one.dim() > 1 and id(one) not in done:
            owner = name.rpartition(".")[0]
            loose.setdefault(owner, []).append(name.rpartition(".")[2])
        owners[name] = owner
    reasons |= {owner: _other_reason(modules[owner], own) for owner, own in loose.items()}
    for name, owner in owners.items():  # a bias goes with the matrices of its module
        direct = name.rpartition(".")[0]
        if owner is None and direct in loose:
            owners[name] = direct
    counted: set[int] = set(done)
    kinds: dict[str, int] = {}
    counts = dict.fromkeys(reasons, 0)
    for name, one in named:
        owner = owners[name] or ""
        reason = reasons.get(owner) if owners[name] is not None else None
        if reason is not None:
            counts[owner] += sizes[name]
        if id(one) not in counted:
            counted.add(id(one))
            kind = VECTORS if reason is None else reason.kind
            kinds[kind] = kinds.get(kind, 0) + sizes[name]
    report.left = {name: reason.text for name, reason in reasons.items()}
    report.left_weights = counts
    report.left_kinds = dict(sorted(kinds.items(), key=lambda item: -item[1]))
    report.weights = report.converted_weights + sum(kinds.values())


def _owner(parameter: str, modules: Collection[str]) -> str | None:
    """The innermost of some modules that a parameter belongs to, by their names."""
    place = parameter
    while place:
        place = place.rpartition(".")[0]
        if place in modules:
            return place
    return None


def quantizes_online(module: nn.Module) -> bool:
    """A layer of the transformers library that quantizes a latent weight as we do."""
    return type(module).__name__ == "AutoBitLinear" and bool(getattr(module, "online_quant", False))


def _exchanged(
    module: nn.Module,
    name: str,
    scheme: Scheme,
    quantization: QuantizationState,
    continued: set[int],
    report: ConversionReport,
) -> BitLayer:
    if isinstance(module, BitLayer):
        report.origins[name] = "converted before"
        return module
    origin: Origin = "latent"
    if isinstance(module, nn.Conv2d):
        layer: BitLayer = BitConv2d.from_conv2d(module, scheme, quantization)
        carry_over(module, nn.Conv2d, layer)
    elif is_conv1d(module):
        layer = BitConv1D.from_conv1d(module, scheme, quantization)
        carry_over(module, type(module), layer)
    else:
        packed = packed_form(module)
        linear = unpacked_linear(module, inverted=packed == "inverted") if packed else module
        assert isinstance(linear, nn.Linear)
        layer = BitLinear.from_linear(linear, scheme, quantization)
        norm = getattr(module, "rms_norm", None)
        layer.sub_norm = norm if isinstance(norm, nn.Module) else None
        if not packed and not quantizes_online(module):
            carry_over(module, nn.Linear, layer)
        origin = "packed" if packed else "latent"
    weight = layer.weight
    if id(latent(layer)) in continued:
        layer.continued = True
        origin = "grid"
    elif scheme.quantizes_weight:
        step = step_of(weight, scheme)
        if step is not None and continue_from(layer, step):
            continued.add(id(latent(layer)))
            origin = origin if origin == "packed" else "grid"
    report.origins[name] = origin
    return layer


def unpacked_linear(module: nn.Module, *, inverted: bool) -> nn.Linear:
    """A plain linear layer with the weight that a packed one applies."""
    stored, scale, bias = module.weight, module.weight_scale, module.bias
    assert isinstance(stored, Tensor)
    assert isinstance(scale, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    levels = unpack_rows(stored) if stored.dtype is torch.uint8 else stored.detach()
    weight, plain_bias = plain_weight(levels, scale, bias, inverted=inverted)
    linear = nn.Linear(1, 1, bias=plain_bias is not None, device="meta")
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight)
    if plain_bias is not None:
        linear.bias = nn.Parameter(plain_bias.detach().clone())
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
