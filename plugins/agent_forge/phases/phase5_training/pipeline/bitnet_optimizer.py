"""BitNet for programs with a training loop of their own: settings, layers, optimizer, loss."""

from __future__ import annotations

import enum
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final

import torch
from msgspec import Meta
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from agent_forge.phases.phase5_training.configuration import Configuration, SettingError
from forge_plugins.mathematics.optimizers import bitnet_optimizer
from forge_plugins.mathematics.quantization import conversion, quantizers
from forge_plugins.mathematics.quantization import warmup as blending
from forge_plugins.mathematics.quantization.bit_layer import BitLayer, QuantizationState
from forge_plugins.mathematics.quantization.bit_linear import BitLinear
from forge_plugins.mathematics.quantization.quantization_distance import quantization_distance
from forge_plugins.mathematics.quantization.scheme import SKIPPED, Scheme

LONGEST_WARMUP: Final = 0.5
"""Share of a run that warm-up and ramp take at most, so that a short run ends quantized too."""

_LAYERS: Final[Any] = WeakTensorKeyDictionary()
"""The layer that a converted weight belongs to, so that an optimizer of the weights finds it."""

_Count = Annotated[int, Meta(ge=0)]


class QuantizationMode(enum.Enum):
    """How a latent weight finds its level."""

    DETERMINISTIC = "deterministic"
    STOCHASTIC = "stochastic"
    LEARNED_THRESHOLD = "learned_threshold"


class BitNetConfig(Configuration):
    """What is quantized, how training gets there, and what the optimizer is told.

    - `quantization_mode`: to the nearest level; at random with the latent weight as the mean while
      training; or with a learned border (`learnable_threshold` means the same), which moves
      `threshold_lr_multiplier` times faster than the weights;
    - `weight_bits`: 1, 1.58 (or "ternary"), 2, 4, 8; 16 and 32: as they are. `activation_bits`: 4,
      8; 16 and 32: as they are;
    - `straight_through_estimator` false: quantized weights get no gradient;
    - `quantization_warmup_steps`: levels are blended in over these steps, at most half of a run of
      known length; `full_precision_warmup` false: quantized from the first step. A
      `BitNetOptimizer` that does not know the run's length has only a warm-up that was set;
    - `adaptive_gradient_scaling`: a tensor's gradient is held to `10 * gradient_scale_factor`
      times its own usual size;
    - `target_sparsity` (also `sparsity_target`): least share of zeros in each applied weight,
      reached over `sparsity_warmup_steps`;
    - `learning_rate`, `momentum` (decay of the first average), `eps` and `weight_decay` are the
      optimizer's.
    """

    aliases: ClassVar[Mapping[str, str]] = {"sparsity_target": "target_sparsity"}
    without_meaning: ClassVar[Mapping[str, str]] = {
        "gradient_bits": "gradients stay in the precision of training: no published 1-bit recipe "
        "quantizes them",
    }

    quantization_mode: QuantizationMode = QuantizationMode.DETERMINISTIC
    weight_bits: float | str = 1
    activation_bits: int = 8
    gradient_bits: int = 8
    learning_rate: Annotated[float, Meta(ge=0)] = 1e-3
    weight_decay: Annotated[float, Meta(ge=0)] = 1e-4
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.9
    eps: Annotated[float, Meta(gt=0)] = 1e-8
    straight_through_estimator: bool = True
    quantization_warmup_steps: _Count = 1000
    full_precision_warmup: bool = True
    learnable_threshold: bool = False
    threshold_lr_multiplier: Annotated[float, Meta(gt=0)] = 10.0
    gradient_scale_factor: Annotated[float, Meta(ge=0.1)] = 1.0
    adaptive_gradient_scaling: bool = True
    target_sparsity: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    sparsity_warmup_steps: _Count = 5000

    @property
    def bits(self) -> float:
        """`weight_bits` as a number.

        Raises:
            SettingError: another word than "ternary" or "binary".
        """
        named = {"ternary": 1.58, "binary": 1.0}
        if isinstance(self.weight_bits, str):
            if self.weight_bits not in named:
                raise SettingError(
                    f"BitNetConfig.weight_bits '{self.weight_bits}': a number, or one of "
                    f"{sorted(named)}"
                )
            return named[self.weight_bits]
        return float(self.weight_bits)

    @property
    def rounding(self) -> str:
        """The quantizer's word for mode and threshold.

        Raises:
            SettingError: a learned threshold and random rounding exclude each other.
        """
        if self.learnable_threshold:
            if self.quantization_mode is QuantizationMode.STOCHASTIC:
                raise SettingError(
                    "BitNetConfig.learnable_threshold: stochastic rounding has no border to learn; "
                    "choose one of them"
                )
            return QuantizationMode.LEARNED_THRESHOLD.value
        return self.quantization_mode.value

    @property
    def warmup_steps(self) -> int:
        """Steps of the blend; 0 without a full-precision warm-up, or without anything to blend."""
        quantizes = self.bits < 16 or self.activation_bits < 16
        return self.quantization_warmup_steps if self.full_precision_warmup and quantizes else 0

    @property
    def gradient_limit(self) -> float | None:
        """Times the usual size that a tensor's gradient may have; None: not scaled.

        Raises:
            SettingError: a factor of a scaling that is off.
        """
        if self.adaptive_gradient_scaling:
            return 10.0 * self.gradient_scale_factor
        if self.gradient_scale_factor != 1.0:
            raise SettingError(
                "BitNetConfig.gradient_scale_factor is read by adaptive_gradient_scaling, which is "
                "off (a constant factor cancels in Adam's division by the gradient's own size)"
            )
        return None

    def plugin_settings(self) -> dict[str, Any]:
        """Settings of the kernel's quantizer `bitnet`.

        Raises:
            SettingError: settings that cannot work together.
        """
        settings: dict[str, Any] = {
            "weight_bits": self.bits,
            "activation_bits": self.activation_bits,
            "rounding": self.rounding,
            "ste": "identity" if self.straight_through_estimator else "none",
            "warmup_steps": self.warmup_steps,
            "warmup_fraction": LONGEST_WARMUP,
        }
        if self.rounding == QuantizationMode.LEARNED_THRESHOLD.value:
            settings["threshold_rate"] = self.threshold_lr_multiplier
        if self.target_sparsity:
            settings["target_sparsity"] = self.target_sparsity
            settings["sparsity_warmup_steps"] = self.sparsity_warmup_steps
        return settings

    def scheme(self) -> Scheme:
        """What the layers apply.

        Raises:
            SettingError: settings that cannot work together.
        """
        try:
            return Scheme(
                weight_bits=self.bits,
                activation_bits=self.activation_bits,
                rounding=self.rounding,  # type: ignore[arg-type]
                ste="identity" if self.straight_through_estimator else "none",
                threshold_rate=self.threshold_lr_multiplier,
            )
        except ValueError as error:
            raise SettingError(f"BitNetConfig: {error}") from error

    def check(self) -> None:
        """Also what the settings mean together."""
        super().check()
        self.scheme()
        _ = self.gradient_limit
        if self.rounding != QuantizationMode.LEARNED_THRESHOLD.value:
            self.refuse("threshold_lr_multiplier", "no border is learned (learnable_threshold)")
        if not self.target_sparsity:
            self.refuse("sparsity_warmup_steps", "there is no target_sparsity to rise to")


