"""Losses for programs with a training loop of their own: the mathematics of the loss plugins."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, Literal

import torch
from msgspec import Meta
from torch import Tensor, nn
from torch.nn import functional

from agent_forge.phases.phase5_training.configuration import Configuration
from agent_forge.phases.phase5_training.pipeline.bitnet_optimizer import mean_quantization_distance
from forge_plugins.mathematics.bit_layer import BitLayer
from forge_plugins.mathematics.classification_loss import classification_losses
from forge_plugins.mathematics.contrastive import supervised_contrastive
from forge_plugins.mathematics.distillation import distillation
from forge_plugins.mathematics.task_weights import RateOfFall, Uncertainty

TEMPERATURE: Final = 2.0
"""Of the distillation, when `temperature_scaling` is on."""
PADDING: Final = -100
"""The target that counts as nothing, as torch's cross-entropy has it."""

Function = Callable[..., Tensor]
_Weight = Annotated[float, Meta(ge=0)]


class LossType(enum.Enum):
    """What is learned."""

    CLASSIFICATION = "classification"
    REGRESSION = "regression"
    GENERATION = "generation"
    CONTRASTIVE = "contrastive"
    AUXILIARY = "auxiliary"
    MULTI_TASK = "multi_task"


class LossConfig(Configuration):
    """Weights and forms of the losses.

    - `loss_type`: the loss of a manager that has none registered, and the one under the kinds
      "bitnet" and "grokfast";
    - `label_smoothing`, `class_weights`, `focal_loss_gamma` (0: plain cross-entropy): of
      classification, all of them together too; `label_smoothing` of generation too;
    - `reduction`: of the samples;
    - `quantization_loss_weight`: of the latent weights' distance to their levels;
      `sparsity_loss_weight`: of their mean magnitude, in steps between levels;
      `consistency_loss_weight`: of the divergence from what the model answers with its latent
      weights (one more forward pass; needs `inputs`);
    - `knowledge_distillation_weight`: of the divergence from `teacher_logits`, at temperature 2
      with `temperature_scaling`, else 1; `capability_acquisition_weight`: of the margin by which
      right answers fail to lead by 1; `regularization_weight`: of the mean squared parameter;
    - `adaptive_weighting`: a manager's losses that fall more slowly weigh more (the weights' mean
      stays 1); `uncertainty_weighting`: learned weights instead; `task_weights`: of several tasks.
    """

    loss_type: LossType = LossType.CLASSIFICATION
    label_smoothing: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    class_weights: list[_Weight] | None = None
    reduction: Literal["mean", "sum", "none"] = "mean"
    quantization_loss_weight: _Weight = 0.01
    sparsity_loss_weight: _Weight = 0.001
    consistency_loss_weight: _Weight = 0.1
    knowledge_distillation_weight: _Weight = 0.5
    capability_acquisition_weight: _Weight = 0.2
    regularization_weight: _Weight = 0.01
    adaptive_weighting: bool = True
    temperature_scaling: bool = True
    focal_loss_gamma: _Weight = 0.0
    task_weights: dict[str, _Weight] | None = None
    uncertainty_weighting: bool = False


class BaseLoss(nn.Module):
    """`loss(predictions, targets, **further)`; what a loss does not read of `further` it ignores.

    Args:
        config: read at each call.
    """

    def __init__(self, config: LossConfig | None = None) -> None:
        super().__init__()
        self.config = config or LossConfig()

    def forward(self, predictions: Any, targets: Any, **further: Any) -> Tensor:
        """0-d, or one value for each sample with the reduction "none"."""
        raise NotImplementedError

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
        losses, weights = classification_losses(
            predictions,
            targets.reshape(-1).long(),
            class_weights=None if wanted is None else predictions.new_tensor(list(wanted)),
            label_smoothing=self.config.label_smoothing,
            focal_gamma=self.config.focal_loss_gamma,
            ignored=PADDING,
        )
        return self.reduced(losses, weights)


