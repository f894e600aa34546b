"""What a quantized layer applies: bits, grids, rounding, gradients and arithmetic, as one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

ScaleStatistic = Literal["absmean", "absmedian", "absmax"]
Granularity = Literal["tensor", "row", "group"]
Rounding = Literal["deterministic", "stochastic", "learned_threshold"]
Ste = Literal["identity", "clipped", "none"]
Arithmetic = Literal["exact", "int8", "int8_bf16_backward", "int8_backward"]

WEIGHT_BITS: Final = (1, 1.58, 2, 4, 8, 16, 32)
ACTIVATION_BITS: Final = (4, 8, 16, 32)
OUTPUT_EMBEDDINGS: Final = "output_embeddings"
"""A name to skip that also stands for the layer that a model's `get_output_embeddings()` gives."""
_HEADS: Final = ("head", "lm_head", "classifier", "score", "qa_outputs", "embed_out",
                 OUTPUT_EMBEDDINGS)  # fmt: skip
_WITH_LAYERS: Final = ("lm_head", "classifier", "classification_head")
SKIPPED: Final = (
    *(form for name in _HEADS for form in (name, f"*.{name}")),
    *(form for name in _WITH_LAYERS for form in (f"{name}.*", f"*.{name}.*")),
)
"""Names of the layers that make the outputs, which stay in full precision by default."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How a layer quantizes its weight and its input.

    Args:
        weight_bits: 1: {-1, 1} around the mean; 1.58: {-1, 0, 1}; 2, 4, 8: the symmetric integer
            grid of `2^(bits-1) - 1` levels to each side; 16 or 32: the weight as it is.
        scale_statistic: what the step between levels is taken from. None: the mean of |W| for 1
            and 1.58 bits, the largest |W| for 2, 4 and 8.
        granularity: what shares a step: the whole tensor, an output row, or `group_size`
            neighbouring inputs of an output row.
        group_size: length of a group, a divisor of the row's length.
        activation_bits: 8 or 4: symmetric integer grid of the largest |x|; 16 or 32: as they are.
        activation_granularity: what shares a step: a token (a sample of a convolution), or the
            whole tensor.
        rounding: to the nearest level; or to a neighbouring one at random, so that the mean over
            draws is the (clipped) weight, while training; or with the border between levels
            learned.
        ste: gradient of the rounding: that of the identity, the same within the grid only,
            or none.
        parity: whose arithmetic the 1.58-bit, per-tensor form follows, operation by operation:
            `hf` (transformers' AutoBitLinear) or `torchao` (its `bitnet_training`).
        arithmetic: `exact` multiplies dequantized values; `int8` multiplies the integers (exact
            sums, the same result up to rounding) and keeps integers for backward;
            `int8_bf16_backward` also multiplies in bf16 on the way back; `int8_backward` rounds
            the incoming gradient to 8 bits and multiplies integers there too.
        threshold_rate: how many times faster than a weight a learned threshold moves, in steps
            between levels.

    Raises:
        ValueError: a combination that cannot work; the message says how to mend it.
    """

    weight_bits: float = 1.58
    scale_statistic: ScaleStatistic | None = None
    granularity: Granularity = "tensor"
    group_size: int = 128
    activation_bits: int = 8
    activation_granularity: Literal["token", "tensor"] = "token"
    rounding: Rounding = "deterministic"
    ste: Ste = "identity"
    parity: Literal["hf", "torchao"] = "hf"
    arithmetic: Arithmetic = "exact"
    threshold_rate: float = 10.0

    def __post_init__(self) -> None:
        faults = [text for wrong, text in self._rules() if wrong]
        if faults:
            raise ValueError("; ".join(faults))

    def _rules(self) -> list[tuple[bool, str]]:
        bits, fine = self.weight_bits, self.weight_bits >= 16
        plain = (
            bits == 1.58 and self.granularity == "tensor" and self.rounding == "deterministic"
            and self.scale_statistic in (None, "absmean")
        )  # fmt: skip
        return [
            (bits not in WEIGHT_BITS, f"weight_bits is one of {WEIGHT_BITS}, not {bits}"),
            (
                self.activation_bits not in ACTIVATION_BITS,
                f"activation_bits is one of {ACTIVATION_BITS}, not {self.activation_bits}",
            ),
            (self.group_size < 1, "group_size is at least 1"),
            (
                bits == 1 and self.scale_statistic not in (None, "absmean"),
                f"weight_bits 1 takes its step from absmean, not {self.scale_statistic}",
            ),
            (
                bits == 1.58 and self.scale_statistic == "absmax",
                "weight_bits 1.58 takes its step from absmean or absmedian (absmax would round "
                "nearly all weights to zero)",
            ),
            (
                bits in (4, 8) and self.scale_statistic not in (None, "absmax"),
                f"weight_bits {bits:g} takes its step from absmax, not {self.scale_statistic}",
            ),
            (
                self.rounding == "learned_threshold" and bits not in (1, 1.58),
                f"a learned threshold parts the levels of 1 or 1.58 bits, not of {bits:g}",
            ),
            (
                self.rounding == "stochastic" and fine,
                f"stochastic rounding has no levels to draw from with weight_bits {bits:g}",
            ),
            (
                self.parity == "torchao" and not (plain and self.activation_bits == 8
                and self.activation_granularity == "token"),
                "parity torchao is that of 1.58-bit weights per tensor (absmean, deterministic) "
                "and int8 activations per token",
            ),
            (
                self.arithmetic != "exact" and (fine or self.activation_bits >= 16),
                f"arithmetic {self.arithmetic} multiplies integers: it needs weight_bits of at "
                "most 8 and activation_bits of 8 or 4",
            ),
            (
                self.arithmetic != "exact" and self.granularity == "group",
                f"arithmetic {self.arithmetic} needs one step for each output row: granularity "
                "tensor or row, not group",
            ),
        ]  # fmt: skip

    @property
    def quantizes_weight(self) -> bool:
        """Whether the weight has levels."""
        return self.weight_bits <= 8

    @property
    def quantizes_activation(self) -> bool:
        """Whether the input has levels."""
        return self.activation_bits <= 8

    @property
    def qmax(self) -> int:
        """The highest level of a weight."""
        return 1 if self.weight_bits < 2 else 2 ** (int(self.weight_bits) - 1) - 1

    @property
    def activation_qmax(self) -> int:
        """The highest level of an activation."""
        return int(2 ** (self.activation_bits - 1) - 1)

    @property
    def step_from(self) -> ScaleStatistic:
        """What the step is taken from."""
        return self.scale_statistic or ("absmean" if self.weight_bits < 2 else "absmax")

    @property
    def is_reference(self) -> bool:
        """Whether the weight's arithmetic is that of the published ternary form (absmean)."""
        return (
            self.weight_bits == 1.58
            and self.step_from == "absmean"
            and self.granularity == "tensor"
        )
