"""What quantized layers have in common: the latent weight, its levels, and what is kept of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from forge_plugins.mathematics.quantization import quantizers
from forge_plugins.mathematics.quantization.device_kernels import kernels
from forge_plugins.mathematics.quantization.scheme import Scheme
from forge_plugins.mathematics.quantization.shared_input import SharedInput
from forge_plugins.mathematics.quantization.weight_cache import (
    Evidence,
    Quantized,
    QuantizedWeightCache,
)


@dataclass(slots=True)
class QuantizationState:
    """What changes for all layers of a model while it trains; who converts a model holds it.

    Args:
        warmup_lambda: share of the quantized values in what is applied, 1 after the warm-up.
        sparsity: smallest fraction of exact zeros in each applied weight.
        steps: optimizer steps done with `warmup_lambda` at 1; 0 means that the layers were never
            trained on their levels.
        seed: of stochastic rounding until the next update, so that a layer that is computed twice
            (activation checkpointing) rounds alike; None: torch's stream goes on.
    """

    warmup_lambda: float = 1.0
    sparsity: float = 0.0
    steps: int = 0
    seed: int | None = None


class BitLayer(nn.Module):
    """Base of `BitLinear` and `BitConv2d`: a latent full-precision weight as a plain parameter.

    In training the layer keeps nothing by itself. Who knows when weights change (the quantizer
    plugin) may set `weight_cache.enabled` to let it hold the quantized weight from one forward pass
    to the next, and must then call `invalidate` whenever the weight has changed: torch's fused
    optimizers do not raise the version counter that a guess could go by. In evaluation without
    gradients it keeps the quantized weight as long as nothing speaks against it.

    Attributes:
        scheme: what the layer applies.
        quantization: warm-up and sparsity, shared by the layers of a model.
        layer_index: among the layers of a model: each one rounds by a seed of its own.
        continued: the weight was found on its grid and goes on from there (no warm-up).
        threshold: the learned border between levels as a parameter (0-d, 0 is rounding), or None.
            The border lies `scheme.threshold_rate` times its value away from that of rounding, so
            that it moves as many times faster than the weights under any optimizer.
        reference_scale: shape (2, *scale); for a continued weight whose file's step cannot be got
            from the latent weight bit for bit: that step, and the measure that stands for it.
        sub_norm: a norm in front of the layer (SubLN), or None.
    """

    follows: ClassVar[tuple[str, ...]] = ("quantization",)
    """What an averaged copy of the layer must share with it: warm-up and sparsity go on."""
    transposed: ClassVar[bool] = False
    """Whether the parameter has shape (in, out), and `weight` is a view of it."""

    weight: Tensor
    scheme: Scheme
    quantization: QuantizationState
    layer_index: int
    continued: bool
    weight_cache: QuantizedWeightCache
    shared: SharedInput | None
    threshold: nn.Parameter | None
    reference_scale: Tensor | None
    sub_norm: nn.Module | None

    def configure(self, scheme: Scheme, quantization: QuantizationState | None = None) -> None:
        """Take up a scheme; the weight and bias are there already.

        Raises:
            ValueError: the scheme's groups do not divide the rows.
        """
        if scheme.quantizes_weight:
            quantizers.arranged(self.weight.detach(), scheme)
        self.scheme = scheme
        self.quantization = quantization or QuantizationState()
        self.continued = False
        self.layer_index = 0
        self.weight_cache = QuantizedWeightCache()
        self.shared = None
        learned = scheme.rounding == "learned_threshold"
        border = self.weight.new_zeros((), dtype=torch.float32) if learned else None
        self.register_parameter("threshold", None if border is None else nn.Parameter(border))
        self.register_buffer("reference_scale", None)
        self.sub_norm = None

    # -- levels -------------------------------------------------------------------------------

    def scale(self) -> Tensor:
        """Levels in 1, fp32: 0-d, (out, 1) or (out, groups, 1)."""
        if self.reference_scale is None:
            return quantizers.weight_scale(self.weight, self.scheme)
        return 1.0 / self._continued_step(self.reference_scale)

    def step(self) -> Tensor | None:
        """With a reference scale: what a level is multiplied with, shaped as the scale; else None.

        Its inverse is the scale but for a rounding, which would not give the weight bit for bit.
        """
        if self.reference_scale is None:
            return None
        with torch.no_grad():
            return self._continued_step(self.reference_scale)

    def _continued_step(self, reference_scale: Tensor) -> Tensor:
        # the ratio is exactly 1 while the weight is the one that it began with
        measure = quantizers.unclamped_measure(self.weight, self.scheme)
        return (reference_scale[0] * (measure / reference_scale[1])).clamp_(min=SMALLEST_STEP)

    def _border(self) -> Tensor | None:
        if self.threshold is None:
            return None
        base = 0.0 if self.scheme.weight_bits == 1 else 0.5
        return base + self.scheme.threshold_rate * self.threshold

    def _rounded(self, *, draw: bool) -> tuple[Tensor, Tensor]:
        """Levels (fp32, arranged) and scale."""
        scheme, scale = self.scheme, self.scale()
        values = quantizers.in_levels(self.weight, scale, scheme)
        sparsity = self.quantization.sparsity
        zeros = quantizers.smallest(values, sparsity) if sparsity else None
        if draw:
            seed = self.quantization.seed
            own = None if seed is None else seed + self.layer_index
            levels = quantizers.drawn_levels(values, scheme, own)
        else:
            levels = quantizers.nearest_levels(values, scheme, self._border())
        return (levels if zeros is None else levels.masked_fill_(zeros, 0.0)), scale

    def levels(self) -> tuple[Tensor, Tensor]:
        """The weight as whole numbers, as it is applied in evaluation.

        Returns:
            Levels (int8) and the scale `s` (fp32) with `applied = levels / s`, whatever the
            warm-up's state: per tensor the weight's shape and 0-d; per row the weight's shape and
            (out, 1, ...); per group (out, groups, group_size) and (out, groups, 1).

        Raises:
            ValueError: the layer's weight is not quantized.
        """
        if not self.scheme.quantizes_weight:
            raise ValueError(f"a weight of {self.scheme.weight_bits:g} bits has no levels")
        with torch.no_grad():
            levels, scale = self._rounded(draw=False)
            if self.scheme.granularity == "group":
                return levels.to(torch.int8), scale
            if self.scheme.granularity == "row":
                scale = scale.view(-1, *[1] * (self.weight.dim() - 1))
            return levels.to(torch.int8).view(self.weight.shape), scale

    def applied_weight(self) -> Tensor:
        """The weight that the forward pass multiplies with now: its shape and dtype, no gradient.

        In the layer's mode (stochastic rounding draws while training), the warm-up's blend in it.
        """
        if not self.scheme.quantizes_weight or self.warmup_lambda == 0.0:
            return self.weight.detach()
        with torch.no_grad():
            applied = self.quantized(self.weight.dtype, as_int8=False).applied
            assert applied is not None
            return self._blended(self.weight.detach(), applied)

    @property
    def warmup_lambda(self) -> float:
        """Share of the quantized values in what is applied."""
        return 1.0 if self.continued else self.quantization.warmup_lambda

    @property
    def trained_quantized(self) -> bool:
        """Whether the weight was trained on its levels, here or before it came here."""
        return self.continued or self.quantization.steps > 0

    def _blended(self, latent: Tensor, quantized: Tensor) -> Tensor:
        warmup_lambda = self.warmup_lambda
        if warmup_lambda == 1.0:
            return quantized
        return latent if warmup_lambda == 0.0 else latent + (quantized - latent) * warmup_lambda

    # -- keeping ------------------------------------------------------------------------------

    def quantized(
        self, dtype: torch.dtype, *, as_int8: bool, fresh: bool = True, keep: bool = False
    ) -> Quantized:
        """The weight on its grid, computed or kept; call it without gradient.

        Args:
            dtype: of `applied`.
            as_int8: as int8 only (`applied` is None).
            fresh: give int8 levels beside `applied` when nothing is kept.
            keep: nobody trains: keep it as long as nothing speaks for another weight.
        """
        weight_cache = self.weight_cache
        draw = self.training and self.scheme.rounding == "stochastic"
        kind = (draw, dtype, as_int8)
        if weight_cache.enabled:
            result = weight_cache.entries.get(kind)
            if result is not None:
                return result
        if keep:
            return self._evaluated(kind)
        if self.training and weight_cache.evaluated:
            weight_cache.evaluated.clear()
        answer = self._computed(kind, fresh=fresh and not weight_cache.enabled)
        if weight_cache.enabled:
            weight_cache.entries[kind] = answer
        return answer

    def _evaluated(self, kind: tuple[bool, torch.dtype, bool]) -> Quantized:
        """Kept from the last evaluation, where the weight is still the same."""
        parts = [
            latent(self),
            *(p for p in (self.threshold, self.reference_scale) if p is not None),
        ]
        now = Evidence.of(tuple(parts), (self.quantization.sparsity, self.scheme))
        known = self.weight_cache.evaluated.get(kind)
        if now is not None and known is not None and known[0].agrees(now):
            return known[1]
        answer = self._computed(kind, fresh=False)
        if now is not None:
            self.weight_cache.evaluated[kind] = now.copied(), answer
        return answer

    def _computed(self, kind: tuple[bool, torch.dtype, bool], *, fresh: bool) -> Quantized:
        draw, dtype, as_int8 = kind
        small = as_int8 or fresh
        alone = self._levels_stand_alone() and not draw
        if alone and (fused := kernels(self.weight.device)) is not None:
            weight, qmax = self.weight.detach(), self.scheme.qmax
            given = None if self.scheme.step_from == "absmean" else self.scale()
            kind_of_applied = None if as_int8 else dtype
            return Quantized(
                *fused.weight_on_grid(weight, given, qmax, as_int8=small, dtype=kind_of_applied)
            )
        # on a CPU, fresh memory for all of the fp32 in between costs more than the arithmetic
        in_parts = self.weight.device.type == "cpu" and not torch.compiler.is_compiling()
        if alone and in_parts and (as_int8 or dtype is not torch.float32):
            return self._quantized_in_parts(None if as_int8 else dtype, small=small)
        levels, scale = self._rounded(draw=draw)
        whole_levels = levels.to(torch.int8) if small else None
        applied = None if as_int8 else self.dequantized(levels, scale, dtype)
        return Quantized(applied, whole_levels, scale)

    def _levels_stand_alone(self) -> bool:
        """Whether each weight's level is its own affair, once there is a scale."""
        scheme = self.scheme
        plain = scheme.granularity == "tensor" and scheme.weight_bits != 1 and scheme.parity == "hf"
        bare = (
            self.threshold is None
            and self.reference_scale is None
            and not self.quantization.sparsity
        )
        return plain and bare and self.weight.is_contiguous()

    def _quantized_in_parts(self, dtype: torch.dtype | None, *, small: bool) -> Quantized:
        weight, scheme, scale = self.weight.detach(), self.scheme, self.scale()
        levels = torch.empty(weight.shape, dtype=torch.int8) if small else None
        applied = None if dtype is None else torch.empty(weight.shape, dtype=dtype)
        for begin in range(0, weight.numel(), quantizers.CACHED):
            part = slice(begin, begin + quantizers.CACHED)
            values = quantizers.in_levels(weight.view(-1)[part], scale, scheme)
            values = quantizers.nearest_levels(values, scheme)
            if levels is not None:
                levels.view(-1)[part].copy_(values)
            if applied is not None:
                applied.view(-1)[part].copy_(values.div_(scale).to(weight.dtype))
        return Quantized(applied, levels, scale)

    def dequantized(self, levels: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Levels to weights; overwrites the levels."""
        if self.reference_scale is None:
            applied = levels.div_(scale)
        else:
            applied = levels.mul_(self._continued_step(self.reference_scale))
        return applied.view(self.weight.shape).to(self.weight.dtype).to(dtype)

    def invalidate(self) -> None:
        """Drop what is kept: the latent weight has changed."""
        self.weight_cache.clear()

    # -- the differentiable weight and input -----------------------------------------------------

    def _handle(self, scale: Tensor) -> Tensor:
        """What takes the weight's gradient for products that are given the weight beside it."""
        if self.threshold is None and self.scheme.ste == "identity":
            return self.weight
        return self._estimated(self.weight.detach(), scale)

    def _estimated(self, applied: Tensor, scale: Tensor) -> Tensor:
        """`applied` with the estimator's gradient towards the latent weight and the threshold."""
        return quantizers.estimated(
            self.weight, self._border(), applied, scale, self.scheme, self.warmup_lambda
        )

    def estimated_weight(self) -> Tensor:
        """What the forward pass multiplies with, in the graph: the weight's shape and dtype."""
        # a border that is learned gets its gradient, though it is 0
        before_levels = self.warmup_lambda == 0.0 and self.threshold is None
        if before_levels or not self.scheme.quantizes_weight:
            return self.weight
        keep = not (self.training or torch.is_grad_enabled())
        with torch.no_grad():
            result = self.quantized(self.weight.dtype, as_int8=False, fresh=False, keep=keep)
            assert result.applied is not None
            applied = self._blended(self.weight.detach(), result.applied)
        return self._estimated(applied, result.scale)

    def estimated_input(self, inputs: Tensor, *, channels: bool = False) -> Tensor:
        """The quantized input, in the graph: its shape and dtype."""
        if not self.scheme.quantizes_activation or self.warmup_lambda == 0.0:
            return inputs
        with torch.no_grad():
            values = self.quantized_values(inputs, channels=channels)
            applied = self._blended(inputs.detach(), values)
        return quantizers.straight_through(inputs, applied)

    def quantized_values(self, inputs: Tensor, *, channels: bool = False) -> Tensor:
        """The input on its grid, dequantized: its shape and dtype."""
        levels, scale = quantizers.activation_grid(inputs, self.scheme, channels=channels)
        return levels.div_(scale).to(inputs.dtype)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        scheme = self.scheme
        return (
            f"{super().extra_repr()}, weight_bits={scheme.weight_bits:g}, "
            f"activation_bits={scheme.activation_bits}"
        )


def latent(layer: BitLayer) -> Tensor:
    """The parameter itself, of which `weight` may be a view: what ties are told by."""
    parameter = layer._parameters.get("weight")
    return layer.weight if parameter is None else parameter


def as_stored(layer: BitLayer, weight: Tensor) -> Tensor:
    """A tensor of the shape of a layer's weight as the state dict has it, contiguous."""
    return weight.t().contiguous() if layer.transposed else weight


SMALLEST_STEP = 1e-30
"""Of a weight with a reference scale: its inverse is still a number."""