class StraightThroughEstimator(quantizers._Applied):
    """`apply(latent, quantized)` is the latter, with its gradient given to the former."""


class BitNetLayer(BitLinear):
    """A linear layer that is quantized from its first step; its latent weight is `weight`."""

    def __init__(
        self, in_features: int, out_features: int, config: BitNetConfig | None = None,
        bias: bool = True,
    ) -> None:  # fmt: skip
        config = config or BitNetConfig()
        super().__init__(in_features, out_features, bias, scheme=config.scheme())
        _know([self])


class BitNetQuantizer(nn.Module):
    """Weights of one shape to the weights that are applied, with the estimator's gradient.

    Args:
        config: what is applied.
        shape: (out, in).
    """

    def __init__(self, config: BitNetConfig, shape: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        self.shape = torch.Size(shape)
        self._layer = BitLinear(self.shape[1], self.shape[0], bias=False, scheme=config.scheme())
        self._layer.register_parameter("weight", None)

    def forward(self, weight: Tensor) -> Tensor:
        """Shape (out, in), the same dtype.

        Raises:
            ValueError: a weight of another shape.
        """
        if weight.shape != self.shape:
            raise ValueError(f"a weight of shape {tuple(weight.shape)} for {tuple(self.shape)}")
        self._layer._parameters.pop("weight", None)
        object.__setattr__(self._layer, "weight", weight)
        return self._layer.estimated_weight()


class BitNetOptimizer(bitnet_optimizer.BitNetOptimizer):
    """AdamW with the settings' rate, decay and averages, which leads warm-up and sparsity.

    It knows the layers whose weights it is given when `convert_model_to_bitnet` (or `BitNetLayer`)
    of this module made them.

    Args:
        params: as of any torch optimizer.
        config: settings; read once.
        lr, betas, eps, weight_decay: instead of the settings'.
        amsgrad: keep the largest second average.
        total_steps: of the run, when known: warm-up and ramp take half of it at most. Without it
            `quantization_warmup_steps` and `sparsity_warmup_steps` are as long as they were set;
            those that were not set are 0, since a run that ends within a warm-up that nobody asked
            for would not be quantized, and nobody would know.

    Raises:
        SettingError: settings that cannot work together.
    """

    def __init__(
        self,
        params: Iterable[Any],
        config: BitNetConfig | None = None,
        lr: float | None = None,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        weight_decay: float | None = None,
        amsgrad: bool = False,
        *,
        total_steps: int | None = None,
    ) -> None:
        config = config or BitNetConfig()
        config.check()
        given = list(params)
        lengths = {"quantization_warmup_steps": config.warmup_steps,
                   "sparsity_warmup_steps": config.sparsity_warmup_steps}  # fmt: skip
        warmup, ramp = (
            (steps if config.given(name) else 0)
            if total_steps is None
            else blending.fitting(steps, total_steps, LONGEST_WARMUP)
            for name, steps in lengths.items()
        )
        super().__init__(
            given,
            lr=config.learning_rate if lr is None else lr,
            betas=(config.momentum, 0.999) if betas is None else betas,
            eps=config.eps if eps is None else eps,
            weight_decay=config.weight_decay if weight_decay is None else weight_decay,
            amsgrad=amsgrad,
            layers=_known(given),
            warmup_steps=warmup,
            sparsity=config.target_sparsity,
            sparsity_steps=ramp,
            scale_limit=config.gradient_limit,
        )


class BitNetLossFunction:
    """A loss, plus `weight` times the distance of the latent weights from their levels.

    Args:
        config: of the layers; with weights of full precision there is no distance.
        base: `base(predictions, targets)`.
        weight: of the distance (mean square in steps between levels).
    """

    def __init__(
        self, config: BitNetConfig, base: Callable[[Any, Any], Tensor], weight: float = 0.01
    ) -> None:
        self.config, self.base, self.weight = config, base, weight

    def __call__(self, predictions: Any, targets: Any, model: nn.Module | None = None) -> Tensor:
        """The base alone when no model is given."""
        loss = self.base(predictions, targets)
        if model is None or self.config.bits >= 16:
            return loss
        return loss + self.weight * mean_quantization_distance(model)


def mean_quantization_distance(model: nn.Module) -> Tensor:
    """Mean over all quantized weights of their squared distance from their levels, in steps.

    Raises:
        ValueError: the model has no quantized weight.
    """
    result = [item for item in model.modules() if isinstance(item, BitLayer)]
    layers = {id(item.weight): item for item in result if item.scheme.quantizes_weight}.values()
    if not layers:
        raise ValueError(
            "the model has no quantized layer: call convert_model_to_bitnet(model, config) first"
        )
    distances = torch.stack([quantization_distance(layer) for layer in layers])
    return distances.sum() / sum(layer.weight.numel() for layer in layers)


def convert_model_to_bitnet(
    model: nn.Module,
    config: BitNetConfig | None = None,
    *,
    skip: Sequence[str] = SKIPPED,
) -> nn.Module:
    """Exchange the linear layers for quantized ones, in place; weights, ties and devices stay.

    Args:
        model: changed in place; a bare linear layer is exchanged as a whole. Layers that are
            quantized already are taken over as they are, never twice.
        config: what the new layers apply; quantized at once (see `BitNetOptimizer` for a warm-up).
        skip: names of layers that stay, with `*` and `?`.

    Returns:
        The model, or the new layer.

    Raises:
        SettingError: settings that cannot work together, or do not fit a layer.
    """
    config = config or BitNetConfig()
    config.check()
    quantization = QuantizationState(sparsity=config.target_sparsity)
    try:
        converted, report = conversion.convert_model_to_bitnet(
            model, config.scheme(), quantization=quantization, skip=skip
        )
    except ValueError as error:
        raise SettingError(f"convert_model_to_bitnet: {error}") from error
    _know(report.layers.values())
    return converted


def _know(layers: Iterable[BitLayer]) -> None:
    for layer in layers:
        for parameter in layer.parameters(recurse=False):
            _LAYERS[parameter] = weakref.ref(layer)  # the layer holds the weight: no ring


def _known(params: Iterable[Any]) -> list[BitLayer]:
    """The layers of the parameters, of named ones and of groups."""
    result: list[BitLayer] = []
    for item in params:
        members = item["params"] if isinstance(item, Mapping) else [item]
        members = [members] if isinstance(members, Tensor) else list(members)
        tensors = [member[1] if isinstance(member, tuple) else member for member in members]
        layers = [_LAYERS[tensor]() for tensor in tensors if tensor in _LAYERS]
        result += [layer for layer in layers if layer is not None]
    return result
