"""Settings of Grokfast: the filter, the phases, the capabilities."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from msgspec import Meta

from agent_forge.phases.phase5_training.configuration import Configuration

ADAPTATION_FACTOR = 1.25  # of lambda_reg and of the memory 1 / (1 - alpha), at each judgement


class GrokfastPhase(enum.Enum):
    """The phases in their order."""

    WARMUP = "warmup"
    ACCELERATION = "acceleration"
    CONSOLIDATION = "consolidation"
    REFINEMENT = "refinement"
    COMPLETED = "completed"


class GrokfastConfig(Configuration):
    """The filter `g + lambda_reg * h`, `h = alpha * h + (1 - alpha) * g`; phases; capabilities.

    Lee et al. 2024, "Grokfast", arXiv 2405.20233. The multipliers are factors of the learning rate
    in their phases; the filter works in all of them.

    `adaptive_alpha`, `adaptive_lambda`: after each `performance_window` updates the mean loss is
    judged. When it has stalled, the memory `1 / (1 - alpha)` and `lambda_reg` grow by a quarter;
    when it has become worse they shrink, within the bounds of the kernel's filter. Each change is
    told.

    `gradient_checkpointing`: layers keep their inputs only and are computed again for backward.
    """

    aliases: ClassVar[Mapping[str, str]] = {
        "acceleration_lr_multiplier": "acceleration_multiplier",
        "consolidation_lr_multiplier": "consolidation_multiplier",
        "refinement_lr_multiplier": "refinement_multiplier",
    }
    without_meaning: ClassVar[Mapping[str, str]] = {
        "consolidation_threshold": "weights drawn together are kept when the validated metric is "
        "not worse, and there is no other threshold",
        "transfer_learning_enabled": "transfer is a call: KnowledgeConsolidation.transfer_to",
        "memory_efficient_attention": "the model decides that, in its forward",
    }

    alpha: Annotated[float, Meta(ge=0, lt=1)] = 0.98
    lambda_reg: Annotated[float, Meta(ge=0)] = 2.0
    enable_grokfast: bool = True
    warmup_steps: Annotated[int, Meta(ge=0)] = 1000
    acceleration_steps: Annotated[int, Meta(ge=0)] = 5000
    consolidation_steps: Annotated[int, Meta(ge=0)] = 2000
    refinement_steps: Annotated[int, Meta(ge=0)] = 1000
    base_learning_rate: Annotated[float, Meta(ge=0)] | None = None  # None: the optimizer's own
    acceleration_multiplier: Annotated[float, Meta(ge=0)] = 5.0
    consolidation_multiplier: Annotated[float, Meta(ge=0)] = 0.2
    refinement_multiplier: Annotated[float, Meta(ge=0)] = 0.1
    consolidation_threshold: float = 0.95
    knowledge_retention_weight: Annotated[float, Meta(gt=0, le=1)] = 0.8
    transfer_learning_enabled: bool = True
    capability_tracking: bool = True
    capability_threshold: float = 0.9
    min_capability_duration: Annotated[int, Meta(ge=1)] = 500  # updates
    adaptive_alpha: bool = False
    adaptive_lambda: bool = False
    performance_window: Annotated[int, Meta(ge=1)] = 100
    gradient_checkpointing: bool = False
    memory_efficient_attention: bool = False

    def lengths(self) -> dict[str, int]:
        """Optimizer steps of the phases, as the kernel's clock names its settings."""
        names = ("warmup_steps", "acceleration_steps", "consolidation_steps", "refinement_steps")
        return {name: getattr(self, name) for name in names}

    def filter_settings(self, log_every: int = 1) -> dict[str, Any]:
        """The settings of the kernel's filter.

        Args:
            log_every: optimizer steps between readings of the loss.
        """
        result: dict[str, Any] = {"alpha": self.alpha, "lambda_reg": self.lambda_reg}
        if self.adaptive_alpha or self.adaptive_lambda:
            result["adapt"] = {
                "source": "log",
                "window": max(1, self.performance_window // log_every),
                "alpha_factor": ADAPTATION_FACTOR if self.adaptive_alpha else 1.0,
                "lambda_factor": ADAPTATION_FACTOR if self.adaptive_lambda else 1.0,
            }
        return result

    def multipliers(self) -> dict[str, float]:
        """Factors of the rate, as the kernel's schedule names its settings."""
        return {
            "acceleration_multiplier": self.acceleration_multiplier,
            "consolidation_multiplier": self.consolidation_multiplier,
            "refinement_multiplier": self.refinement_multiplier,
            "completed_multiplier": self.refinement_multiplier,
        }