class RegressionLoss(BaseLoss):
    """Distance of predictions from numbers of the same shape, or with as many entries.

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
        if predictions.numel() != targets.numel():
            raise ValueError(
                f"predictions of shape {tuple(predictions.shape)} for targets of shape "
                f"{tuple(targets.shape)}"
            )
        wanted = targets.to(predictions.dtype).view_as(predictions)
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
        losses, weights = classification_losses(
            predictions.flatten(0, -2),
            targets.reshape(-1).long(),
            label_smoothing=self.config.label_smoothing,
            ignored=PADDING,
        )
        return self.reduced(losses, weights)


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


class BitNetLoss(BaseLoss):
    """A loss, plus what keeps quantized weights close to their levels when `model` is given.

    Args:
        config: see `LossConfig`.
        base: the loss.
    """

    def __init__(self, config: LossConfig, base: Function) -> None:
        super().__init__(config)
        self.base = base

    def forward(self, predictions: Any, targets: Any, **further: Any) -> Tensor:
        """Reads `model`, and `inputs` for the consistency (positional input, or a mapping)."""
        loss: Tensor = self.base(predictions, targets)
        model, config = further.get("model"), self.config
        if model is None:
            return loss
        if config.quantization_loss_weight:
            loss = loss + config.quantization_loss_weight * mean_quantization_distance(model)
        if config.sparsity_loss_weight:
            loss = loss + config.sparsity_loss_weight * _mean_magnitude(model)
        inputs = further.get("inputs")
        if config.consistency_loss_weight and inputs is not None:
            latent = _latent_answer(model, inputs)
            loss = loss + config.consistency_loss_weight * distillation(predictions, latent, 1.0)
        return loss


class GrokfastLoss(BaseLoss):
    """A loss, plus distillation when `teacher_logits` are given, and the rest with `model`.

    Args:
        config: see `LossConfig`.
        base: the loss.
    """

    def __init__(self, config: LossConfig, base: Function) -> None:
        super().__init__(config)
        self.base = base

    def forward(self, predictions: Any, targets: Any, **further: Any) -> Tensor:
        """Reads `teacher_logits` and `model`."""
        loss: Tensor = self.base(predictions, targets)
        teacher, model, config = further.get("teacher_logits"), further.get("model"), self.config
        if teacher is not None and config.knowledge_distillation_weight:
            temperature = TEMPERATURE if config.temperature_scaling else 1.0
            told = distillation(predictions, teacher.detach(), temperature)
            loss = loss + config.knowledge_distillation_weight * told
        if model is None:
            return loss
        if config.capability_acquisition_weight and predictions.ndim == 2:
            lacking = _lacking_margin(predictions, targets)
            loss = loss + config.capability_acquisition_weight * lacking
        if config.regularization_weight:
            loss = loss + config.regularization_weight * _mean_square(model)
        return loss


def _mean_magnitude(model: nn.Module) -> Tensor:
    """Mean |latent weight| over all quantized weights, in units of each one's root mean square."""
    weights = {id(one.weight): one.weight for one in model.modules() if isinstance(one, BitLayer)}
    parts = [
        weight.abs().sum() / weight.detach().square().mean().sqrt().clamp_min(1e-12)
        for weight in weights.values()
    ]
    return torch.stack(parts).sum() / sum(weight.numel() for weight in weights.values())


def _latent_answer(model: nn.Module, inputs: Any) -> Tensor:
    """What the model answers when its layers apply their latent weights."""
    controls = {
        id(one.control): one.control for one in model.modules() if isinstance(one, BitLayer)
    }
    blends = [(control, control.blend) for control in controls.values()]
    try:
        for control, _ in blends:
            control.blend = 0.0
        with torch.no_grad():
            found: Tensor = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
        return found
    finally:
        for control, blend in blends:
            control.blend = blend


