"""Losses for programs with a training loop of their own: the mathematics of the loss plugins."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from agent_forge.phases.phase5_training.loss_settings import LossConfig, LossType
from agent_forge.phases.phase5_training.pipeline.bitnet_optimizer import mean_quantization_distance
from agent_forge.phases.phase5_training.single_losses import (
    PADDING,
    AuxiliaryLoss,
    BaseLoss,
    ClassificationLoss,
    ContrastiveLoss,
    GenerationLoss,
    RegressionLoss,
)
from forge_plugins.mathematics.losses.distillation import distillation
from forge_plugins.mathematics.losses.latent_answer import latent_answer
from forge_plugins.mathematics.losses.loss_weights import RateOfFall, Uncertainty
from forge_plugins.mathematics.metrics.lacking_margin import lacking_margin
from forge_plugins.mathematics.quantization.bit_layer import BitLayer
from forge_plugins.mathematics.quantization.weight_size import mean_magnitude, mean_square

__all__ = [
    "AdaptiveLoss",
    "AuxiliaryLoss",
    "BaseLoss",
    "BitNetLoss",
    "ClassificationLoss",
    "ContrastiveLoss",
    "GenerationLoss",
    "GrokfastLoss",
    "LossConfig",
    "LossManager",
    "LossType",
    "MultiTaskLoss",
    "RegressionLoss",
    "create_loss_function",
]

ADAPTIVE_DECAY: Final = 0.99
"""Of the averages that tell how fast a loss falls."""

Function = Callable[..., Tensor]


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
        loss: Tensor = _called(self.base, predictions, targets, further)
        model, config = further.get("model"), self.config
        if model is None or not self._quantized(model):
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

    def needs(self) -> Mapping[str, str]:
        """What the loss inside needs."""
        return _needs([self.base])

    def _quantized(self, model: nn.Module) -> bool:
        """Whether there are weights with levels; a weight that the program set asks for them."""
        if any(isinstance(item, BitLayer) and item.scheme.quantizes_weight
               for item in model.modules()):  # fmt: skip
            return True
        names = ("quantization_loss_weight", "sparsity_loss_weight", "consistency_loss_weight")
        asked = [item for item in names if self.config.given(item) and getattr(self.config, item)]
        if asked:
            raise ValueError(
                f"LossConfig.{asked[0]} is of quantized layers, and the model has none: call "
                "convert_model_to_bitnet(model, config) first, or set it to 0"
            )
        return False


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
        loss: Tensor = _called(self.base, predictions, targets, further)
        teacher, model, config = further.get("teacher_logits"), further.get("model"), self.config
        if teacher is not None and config.knowledge_distillation_weight:
            divergence = distillation(predictions, teacher.detach(), config.temperature)
            loss = loss + config.knowledge_distillation_weight * divergence
        if model is None:
            return loss
        if config.capability_acquisition_weight:
            lacking = _lacking_margin(predictions, targets)
            loss = loss + config.capability_acquisition_weight * lacking
        if config.regularization_weight:
            loss = loss + config.regularization_weight * _mean_square(model)
        return loss

    def needs(self) -> Mapping[str, str]:
        """The teacher's answers, when they are learned from; and what the loss inside needs."""
        asked = self.config.knowledge_distillation_weight
        own = {"teacher_logits": "knowledge_distillation_weight"} if asked else {}
        return {**own, **_needs([self.base])}


def _mean_magnitude(model: nn.Module) -> Tensor:
    """Of the latent weights of all quantized layers."""
    layers = [item for item in model.modules() if isinstance(item, BitLayer)]
    return mean_magnitude([item.weight for item in layers if item.scheme.quantizes_weight])


def _latent_answer(model: nn.Module, inputs: Any) -> Tensor:
    """What the model answers when its layers apply their latent weights."""

    def call() -> Tensor:
        result: Tensor = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
        return result

    return latent_answer(model, call)


