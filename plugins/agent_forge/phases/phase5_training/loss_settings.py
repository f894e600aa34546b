"""Settings of the losses."""

from __future__ import annotations

import enum
from typing import Annotated, Final, Literal

from msgspec import Meta

from agent_forge.phases.phase5_training.configuration import Configuration

SCALED: Final = 2.0
"""Temperature of the distillation with `temperature_scaling`."""

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
    """Weights and forms of the losses. A weight of 0 is off.

    - `loss_type`: the loss of a pipeline, that of a manager that has none registered, and the one
      under the kinds "bitnet" and "grokfast";
    - `label_smoothing`, `class_weights`, `focal_loss_gamma` (0: plain cross-entropy): of
      classification, all of them together too; `label_smoothing` of generation too;
    - `reduction`: of the samples; a pipeline's is the mean;
    - `quantization_loss_weight`: of the latent weights' distance to their levels;
      `sparsity_loss_weight`: of their mean magnitude, in units of each one's root mean square;
      `consistency_loss_weight`: of the divergence from what the model answers with its latent
      weights (one more forward pass). They need quantized layers;
    - `knowledge_distillation_weight`: of the divergence from a teacher, at temperature 2 with
      `temperature_scaling`, else 1. The teacher's answers are `teacher_logits` of the call or of
      the batch; in a pipeline the teacher is the model as it was handed in, before BitNet;
    - `capability_acquisition_weight`: of the margin by which right answers fail to lead by 1;
      `regularization_weight`: of the mean squared parameter;
    - `adaptive_weighting`: losses that fall more slowly weigh more (the weights' mean stays 1);
      None: so in an `AdaptiveLoss` or a `LossManager`, not in a pipeline;
    - `uncertainty_weighting`: learned weights instead; `task_weights`: factors by name. Both are of
      a `MultiTaskLoss`'s tasks, and of a pipeline's terms: the loss by the name of its type, and
      `capability_acquisition`.
    """

    loss_type: LossType = LossType.CLASSIFICATION
    label_smoothing: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    class_weights: list[_Weight] | None = None
    reduction: Literal["mean", "sum", "none"] = "mean"
    quantization_loss_weight: _Weight = 0.01
    sparsity_loss_weight: _Weight = 0.0
    consistency_loss_weight: _Weight = 0.0
    knowledge_distillation_weight: _Weight = 0.0
    capability_acquisition_weight: _Weight = 0.0
    regularization_weight: _Weight = 0.0
    adaptive_weighting: bool | None = None
    temperature_scaling: bool = True
    focal_loss_gamma: _Weight = 0.0
    task_weights: dict[str, _Weight] | None = None
    uncertainty_weighting: bool = False

    @property
    def temperature(self) -> float:
        """Of the distillation."""
        return SCALED if self.temperature_scaling else 1.0
