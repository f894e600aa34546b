"""Settings of a whole pipeline."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any

from msgspec import Meta

from agent_forge.phases.phase5_training.configuration import Configuration, SettingError
from agent_forge.phases.phase5_training.grokfast_settings import GrokfastConfig
from agent_forge.phases.phase5_training.pipeline.bitnet_optimizer import BitNetConfig
from agent_forge.phases.phase5_training.pipeline.data_loader import DataConfig
from agent_forge.phases.phase5_training.pipeline.loss_functions import LossConfig
from agent_forge.phases.phase5_training.pipeline.validation import ValidationConfig
from agent_forge.phases.phase5_training.schedule_settings import SchedulerConfig
from agent_forge.phases.phase5_training.training_settings import TrainingConfig


class PipelineConfig(Configuration):
    """A whole pipeline.

    Where several groups name the same thing (the learning rate, the interval of validations, the
    patience), the one that the program set is meant; two that contradict each other are refused.
    """

    experiment_name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")] = (
        "agent_forge_training"
    )
    output_dir: str = "./training_output"
    device: str = "auto"
    seed: Annotated[int, Meta(ge=0, le=2**32 - 1)] = 0
    mixed_precision: bool = True
    distributed: bool = False
    data_config: DataConfig = field(default_factory=DataConfig)
    model_config: dict[str, int] = field(default_factory=dict)  # num_classes: labels are below it
    training_config: TrainingConfig = field(default_factory=TrainingConfig)
    bitnet_config: BitNetConfig | None = None
    grokfast_config: GrokfastConfig | None = None
    loss_config: LossConfig = field(default_factory=LossConfig)
    scheduler_config: SchedulerConfig = field(default_factory=SchedulerConfig)
    validation_config: ValidationConfig = field(default_factory=ValidationConfig)
    max_training_time: Annotated[float, Meta(gt=0)] | None = None  # seconds
    save_intermediate_checkpoints: bool = True
    auto_resume: bool = True
    performance_profiling: bool = True

    def check(self) -> None:
        """Also what the groups mean together."""
        super().check()
        if self.distributed:
            raise SettingError(
                "PipelineConfig.distributed: one process trains; several are not built yet. Leave "
                "it False"
            )
        if set(self.model_config) - {"num_classes"}:
            raise SettingError(
                f"PipelineConfig.model_config has {sorted(self.model_config)}: only num_classes is "
                "read, the model is handed in"
            )
        switches = (("bitnet_enabled", "bitnet"), ("grokfast_enabled", "grokfast"))
        for name, part in switches:
            if getattr(self.training_config, name) and getattr(self, f"{part}_config") is None:
                raise SettingError(
                    f"TrainingConfig.{name}: in a pipeline, say use_{part}=True (or give "
                    f"PipelineConfig.{part}_config)"
                )


def agreed(*named: tuple[Configuration | None, str], otherwise: Any) -> Any:
    """The value of the one that the program set, of several fields that mean the same.

    Args:
        named: groups (None: not in use) with the name of the field.
        otherwise: when none was set.

    Raises:
        SettingError: two were set to different values.
    """
    result = [
        (f"{type(group).__name__}.{name}", getattr(group, name))
        for group, name in named
        if group is not None and group.given(name)
    ]
    for place, value in result[1:]:
        if value != result[0][1]:
            raise SettingError(
                f"{result[0][0]} is {result[0][1]} and {place} is {value}: they mean the same, so "
                "set one of them, or both alike"
            )
    return result[0][1] if result else otherwise
