"""Cross-entropy over classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from forge_kernel.api import Batch, Kind, LazyModule, PluginError, PluginInfo, Run, Step, hookimpl

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from forge_plugins.mathematics import classification_loss as mathematics
    from forge_plugins.mathematics import stablemax
else:
    torch = LazyModule("torch")
    stablemax = LazyModule("forge_plugins.mathematics.stablemax")
    mathematics = LazyModule("forge_plugins.mathematics.classification_loss")


@dataclass(frozen=True, kw_only=True)
class CrossEntropyConfig:
    """How targets are read and weighed."""

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
    ignore: Annotated[
        int | None, Meta(description="a target that counts as nothing, such as padding; null: none")
    ] = None

    link: Annotated[
        Literal["softmax", "stablemax"],
        Meta(description="how outputs become probabilities; stablemax grows linearly where softmax "
             "grows exponentially, so that the loss does not round to zero (arXiv 2501.04697)"),
    ] = "softmax"  # fmt: skip

    def __post_init__(self) -> None:
        if self.class_weights is not None and not any(self.class_weights):
            raise ValueError("class_weights are all 0: nothing would be learned")


class CrossEntropy:
    """Cross-entropy over classes.

    Mean cross-entropy; its weight is the number of targets or the sum of their weights.
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
    def compute_loss(
        self, run: Run, step: Step, batch: Batch, outputs: Any
    ) -> tuple[Tensor, float | Tensor]:
        """Outputs of shape (..., classes) against integer targets of shape (...)."""
        del run, step
        targets = batch.targets
        if outputs.ndim == 3 and batch.positions is not None:
            if outputs.shape[1] != targets.shape[1]:
                outputs = outputs[:, batch.positions]  # a model that answers everywhere
            outputs = outputs.flatten(0, 1)
        elif outputs.ndim > 2:
            outputs = outputs.flatten(0, -2)
        flat = targets.reshape(-1)
        if len(outputs) != len(flat):
            raise PluginError(
                f"cross_entropy: {len(outputs)} outputs for {len(flat)} targets; the model must "
                "give one row of logits for each target"
            )
        if self.config.link == "stablemax":
            outputs = stablemax.stablemax_logits(outputs)
        weights = None
        if batch.weights is not None:
            weights = batch.weights.reshape(len(batch.weights), -1)
            weights = weights.expand(-1, len(flat) // len(weights)).reshape(-1).to(outputs)
        return mathematics.classification_loss(
            outputs,
            flat,
            sample_weights=weights,
            class_weights=self._weights_of_classes(outputs),
            label_smoothing=self.config.label_smoothing,
            focal_gamma=self.config.focal_gamma,
            ignored=self.config.ignore,
        )

    def _weights_of_classes(self, outputs: Tensor) -> Tensor | None:
        """On the outputs' device, made once."""
        wanted = self.config.class_weights
        if wanted is None:
            return None
        if len(wanted) != outputs.shape[-1]:
            raise PluginError(
                f"cross_entropy: {len(wanted)} class_weights for {outputs.shape[-1]} classes"
            )
        found = self._class_weights
        if found is None or found.device != outputs.device or found.dtype != outputs.dtype:
            found = self._class_weights = torch.tensor(wanted).to(outputs)
        return found
