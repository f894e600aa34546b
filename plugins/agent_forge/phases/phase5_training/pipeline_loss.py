"""The loss of a pipeline, with its further terms, as the kernel's plugins."""

from __future__ import annotations

from typing import Any, Final

from agent_forge.phases.phase5_training.configuration import SettingError
from agent_forge.phases.phase5_training.loss_settings import LossConfig, LossType
from agent_forge.phases.phase5_training.pipeline.bitnet_optimizer import BitNetConfig
from forge_kernel.api import Use, UseLoss, UseRegularizer

MARGIN: Final = "capability_acquisition"
_OF_BITNET: Final = (
    "quantization_loss_weight", "sparsity_loss_weight", "consistency_loss_weight",
    "knowledge_distillation_weight",
)  # fmt: skip
"""Weights of terms that quantized layers have, or that the model before BitNet teaches."""
_OF_CLASSES: Final = (
    "label_smoothing", "class_weights", "focal_loss_gamma", "capability_acquisition_weight",
)  # fmt: skip

_Nested = dict[str, Any]


def pipeline_loss(config: LossConfig, bitnet: BitNetConfig | None, notices: list[str]) -> Use[Any]:
    """The loss of the samples.

    Args:
        config: its settings.
        bitnet: of the layers; None: there are no quantized ones.
        notices: what is to be told is added.

    Raises:
        SettingError: a setting that nothing would read here, with the reason.
    """
    _check(config, bitnet)
    result = _weighted(config, _terms(config), notices)
    if config.consistency_loss_weight:
        inner = {"loss": result, "weight": config.consistency_loss_weight}
        result = {"use": "consistency", "with": inner}
    if config.knowledge_distillation_weight:
        result = {"use": "distillation", "with": {
            "loss": result, "target_weight": 1.0, "temperature": config.temperature,
            "weight": config.knowledge_distillation_weight,
        }}  # fmt: skip
    return UseLoss(result["use"], result["with"])


def pipeline_regularizers(config: LossConfig, bitnet: BitNetConfig | None) -> tuple[Use[Any], ...]:
    """The terms of the weights."""
    result: list[Use[Any]] = []
    if bitnet is not None and bitnet.bits < 16:
        if config.quantization_loss_weight:
            strength = {"strength": config.quantization_loss_weight}
            result.append(UseRegularizer("quantization_distance", strength))
        if config.sparsity_loss_weight:
            result.append(UseRegularizer("weight_size", {
                "strength": config.sparsity_loss_weight, "measure": "magnitude",
                "weights": "quantized",
            }))  # fmt: skip
    if config.regularization_weight:
        strength = {"strength": config.regularization_weight}
        result.append(UseRegularizer("weight_size", strength))
    return tuple(result)


def _check(config: LossConfig, bitnet: BitNetConfig | None) -> None:
    if config.loss_type not in (LossType.CLASSIFICATION, LossType.REGRESSION):
        raise SettingError(
            f"LossConfig.loss_type {config.loss_type.name}: the pipeline reads samples with a "
            "class or a number as target; train others with TrainingLoop"
        )
    config.refuse(
        "reduction",
        "a pipeline's loss is the mean over samples, so that micro-batches of all sizes count "
        "alike; it is of create_loss_function",
    )
    if config.loss_type is LossType.REGRESSION:
        for name in _OF_CLASSES:
            config.refuse(name, "loss_type is REGRESSION, and it is of classes")
    if bitnet is None or bitnet.bits >= 16:
        for name in _OF_BITNET:
            config.refuse(name, "no weight is quantized: say use_bitnet=True, with weight_bits "
                          "below 16")  # fmt: skip
    if not config.knowledge_distillation_weight:
        config.refuse("temperature_scaling", "knowledge_distillation_weight is 0")


def _terms(config: LossConfig) -> dict[str, _Nested]:
    """The losses that are weighed against each other, by name."""
    if config.loss_type is LossType.REGRESSION:
        return {config.loss_type.value: {"use": "regression", "with": {}}}
    settings: _Nested = {
        "label_smoothing": config.label_smoothing,
        "focal_gamma": config.focal_loss_gamma,
    }
    if config.class_weights is not None:
        settings["class_weights"] = list(config.class_weights)
    result: dict[str, _Nested] = {
        config.loss_type.value: {"use": "cross_entropy", "with": settings}
    }
    if config.capability_acquisition_weight:
        result[MARGIN] = {"use": "margin", "with": {}}
    return result


def _weighted(config: LossConfig, terms: dict[str, _Nested], notices: list[str]) -> _Nested:
    """The only term as it is, or the sum of several; with learned or adaptive weights if asked."""
    weights = dict(config.task_weights or {})
    unknown = sorted(set(weights) - set(terms))
    if unknown:
        raise SettingError(
            f"LossConfig.task_weights names {unknown}; the terms of this pipeline are "
            f"{sorted(terms)}"
        )
    adaptive = bool(config.adaptive_weighting)
    if adaptive and (config.uncertainty_weighting or len(terms) == 1):
        reason = (
            "uncertainty_weighting learns the weights" if config.uncertainty_weighting else
            f"it weighs several terms, and this pipeline has one: {', '.join(terms)} (see "
            "capability_acquisition_weight)"
        )  # fmt: skip
        config.refuse("adaptive_weighting", reason)
    if config.adaptive_weighting is False:
        notices.append(
            "LossConfig.adaptive_weighting: a pipeline's terms have fixed weights anyway"
        )
    if MARGIN in terms:
        weights[MARGIN] = weights.get(MARGIN, 1.0) * config.capability_acquisition_weight
    if len(terms) == 1 and not weights and not config.uncertainty_weighting:
        return next(iter(terms.values()))
    way = "uncertainty" if config.uncertainty_weighting else "adaptive" if adaptive else "fixed"
    return {"use": "multi_task", "with": {"tasks": terms, "weights": weights, "weighting": way}}
