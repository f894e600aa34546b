"""Perplexity over a whole validation set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from forge_kernel.api import Batch, Kind, LazyModule, Metric, MetricInfo, PluginInfo, Run, hookimpl

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from forge_plugins.mathematics.metrics import label_positions, language_model
    from forge_plugins.mathematics.text import token_bytes
else:
    torch = LazyModule("torch")
    label_positions = LazyModule("forge_plugins.mathematics.metrics.label_positions")
    language_model = LazyModule("forge_plugins.mathematics.metrics.language_model")
    token_bytes = LazyModule("forge_plugins.mathematics.text.token_bytes")


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """No settings: which targets count is said by the run."""

    renamed: ClassVar[Mapping[str, str]] = {"ignore": "run.ignore_index"}


class PerplexityMetric:
    """Sums the plain cross-entropy, whatever the training loss adds to it (smoothing, terms).

    Args:
        device: where the sums of a process without a batch stand.
        sizes: bytes of each token, shape (vocabulary,); None: they are not known.
    """

    def __init__(self, device: Any = "cpu", sizes: Tensor | None = None) -> None:
        self._device = device
        self._sizes = None if sizes is None else sizes.to(device)
        self._sums: Tensor | None = None
        self._bytes: Tensor | None = None

    def reset(self) -> None:
        """Begin a pass."""
        self._sums = self._bytes = None

    def update(self, batch: Batch, outputs: Any, loss: Tensor, weight: float | Tensor) -> None:
        """Take in outputs (..., classes) and integer targets (...)."""
        del loss, weight
        weights = batch.counted.weights
        pieces = label_positions.answer_pieces(outputs, batch.targets, batch.positions)
        for logits, targets, rows in pieces:
            own = None if weights is None else weights[rows]
            result = language_model.cross_entropy_sums(
                logits, targets, own, ignored=batch.ignore_index
            )
            self._sums = result if self._sums is None else self._sums + result
            if self._sizes is not None:
                part = language_model.byte_sum(targets, own, self._sizes)
                self._bytes = part if self._bytes is None else self._bytes + part

    def compute(self, add: Callable[[Tensor], Tensor]) -> Mapping[str, float]:
        """`exp` of the mean cross-entropy, the mean in bits, and the bits by the bytes of the text
        where tokens have bytes; nothing without a target.

        A perplexity beyond all numbers is infinite, which a record shows as not measured.
        """
        own = self._sums
        if own is None:
            own = language_model.no_sums(self._device)
        total, count = add(own).tolist()
        length = 0.0
        if self._sizes is not None:
            length = float(add(own.new_zeros(()) if self._bytes is None else self._bytes))
        if not count:
            return {}
        mean = total / count
        result = {
            "perplexity": language_model.perplexity(mean),
            "bits_per_token": language_model.bits(mean),
        }
        return (
            {**result, "bits_per_byte": language_model.bits(total) / length} if length else result
        )


class LanguageModel:
    """Perplexity over the whole validation set; of texts also bits by the byte."""

    info = PluginInfo(
        name="language_model",
        kind=Kind.VALIDATORS,
        config=LanguageModelConfig,
        provides=("metric:perplexity", "metric:bits_per_token"),
        requires=("data:classes",),
        metrics=(
            MetricInfo("perplexity", goal="min"),
            MetricInfo("bits_per_token", "bits", "min", title="Bits a token"),
            MetricInfo("bits_per_byte", "bits", "min", title="Bits a byte"),
        ),
    )

    def __init__(self, config: LanguageModelConfig) -> None:
        self.config = config

    @hookimpl
    def make_metrics(self, run: Run) -> Sequence[Metric]:
        """One metric."""
        tokenizer = getattr(run.data, "tokenizer", None)
        sizes = None if tokenizer is None else token_bytes.token_bytes(tokenizer)
        return [PerplexityMetric(run.device, sizes)]
