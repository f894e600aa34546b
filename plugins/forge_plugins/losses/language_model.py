"""Cross-entropy of the next token, a piece of the logits at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final
from weakref import WeakKeyDictionary

from msgspec import Meta

from forge_kernel.api import (
    Batch,
    Kind,
    LazyModule,
    PluginError,
    PluginInfo,
    Run,
    Step,
    call_model,
    hookimpl,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from forge_plugins.mathematics.losses import chunked_cross_entropy, deferred_logits
    from forge_plugins.mathematics.metrics import label_positions
else:
    chunked_cross_entropy = LazyModule("forge_plugins.mathematics.losses.chunked_cross_entropy")
    deferred_logits = LazyModule("forge_plugins.mathematics.losses.deferred_logits")
    label_positions = LazyModule("forge_plugins.mathematics.metrics.label_positions")

_FEW: Final = slice(0, 1)
"""Samples by which a model's head is looked at."""


@dataclass(frozen=True, kw_only=True)
class LanguageModelLossConfig:
    """Where the head is, how much of the logits is there at a time, and which targets count."""

    renamed: ClassVar[Mapping[str, str]] = {"ignore": "run.ignore_index"}

    head: Annotated[
        Annotated[str, Meta(min_length=1)] | None,
        Meta(
            description="the model's last layer, by module name; null: what the model's "
            "get_output_embeddings() gives (all models of transformers), else its layer head"
        ),
    ] = None
    piece: Annotated[int, Meta(ge=1, description="rows of logits that are there at a time")] = 512
    label_smoothing: Annotated[
        float, Meta(ge=0, lt=1, description="share of the target spread over all tokens")
    ] = 0.0


class LanguageModelLoss:
    """Cross-entropy of the next token in pieces of the logits: a fraction of the memory.

    `cross_entropy` for large vocabularies: the same mean, in a fraction of the memory.

    It runs the model without its head and the head by itself, so that neither the forward pass nor
    the backward pass holds more than `piece` rows of logits. Validators read the logits in pieces
    too.
    """

    info = PluginInfo(
        name="language_model",
        kind=Kind.LOSS,
        config=LanguageModelLossConfig,
        requires=("data:tokens", "data:classes"),
    )

    def __init__(self, config: LanguageModelLossConfig) -> None:
        self.config = config
        self._heads: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
        """The head's name in each model that was looked at."""

    @hookimpl
    def compute_outputs(self, run: Run, step: Step, batch: Batch) -> Any:
        """What the head is given, and the head.

        Raises:
            PluginError: the model has no such layer.
        """
        del step
        model, config = run.active_model, self.config
        if model not in self._heads:
            self._look_at(model, batch)
        with deferred_logits.without_head(model, self._heads[model]) as head:
            hidden = label_positions.main_output(call_model(model, batch))
        result = deferred_logits.DeferredLogits(hidden, head, config.piece)
        wanted = batch.targets.shape[1] if batch.targets.ndim > 1 else hidden.shape[1]
        if batch.positions is not None and hidden.ndim == 3 and hidden.shape[1] != wanted:
            return result.at(batch.positions)  # a model that answers everywhere
        return result

    def _look_at(self, model: nn.Module, batch: Batch) -> None:
        """Find the head of a model; where the model names it, see that nothing follows it.

        Raises:
            PluginError: the model has no such layer, or changes what the head gives.
        """
        said = deferred_logits.head_name(model)
        name = self.config.head or said or "head"
        if name not in dict(model.named_modules()):
            raise PluginError(
                f"language_model: {type(model).__name__} has no layer '{name}' "
                f"(loss.with.head); it has {', '.join(name for name, _ in model.named_children())}"
            )
        few = batch.rows(_FEW)
        if said and deferred_logits.changes_after_head(
            model,
            model.get_submodule(name),
            lambda: label_positions.main_output(call_model(model, few)),
        ):
            raise PluginError(
                f"language_model: {type(model).__name__} changes what its layer '{name}' gives "
                "(such as a soft cap of the logits), which pieces would miss: use the loss "
                "cross_entropy"
            )
        self._heads[model] = name

    @hookimpl
    def compute_loss(self, run: Run, step: Step, batch: Batch, outputs: Any) -> Tensor:
        """The mean over the targets that count.

        Raises:
            PluginError: there are not as many answers as targets.
        """
        del run, step
        hidden, targets = outputs.hidden.flatten(0, -2), batch.targets.reshape(-1)
        if len(hidden) != len(targets):
            raise PluginError(f"language_model: {len(hidden)} answers for {len(targets)} targets")
        return chunked_cross_entropy.chunked_cross_entropy(
            hidden,
            targets,
            outputs.head,
            piece=self.config.piece,
            label_smoothing=self.config.label_smoothing,
            ignored=batch.ignore_index,
            weights=batch.counted.weights,
        )