def _lacking_margin(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of `max(0, 1 - (right logit - best wrong logit))`: 0 when all answers lead by 1.

    Raises:
        ValueError: the targets are no classes.
    """
    if targets.is_floating_point():
        raise ValueError(
            "LossConfig.capability_acquisition_weight is of answers that are right or wrong: the "
            "targets are numbers, not classes; set it to 0"
        )
    targets = targets.reshape(-1)
    counted = (targets != PADDING).to(logits.dtype)
    lacking = lacking_margin(logits.flatten(0, -2), targets.clamp_min(0).long())
    return (lacking * counted).sum() / counted.sum().clamp_min(1.0)


def _mean_square(model: nn.Module) -> Tensor:
    return mean_square([item for item in model.parameters() if item.requires_grad])


class MultiTaskLoss(BaseLoss):
    """The weighted sum of the tasks' losses; predictions and targets are mappings by task.

    A single target is every task's. With `uncertainty_weighting` the weights are parameters of this
    module: hand `loss.parameters()` to the optimizer (`TrainingLoop` and `GrokfastTrainer` do).

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
            item for item in task_losses.values() if isinstance(item, nn.Module)
        )
        self.uncertainty = Uncertainty(tuple(task_losses)) if config.uncertainty_weighting else None

    def forward(self, predictions: Any, targets: Any, **further: Any) -> Tensor:
        """0-d.

        Raises:
            KeyError: a task without a prediction.
        """
        result = []
        weights = self.config.task_weights or {}
        for name, loss in self.task_losses.items():
            aim = targets[name] if isinstance(targets, Mapping) else targets
            answer = predictions[name] if isinstance(predictions, Mapping) else predictions
            result.append(weights.get(name, 1.0) * _called(loss, answer, aim, further))
        stacked = torch.stack(result)
        if self.uncertainty is None:
            return stacked.sum()
        learned: Tensor = self.uncertainty.to(stacked.device)(stacked)
        return learned

    def needs(self) -> Mapping[str, str]:
        """What the tasks' losses need."""
        return _needs(self.task_losses.values())


def _check_tasks(config: LossConfig, tasks: Mapping[str, Function]) -> None:
    unknown = sorted(set(config.task_weights or {}) - set(tasks))
    if unknown or not tasks:
        raise ValueError(f"task_weights of unknown tasks {unknown}; tasks: {sorted(tasks)}")


class AdaptiveLoss(BaseLoss):
    """Several losses of the same predictions; those that fall more slowly weigh more.

    The weights are `n softmax(rate of fall / 2)` of `RateOfFall`: their mean is 1. With
    `adaptive_weighting` off they are 1. The averages behind them are of training (a call without
    gradients leaves them alone), and part of the module's state.

    Args:
        config: see `LossConfig`.
        base: losses by name, or one loss (whose weight stays 1).
    """

    def __init__(self, config: LossConfig, base: Function | Mapping[str, Function]) -> None:
        super().__init__(config)
        self.losses = dict(base) if isinstance(base, Mapping) else {"base": base}
        self.modules_of_losses = nn.ModuleList(
            item for item in self.losses.values() if isinstance(item, nn.Module)
        )
        self.progress = RateOfFall(len(self.losses), ADAPTIVE_DECAY)

    def forward(self, predictions: Any, targets: Any, **further: Any) -> Tensor:
        """0-d."""
        result = [_called(loss, predictions, targets, further) for loss in self.losses.values()]
        stacked = torch.stack(result)
        if self.config.adaptive_weighting is False:
            return stacked.sum()
        if torch.is_grad_enabled():
            self.progress.take(stacked.detach())
        total: Tensor = (stacked * self.progress.weights(2.0, like=stacked)).sum()
        return total

    def weights(self) -> dict[str, float]:
        """The weights as they are now, read to the host."""
        result = self.progress.weights(2.0, like=torch.ones(len(self.losses)))
        return dict(zip(self.losses, result.tolist(), strict=True))

    def needs(self) -> Mapping[str, str]:
        """What the losses need."""
        return _needs(self.losses.values())


def _needs(losses: Iterable[Function]) -> dict[str, str]:
    result: dict[str, str] = {}
    for loss in losses:
        if isinstance(loss, BaseLoss | LossManager):
            result |= loss.needs()
    return result


def _called(loss: Function, predictions: Any, targets: Any, further: Mapping[str, Any]) -> Tensor:
    """A loss with as much of `further` as its signature takes."""
    if not further:
        return loss(predictions, targets)
    try:
        known = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss).parameters
    except (TypeError, ValueError):  # a builtin does not tell
        return loss(predictions, targets)
    if any(item.kind is inspect.Parameter.VAR_KEYWORD for item in known.values()):
        return loss(predictions, targets, **further)
    return loss(predictions, targets, **{k: v for k, v in further.items() if k in known})


