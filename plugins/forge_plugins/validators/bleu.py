"""BLEU of generated text against the continuation in the validation text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal

from msgspec import Meta

from forge_kernel.api import (
    Batch,
    Kind,
    LazyModule,
    Metric,
    MetricInfo,
    PluginError,
    PluginInfo,
    Run,
    hookimpl,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from forge_plugins.mathematics.text import generation
else:
    torch = LazyModule("torch")
    generation = LazyModule("forge_plugins.mathematics.text.generation")

INSTALL: Final = "pip install 'forge-kernel[metrics]'"
ORDERS: Final = 4  # n-grams of 1 to 4 words, as BLEU is defined


@dataclass(frozen=True, kw_only=True)
class BleuConfig:
    """How much is read, how much is written, and what a word is."""

    renamed: ClassVar[Mapping[str, str]] = {"windows": "sequences"}

    prompt: Annotated[
        int, Meta(ge=1, description="tokens of each sequence that the model is given")
    ] = 64
    tokens: Annotated[int, Meta(ge=1, description="tokens that it generates after them")] = 64
    sequences: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(
            description="most sequences in a pass, in each process; null: all (each token written "
            "costs a forward pass)"
        ),
    ] = 64
    words: Annotated[
        Literal["13a", "intl", "char", "none"],
        Meta(description="sacrebleu's way to cut texts into words (none: at spaces)"),
    ] = "13a"
    smoothing: Annotated[
        Literal["exp", "floor", "add-k", "none"],
        Meta(description="sacrebleu's smoothing of n-grams that are never met"),
    ] = "exp"


class BleuMetric:
    """Counts n-grams over the whole set; the score is taken from the sums, as a corpus's is.

    Args:
        config: sizes and sacrebleu's settings.
        run: its model in use writes, its data's tokenizer makes texts of tokens.
    """

    def __init__(self, config: BleuConfig, run: Run) -> None:
        from sacrebleu.metrics.bleu import BLEU

        self._config, self._run = config, run
        self._tokenizer: Any = getattr(run.data, "tokenizer", None)
        self._score = BLEU(tokenize=config.words, smooth_method=config.smoothing)
        self._sequences = 0
        self._counts: Tensor | None = None

    def reset(self) -> None:
        """Begin a pass."""
        self._sequences = 0
        self._counts = None

    def update(self, batch: Batch, outputs: Any, loss: Tensor, weight: float | Tensor) -> None:
        """Let the model write, and count what its words and the text's have in common."""
        del outputs, loss, weight
        config, row = self._config, batch.inputs
        if batch.targets.shape == row.shape:  # the last target is one more token of the text
            row = torch.cat([row, batch.targets[:, -1:]], 1)
        counts = batch.counted.samplewise()
        if counts is not None:
            row = row[counts > 0]
        if config.sequences is not None:
            row = row[: max(0, config.sequences - self._sequences)]
        prompts, follows = row[:, : config.prompt], row[:, config.prompt :][:, : config.tokens]
        if not follows.numel():
            return
        self._sequences += len(row)
        model, context = self._run.active_model, self._run.data.spec.sequence
        written = generation.greedy_continuation(model, prompts, follows.shape[1], context)
        decode = self._tokenizer.decode
        texts = [
            [token for token in item if token != batch.ignore_index] for item in follows.tolist()
        ]
        result = self._score.corpus_score(
            [decode(item[: len(text)]) for item, text in zip(written.tolist(), texts, strict=True)],
            [[decode(text) for text in texts]],
        )
        counts = torch.tensor([*result.counts, *result.totals, result.sys_len, result.ref_len])
        self._counts = counts if self._counts is None else self._counts + counts

    def compute(self, add: Callable[[Tensor], Tensor]) -> Mapping[str, float]:
        """From 0 to 100, as BLEU is told; nothing when no text was there."""
        own = self._counts
        if own is None:
            own = torch.zeros(2 * ORDERS + 2, dtype=torch.int64)
        sums = add(own.to(self._run.device)).tolist()
        if not sums[-1]:
            return {}
        hits, totals, (written, there) = sums[:ORDERS], sums[ORDERS : 2 * ORDERS], sums[-2:]
        result = self._score.compute_bleu(
            hits, totals, written, there, smooth_method=self._config.smoothing
        )
        return {"bleu": float(result.score)}


class Bleu:
    """BLEU of generated text against the continuation in the validation text.

    The model reads the first tokens of a held-out window and writes on, the likeliest token each
    time; what it wrote is compared with how the window goes on (Papineni et al. 2002; sacrebleu,
    Post 2018). Without sacrebleu a run is refused when it is planned.
    """

    info = PluginInfo(
        name="bleu",
        kind=Kind.VALIDATORS,
        config=BleuConfig,
        provides=("metric:bleu",),
        requires=("data:text",),
        packages={"sacrebleu": INSTALL},
        metrics=(MetricInfo("bleu", goal="max", title="BLEU"),),
    )

    def __init__(self, config: BleuConfig) -> None:
        self.config = config

    @hookimpl
    def make_metrics(self, run: Run) -> Sequence[Metric]:
        """One metric.

        Raises:
            PluginError: the data's sequences are too short, or have no tokenizer.
        """
        config, sequence = self.config, run.data.spec.sequence
        if getattr(run.data, "tokenizer", None) is None:
            raise PluginError("bleu: the data has no `tokenizer` that makes texts of its tokens")
        if sequence is not None and config.prompt + config.tokens > sequence + 1:
            raise PluginError(
                f"bleu: {config.prompt} tokens to read and {config.tokens} to write are more than "
                f"the {sequence + 1} of a sequence: lower prompt or tokens, or raise "
                "data.with.sequence_length"
            )
        return [BleuMetric(config, run)]
