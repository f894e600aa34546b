"""Cross-entropy over classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from msgspec import Meta

from forge_kernel.api import (
    Batch,
    Kind,
    LazyModule,
    LossTerm,
    PluginError,
    PluginInfo,
    Run,
    Step,
    hookimpl,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import functional

    from forge_plugins.mathematics.losses import cross_entropy as mathematics
    from forge_plugins.mathematics.losses import stablemax
    from forge_plugins.mathematics.metrics import label_positions
else:
    torch = LazyModule("torch")
    functional = LazyModule("torch.nn.functional")
    label_positions = LazyModule("forge_plugins.mathematics.metrics.label_positions")
    stablemax = LazyModule("forge_plugins.mathematics.losses.stablemax")
    mathematics = LazyModule("forge_plugins.mathematics.losses.cross_entropy")


@dataclass(frozen=True, kw_only=True)
class CrossEntropyConfig:
    """How targets are read and weighed."""

    renamed: ClassVar[Mapping[str, str]] = {"ignore": "run.ignore_index", "link": "activation"}

    label_smoothing: Annotated[
        float, Meta(ge=0, lt=1, description="share of the target spread over all classes")
    ] = 0.0
    class_weights: Annotated[
        tuple[Annotated[float, Meta(ge=0)], ...] | None,
        Meta(description="weight of each class, in order of the classes; null: equal"),
    ] = None
    focal_gamma: Annotated[
        float, Meta(ge=0, le=20, description="how far well-classified samples are weighed down")
    ] = 0.0
    activation: Annotated[
        Literal["softmax", "stablemax"],
        Meta(description="how outputs become probabilities; stablemax grows linearly where softmax "
             "grows exponentially, so that the loss does not round to zero (arXiv 2501.04697)"),
    ] = "softmax"  # fmt: skip

    def __post_init__(self) -> None:
        if self.class_weights is not None and not any(self.class_weights):
            raise ValueError("class_weights are all 0: nothing would be learned")


class CrossEntropy:
    """Cross-entropy over classes.

    The mean over the targets that count; with class weights it is divided by their sum.
    """

    info = PluginInfo(
        name="cross_entropy",
        kind=Kind.LOSS,
        config=CrossEntropyConfig,
        requires=("data:classes",),
    )

    def __init__(self, config: CrossEntropyConfig) -> None:
        self.config = config
        self._class_weights: Tensor | None = None

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Class weights must fit the data."""
        wanted, classes = self.config.class_weights, run.data.spec.classes
        if wanted is not None and classes is not None and len(wanted) != classes:
            raise PluginError(
                f"cross_entropy: {len(wanted)} class_weights for data of {classes} classes"
            )

    @hookimpl
    def compute_loss(self, run: Run, step: Step, batch: Batch, outputs: Any) -> Tensor | LossTerm:
        """Outputs of shape (..., classes) against integer targets of shape (...)."""
        del run, step
        config = self.config
        try:
            logits, targets = label_positions.answer_rows(outputs, batch.targets, batch.positions)
        except ValueError as error:
            raise PluginError(f"cross_entropy: {error}") from error
        if config.activation == "stablemax":
            logits = stablemax.stablemax_logits(logits)
        weighed = config.class_weights is not None or config.focal_gamma
        if not weighed and batch.counted.weights is None:
            return functional.cross_entropy(
                logits, targets, label_smoothing=config.label_smoothing,
                ignore_index=batch.ignore_index,
            )  # fmt: skip
        return LossTerm(
            *mathematics.classification_losses(
                logits,
                targets,
                class_weights=self._weights_of_classes(logits),
                label_smoothing=config.label_smoothing,
                focal_gamma=config.focal_gamma,
                ignored=batch.ignore_index,
            )
        )

    @hookimpl
    def compute_loss_weights(self, run: Run, batch: Batch) -> Sequence[float | Tensor]:
        """What the targets count, each times the weight of its class."""
        del run
        wanted = self.config.class_weights
        if wanted is None:
            return [batch.counted.total]
        targets = batch.targets.reshape(-1)
        safe = torch.where(targets != batch.ignore_index, targets, 0)
        parts = torch.tensor(wanted, device=targets.device)[safe]
        weights = batch.counted.weights
        return [(parts if weights is None else parts * weights).sum()]

    def _weights_of_classes(self, outputs: Tensor) -> Tensor | None:
        """On the outputs' device, made once."""
        wanted = self.config.class_weights
        if wanted is None:
            return None
        if len(wanted) != outputs.shape[-1]:
            raise PluginError(
                f"cross_entropy: {len(wanted)} class_weights for {outputs.shape[-1]} classes"
            )
        result = self._class_weights
        if result is None or result.device != outputs.device or result.dtype != outputs.dtype:
            result = self._class_weights = torch.tensor(wanted).to(outputs)
        return result