class LossManager(nn.Module):
    """Several losses under one call, with their statistics.

    It is a loss function itself: `manager(predictions, targets)` is the total, and a training takes
    its learned weights along. Averages and statistics are of training: a call without gradients
    leaves them alone.

    Args:
        config: see `LossConfig`; without a registered loss that of `loss_type` is computed.
    """

    def __init__(self, config: LossConfig | None = None) -> None:
        super().__init__()
        self.config = config or LossConfig()
        self._losses: dict[str, Function] = {}
        self._modules_of_losses = nn.ModuleList()
        self._weights: dict[str, float] = {}
        self._progress = RateOfFall(0, ADAPTIVE_DECAY)
        self._uncertainty: Uncertainty | None = None
        self._statistics: Tensor  # (5, losses): count, sum, least, most, last
        self._begin()

    def _begin(self) -> None:
        """Averages, learned weights and statistics of the losses there are."""
        count = len(self._losses)
        self._progress = RateOfFall(count, ADAPTIVE_DECAY)
        nothing = [torch.zeros(count), torch.full((count,), torch.inf)]
        zero, most = nothing
        self.register_buffer("_statistics", torch.stack((zero, zero, most, -most, zero)))
        if self.config.uncertainty_weighting and count:
            self._uncertainty = Uncertainty(tuple(self._losses))

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
        self._begin()

    @staticmethod
    def _check_weight(name: str, weight: float) -> None:
        if not 0.0 <= weight < float("inf"):
            raise ValueError(f"weight {weight} of '{name}' is not a number from 0 on")

    def _complete(self) -> None:
        """Without a registered loss that of `loss_type` is computed."""
        if not self._losses:
            kind = self.config.loss_type
            self.register_loss(kind.value, create_loss_function(kind, self.config))

    def needs(self) -> Mapping[str, str]:
        """What batches must hold for a training, each with the setting that asks for it."""
        self._complete()
        return _needs(self._losses.values())

    def forward(self, predictions: Any, targets: Any, **further: Any) -> Tensor:
        """The `total_loss` of `compute_total_loss`."""
        return self.compute_total_loss(predictions, targets, **further)["total_loss"]

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
        self._complete()
        result = {
            name: _called(loss, predictions, targets, further)
            for name, loss in self._losses.items()
        }
        for name, value in result.items():
            if value.ndim:
                raise ValueError(f"the loss '{name}' has shape {tuple(value.shape)}, not one value")
        stacked = torch.stack(list(result.values()))
        factors = stacked.new_tensor(list(self._weights.values()))
        total = self._total(stacked, factors)
        if torch.is_grad_enabled():
            self._count(stacked)
        return {**result, "total_loss": total}

    def _total(self, losses: Tensor, factors: Tensor) -> Tensor:
        if self._uncertainty is not None:
            learned: Tensor = self._uncertainty.to(losses.device)(losses * factors)
            return learned
        if self.config.adaptive_weighting is False or len(losses) == 1:
            return (losses * factors).sum()
        if torch.is_grad_enabled():
            self._progress.take(losses.detach())
        return (losses * factors * self._progress.weights(2.0, like=losses)).sum()

    @torch.no_grad()
    def _count(self, losses: Tensor) -> None:
        """On the device, without a read to the host; a step that is not finite is not counted."""
        values = losses.detach().float()
        if self._statistics.device != values.device:
            self._statistics = self._statistics.to(values.device)
        count, total, least, most, _ = self._statistics
        taken = torch.stack(
            (count + 1.0, total + values, least.minimum(values), most.maximum(values), values)
        )
        finite = torch.isfinite(values).all()
        self._statistics.copy_(torch.where(finite, taken, self._statistics))

    def get_loss_statistics(self) -> dict[str, dict[str, float]]:
        """By loss: `count`, `mean`, `min`, `max`, `last`, and its `weight` in the total now."""
        columns = self._statistics.cpu().T.tolist()
        if not columns or not columns[0][0]:
            return {}
        adaptive = self._progress.weights(2.0, like=torch.ones(len(self._losses)))
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
        known = [*_PLAIN, *_AROUND, *(f"{item}_{base}" for item in _AROUND for base in _PLAIN)]
        raise ValueError(f"no loss '{name}'; there are {', '.join(known)}")
    return _PLAIN[name](config, **options)
