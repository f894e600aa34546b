"""The data of a pipeline, as the kernel's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from agent_forge.phases.phase5_training.configuration import SettingError
from agent_forge.phases.phase5_training.pipeline.data_loader import DataFormat
from agent_forge.phases.phase5_training.pipeline.loss_functions import LossType
from agent_forge.phases.phase5_training.pipeline_config import PipelineConfig
from forge_kernel.api import Use, UseData

CACHE: Final = "data_cache"
VALIDATION_BATCH: Final = 1024


class DataDeclaration:
    """The data source of a configuration.

    Args:
        config: checked.
        training: file to train on.
        validation: file to validate with; None: a share of the first.
        notices: what is to be told is added to them.
    """

    def __init__(
        self, config: PipelineConfig, training: Path, validation: Path | None, notices: list[str]
    ) -> None:
        self.config = config
        self.training, self.validation = training, validation
        self.notices = notices

    def file_settings(self, path: Path, *, trained_on: bool) -> dict[str, Any]:
        """Settings of the kernel's `data.file` for one of the files."""
        config = self.config
        data = config.data_config
        numbers = config.loss_config.loss_type is LossType.REGRESSION
        alone = trained_on and self.validation is None
        result: dict[str, Any] = {
            "path": str(path),
            "target": "number" if numbers else "class",
            "input_column": data.input_column,
            "target_column": data.target_column,
            "batch_size": data.batch_size if trained_on else self._validation_batch(),
            "validation_batch_size": self._validation_batch(),
            "shuffle": data.shuffle and trained_on,
            "drop_last": data.drop_last and trained_on,
            "streaming": data.streaming,
            "validation_split": data.validation_split if alone else 0.0,
            "quality_threshold": data.quality_threshold,
            "cache_dir": data.cache_dir or str(Path(config.output_dir) / CACHE),
            "trust_pickle": data.trust_pickle,
            "split_seed": data.seed if data.given("seed") else None,
        }
        if data.data_format is not None:
            result["format"] = self._format(data.data_format)
        asked = ("num_workers", "prefetch_factor", "persistent_workers")
        if data.num_workers and any(data.given(name) for name in asked):  # none is fastest
            result["workers"] = data.num_workers
            result["prefetch"] = data.prefetch_factor
            result["keep_workers"] = data.persistent_workers
        if data.given("cache_size"):
            result["cache_size"] = data.cache_size
        classes = config.model_config.get("num_classes", data.num_classes)
        if data.num_classes not in (None, classes):
            raise SettingError(
                f"PipelineConfig.model_config has num_classes {classes}, DataConfig.num_classes is "
                f"{data.num_classes}: they mean the same"
            )
        if classes is not None and not numbers:
            result["classes"] = classes
        return result

    def _validation_batch(self) -> int:
        """Samples in a validation batch; `validation_steps` counts batches of `batch_size`."""
        config = self.config
        counted = config.validation_config.validation_steps is not None
        return config.data_config.batch_size if counted else VALIDATION_BATCH

    def check(self) -> None:
        """What a pipeline does not read of the data's settings."""
        data = self.config.data_config
        if not data.num_workers:
            data.refuse("prefetch_factor", "num_workers is 0")
        if data.pin_memory:
            data.refuse("pin_memory", "a pipeline's batches are gathered from a mapped file; it is "
                        "of loaders (DataLoaderFactory)")  # fmt: skip
        if data.pin_memory is False:
            self.notices.append("DataConfig.pin_memory: a pipeline pins no memory anyway")
        data.refuse("max_sequence_length", "a pipeline's rows are as long as the file has them; it "
                    "is of loaders (DataLoaderFactory)")  # fmt: skip
        if self.validation is not None and data.assigned("validation_split"):
            self.notices.append(
                "DataConfig.validation_split: there is a file to validate with, so that nothing is "
                "held out of the other"
            )

    @staticmethod
    def _format(chosen: DataFormat) -> str:
        """The kernel's word for a form of file that has samples with a target."""
        if chosen in (DataFormat.TEXT, DataFormat.TOKENIZED):
            raise SettingError(
                f"DataConfig.data_format {chosen.name}: the pipeline trains on samples with a "
                "target; train a language model with TrainingLoop or forge run char_llama_gguf"
            )
        return "auto" if chosen is DataFormat.PREPROCESSED else chosen.value

    def use(self) -> Use[Any]:
        """The data source."""
        training = self.file_settings(self.training, trained_on=True)
        if self.validation is None:
            return UseData("file", training)
        validation = self.file_settings(self.validation, trained_on=False)
        parts = {"training": training, "validation": validation}
        return UseData(
            "train_validation",
            {name: {"use": "file", "with": item} for name, item in parts.items()},
        )