def _lacking_margin(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of `max(0, 1 - (right logit - best wrong logit))`: 0 when all answers lead by 1."""
    targets = targets.reshape(-1, 1).long()
    right = logits.gather(1, targets).squeeze(1)
    wrong = logits.scatter(1, targets, -torch.inf).amax(1)
    return functional.relu(1.0 - (right - wrong)).mean()


def _mean_square(model: nn.Module) -> Tensor:
    parameters = [one for one in model.parameters() if one.requires_grad]
    return torch.stack([one.square().sum() for one in parameters]).sum() / sum(
        one.numel() for one in parameters
    )


class MultiTaskLoss(BaseLoss):
    """The weighted sum of the tasks' losses; predictions and targets are mappings by task.

    A single target is every task's. With `uncertainty_weighting` the weights are parameters of this
    module: hand `loss.parameters()` to the optimizer (a `TrainingLoop` does).

    Args:
        config: `task_weights` by name (others: 1), `uncertainty_weighting`.
        task_losses: by name.

    Raises:
        ValueError: a weight of an unknown task.
    """

    def __init__(self, config: LossConfig, task_losses: Mapping[str, Function]) -> None:
        super().__init__(config)
        self.task_losses = dict(task_losses)
        _check_tasks(config, self.task_losses)
        self.modules_of_tasks = nn.ModuleList(
            one for one in task_losses.values() if isinstance(one, nn.Module)
        )
        self.uncertainty = Uncertainty(tuple(task_losses)) if config.uncertainty_weighting else None

    def forward(self, predictions: Any, targets: Any, **further: Any) -> Tensor:
        """0-d.

        Raises:
            KeyError: a task without a prediction.
        """
        found = []
        weights = self.config.task_weights or {}
        for name, loss in self.task_losses.items():
            aim = targets[name] if isinstance(targets, Mapping) else targets
            answer = predictions[name] if isinstance(predictions, Mapping) else predictions
            found.append(weights.get(name, 1.0) * _called(loss, answer, aim, further))
        stacked = torch.stack(found)
        return stacked.sum() if self.uncertainty is None else self.uncertainty(stacked)


def _check_tasks(config: LossConfig, tasks: Mapping[str, Function]) -> None:
    unknown = sorted(set(config.task_weights or {}) - set(tasks))
    if unknown or not tasks:
        raise ValueError(f"task_weights of unknown tasks {unknown}; tasks: {sorted(tasks)}")


class AdaptiveLoss(BaseLoss):
    """Several losses of the same predictions; those that fall more slowly weigh more.

    The weights are `n softmax(rate of fall / 2)` of `RateOfFall`: their mean is 1. With
    `adaptive_weighting` off they are 1.

    Args:
        config: see `LossConfig`.
        base: losses by name, or one loss (whose weight stays 1).
    """

    def __init__(self, config: LossConfig, base: Function | Mapping[str, Function]) -> None:
        super().__init__(config)
        self.losses = dict(base) if isinstance(base, Mapping) else {"base": base}
        self.progress = RateOfFall(len(self.losses), 0.99)

    def forward(self, predictions: Any, targets: Any, **further: Any) -> Tensor:
        """0-d."""
        found = [_called(loss, predictions, targets, further) for loss in self.losses.values()]
        stacked = torch.stack(found)
        if not self.config.adaptive_weighting:
            return stacked.sum()
        if torch.is_grad_enabled():
            self.progress.take(stacked.detach())
        total: Tensor = (stacked * self.progress.weights(2.0, like=stacked)).sum()
        return total

    def weights(self) -> dict[str, float]:
        """The weights as they are now, read to the host."""
        found = self.progress.weights(2.0, like=torch.ones(len(self.losses)))
        return dict(zip(self.losses, found.tolist(), strict=True))


def _called(loss: Function, predictions: Any, targets: Any, further: Mapping[str, Any]) -> Tensor:
    """A loss with as much of `further` as its signature takes."""
    if not further:
        return loss(predictions, targets)
    known = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss).parameters
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values()):
        return loss(predictions, targets, **further)
    return loss(predictions, targets, **{k: v for k, v in further.items() if k in known})


class LossManager(nn.Module):
    """Several losses under one call, with their statistics.

    Args:
        config: see `LossConfig`; without a registered loss that of `loss_type` is computed.
    """

    def __init__(self, config: LossConfig | None = None) -> None:
        super().__init__()
        self.config = config or LossConfig()
        self._losses: dict[str, Function] = {}
        self._modules_of_losses = nn.ModuleList()
        self._weights: dict[str, float] = {}
        self._progress: RateOfFall | None = None
        self._uncertainty: Uncertainty | None = None
        self._statistics: Tensor | None = None  # (5, losses): count, sum, least, most, last

    def register_loss(self, name: str, loss: Function, weight: float = 1.0) -> None:
        """Add a loss; statistics and adaptive weights begin anew.

        Args:
            name: its key in the results.
            loss: `loss(predictions, targets)`; gets those of `compute_total_loss`'s further
                arguments that its signature names.
            weight: factor in the total.

        Raises:
            ValueError: the name is taken (also by `total_loss`), or the weight is negative.
        """
        if name in self._losses or name == "total_loss":
            raise ValueError(f"the name '{name}' is taken: {[*self._losses, 'total_loss']}")
        self._check_weight(name, weight)
        self._losses[name] = loss
        self._weights[name] = float(weight)
        if isinstance(loss, nn.Module):
            self._modules_of_losses.append(loss)
        self._progress = self._statistics = None
        if self.config.uncertainty_weighting:
            self._uncertainty = Uncertainty(tuple(self._losses))

    @staticmethod
    def _check_weight(name: str, weight: float) -> None:
        if not 0.0 <= weight < float("inf"):
            raise ValueError(f"weight {weight} of '{name}' is not a number from 0 on")

    def compute_total_loss(
        self, predictions: Any, targets: Any, **further: Any
    ) -> dict[str, Tensor]:
        """Each loss by name, and `total_loss`, their weighted sum; all with gradient.

        Args:
            predictions: handed to each loss.
            targets: handed to each loss.
            further: `model`, `inputs`, `teacher_logits`, or what a loss of your own names.

        Raises:
            Exception: what a loss raises; none is left out.
        """
        if not self._losses:
            self.register_loss(
                self.config.loss_type.value,
                create_loss_function(self.config.loss_type, self.config),
            )
        found = {
            name: _called(loss, predictions, targets, further)
            for name, loss in self._losses.items()
        }
        for name, value in found.items():
            if value.ndim:
                raise ValueError(f"the loss '{name}' has shape {tuple(value.shape)}, not one value")
        stacked = torch.stack(list(found.values()))
        factors = stacked.new_tensor(list(self._weights.values()))
        total = self._total(stacked, factors)
        self._count(stacked.detach())
        return {**found, "total_loss": total}

    def _total(self, losses: Tensor, factors: Tensor) -> Tensor:
        if self._uncertainty is not None:
            learned: Tensor = self._uncertainty.to(losses.device)(losses * factors)
            return learned
        if not self.config.adaptive_weighting or len(losses) == 1:
            return (losses * factors).sum()
        if self._progress is None:
            self._progress = RateOfFall(len(losses), 0.99)
        if torch.is_grad_enabled():
            self._progress.take(losses.detach())
        return (losses * factors * self._progress.weights(2.0, like=losses)).sum()

    def _count(self, losses: Tensor) -> None:
        """On the device, without a read to the host."""
        values = losses.float()
        one = torch.ones_like(values)
        if self._statistics is None:
            self._statistics = torch.stack((one, values, values, values, values))
            return
        count, total, least, most, _ = self._statistics.to(values.device)
        self._statistics = torch.stack(
            (count + one, total + values, least.minimum(values), most.maximum(values), values)
        )

    def get_loss_statistics(self) -> dict[str, dict[str, float]]:
        """By loss: `count`, `mean`, `min`, `max`, `last`, and its `weight` in the total now."""
        if self._statistics is None:
            return {}
        adaptive = torch.ones(len(self._losses))
        if self._progress is not None:
            adaptive = self._progress.weights(2.0, like=adaptive)
        columns = self._statistics.cpu().T.tolist()
        return {
            name: {
                "count": count, "mean": total / count, "min": least, "max": most, "last": last,
                "weight": self._weights[name] * float(factor),
            }
            for (name, factor), (count, total, least, most, last) in zip(
                zip(self._losses, adaptive, strict=True), columns, strict=True
            )
        }  # fmt: skip

    def update_weights(self, weights: Mapping[str, float]) -> None:
        """Set the factors of losses.

        Raises:
            ValueError: an unknown loss, or a negative weight; nothing is changed.
        """
        unknown = sorted(set(weights) - set(self._losses))
        if unknown:
            raise ValueError(f"unknown losses {unknown}; there are {sorted(self._losses)}")
        for name, weight in weights.items():
            self._check_weight(name, weight)
        self._weights.update({name: float(weight) for name, weight in weights.items()})


_PLAIN: Final[dict[str, Callable[..., BaseLoss]]] = {
    "classification": ClassificationLoss,
    "regression": RegressionLoss,
    "generation": GenerationLoss,
    "contrastive": ContrastiveLoss,
    "auxiliary": AuxiliaryLoss,
    "multi_task": MultiTaskLoss,
}
_AROUND: Final[dict[str, Callable[..., BaseLoss]]] = {
    "bitnet": BitNetLoss,
    "grokfast": GrokfastLoss,
}


def create_loss_function(
    kind: str | LossType, config: LossConfig | None = None, **options: Any
) -> BaseLoss:
    """A loss by name.

    Args:
        kind: classification, regression, generation, contrastive, auxiliary or multi_task; one of
            them after `bitnet_` or `grokfast_`; `bitnet` or `grokfast` alone (around `loss_type`).
        config: see `LossConfig`.
        options: of the loss's constructor (`num_classes`, `distance`, `temperature`,
            `task_losses`).

    Raises:
        ValueError: an unknown kind; the message lists the known ones.
    """
    config = config or LossConfig()
    name = kind.value if isinstance(kind, LossType) else kind
    around, _, plain = name.partition("_")
    if around in _AROUND:
        plain = plain or config.loss_type.value
        if plain in _PLAIN:
            return _AROUND[around](config, _PLAIN[plain](config, **options))
    if name not in _PLAIN:
        known = [*_PLAIN, *_AROUND, *(f"{one}_{base}" for one in _AROUND for base in _PLAIN)]
        raise ValueError(f"no loss '{name}'; there are {', '.join(known)}")
    return _PLAIN[name](config, **options)
