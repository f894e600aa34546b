"""Losses of one task each; `loss_functions` adds to them and combines them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from agent_forge.phases.phase5_training.loss_settings import LossConfig
from forge_plugins.mathematics.losses.contrastive import supervised_contrastive
from forge_plugins.mathematics.losses.cross_entropy import classification_losses
from forge_plugins.mathematics.metrics.label_positions import number_pairs

PADDING: Final = -100
"""The target that counts as nothing, as torch's cross-entropy has it."""


class BaseLoss(nn.Module):
    """`loss(predictions, targets, **further)`; what a loss does not read of `further` it ignores.

    A training (`TrainingLoop`, `GrokfastTrainer`) hands `model`, `inputs`, and what else a batch
    that is a mapping holds.

    Args:
        config: read at each call.
    """

    def __init__(self, config: LossConfig | None = None) -> None:
        super().__init__()
        self.config = config or LossConfig()

    def forward(self, predictions: Any, targets: Any, **further: Any) -> Tensor:
        """0-d, or one value for each sample with the reduction "none"."""
        raise NotImplementedError

    def needs(self) -> Mapping[str, str]:
        """What batches must hold for a training, each with the setting that asks for it."""
        return {}

    def reduced(self, losses: Tensor, weights: Tensor | None = None) -> Tensor:
        """What the settings ask for; the mean is `sum(losses) / sum(weights)`."""
        if self.config.reduction == "none":
            return losses
        if self.config.reduction == "sum":
            return losses.sum()
        if weights is None:
            return losses.mean()
        total = weights.sum()
        return losses.sum() / torch.where(total > 0, total, 1.0)


def _parts(losses: Tensor, parts: Tensor | None, targets: Tensor) -> Tensor:
    """Each loss's part of the divisor of the mean; padding has none."""
    counted = (targets != PADDING).to(losses.dtype)
    return counted if parts is None else counted * parts


class ClassificationLoss(BaseLoss):
    """Cross-entropy of logits of shape (n, classes) and integer targets (n,).

    Args:
        config: see `LossConfig`.
        num_classes: checked against the logits; None: not.
    """

    def __init__(self, config: LossConfig | None = None, num_classes: int | None = None) -> None:
        super().__init__(config)
        self.num_classes = num_classes

    def forward(self, predictions: Any, targets: Any, **further: Any) -> Tensor:
        """See the class.

        Raises:
            ValueError: logits or class weights of another number of classes.
        """
        del further
        classes = predictions.shape[-1]
        wanted = self.config.class_weights
        if self.num_classes not in (None, classes):
            raise ValueError(f"{classes} logits for num_classes {self.num_classes}")
        if wanted is not None and len(wanted) != classes:
            raise ValueError(f"{len(wanted)} class_weights for {classes} classes")
        flat = targets.reshape(-1).long()
        losses, parts = classification_losses(
            predictions,
            flat,
            class_weights=None if wanted is None else predictions.new_tensor(list(wanted)),
            label_smoothing=self.config.label_smoothing,
            focal_gamma=self.config.focal_loss_gamma,
            ignored=PADDING,
        )
        return self.reduced(losses, _parts(losses, parts, flat))


class RegressionLoss(BaseLoss):
    """Distance of predictions from numbers of the same shape but for dimensions of 1.

    Args:
        config: see `LossConfig`.
        distance: `squared` (MSE), `absolute` (MAE) or `huber`.
        delta: where the huber distance turns from squared to absolute.
    """

    def __init__(
        self,
        config: LossConfig | None = None,
        distance: Literal["squared", "absolute", "huber"] = "squared",
        delta: float = 1.0,
    ) -> None:
        super().__init__(config)
        if distance not in ("squared", "absolute", "huber"):
            raise ValueError(f"distance '{distance}': squared, absolute or huber")
        self.distance, self.delta = distance, delta

    def forward(self, predictions: Any, targets: Any, **further: Any) -> Tensor:
        """See the class.

        Raises:
            ValueError: shapes that do not fit.
        """
        del further
        predictions, wanted = number_pairs(predictions, targets)
        if self.distance == "squared":
            losses = functional.mse_loss(predictions, wanted, reduction="none")
        elif self.distance == "absolute":
            losses = functional.l1_loss(predictions, wanted, reduction="none")
        else:
            losses = functional.huber_loss(predictions, wanted, reduction="none", delta=self.delta)
        return self.reduced(losses.reshape(len(losses), -1).mean(1))


class GenerationLoss(BaseLoss):
    """Cross-entropy of logits (n, length, vocabulary) and next tokens (n, length); -100 pads."""

    def forward(self, predictions: Any, targets: Any, **further: Any) -> Tensor:
        """See the class; "none" gives one value for each token."""
        del further
        flat = targets.reshape(-1).long()
        losses, parts = classification_losses(
            predictions.flatten(0, -2),
            flat,
            label_smoothing=self.config.label_smoothing,
            ignored=PADDING,
        )
        return self.reduced(losses, _parts(losses, parts, flat))


class ContrastiveLoss(BaseLoss):
    """Supervised contrastive loss (arXiv 2004.11362) of embeddings (n, width) and labels (n,).

    Args:
        config: see `LossConfig`; the reduction is the mean over anchors, or their sum.
        temperature: divisor of the similarities.
    """

    def __init__(self, config: LossConfig | None = None, temperature: float = 0.1) -> None:
        super().__init__(config)
        if not temperature > 0:
            raise ValueError(f"temperature {temperature} is not above 0")
        self.temperature = temperature

    def forward(self, predictions: Any, targets: Any, **further: Any) -> Tensor:
        """See the class.

        Raises:
            ValueError: the reduction "none".
        """
        del further
        if self.config.reduction == "none":
            raise ValueError(
                "a contrastive loss is of anchors that have a positive, not of each sample: set "
                "reduction to 'mean' or 'sum'"
            )
        loss, anchors = supervised_contrastive(
            predictions.flatten(1), targets.reshape(-1), self.temperature
        )
        return loss * anchors if self.config.reduction == "sum" else loss


class AuxiliaryLoss(BaseLoss):
    """A loss that the model has computed itself: the predictions are its values."""

    def forward(self, predictions: Any, targets: Any, **further: Any) -> Tensor:
        """See the class."""
        del targets, further
        return self.reduced(predictions.reshape(-1))
