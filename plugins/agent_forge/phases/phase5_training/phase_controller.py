"""Phase 5 as one of the phases that Agent Forge's orchestrators drive."""

from __future__ import annotations

import asyncio
import copy
import datetime
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from torch import nn

from agent_forge.phases.phase5_training.model_file import load_phase4
from agent_forge.phases.phase5_training.pipeline.pipeline_coordinator import (
    TrainingPipeline,
    create_training_pipeline,
)
from forge_kernel.api import ForgeError, RunResult
from forge_kernel.embedding import ConfigError

PHASE_NAME: Final = "training"

Progress = Callable[[Mapping[str, Any]], None]


@dataclass(kw_only=True)
class PhaseResult:
    """What a phase gives to the next one; `duration` and `duration_seconds` are the same.

    Args:
        success: whether the run came to its end.
        model: the trained model, or None.
        phase_name: of this phase.
        metrics: the last metrics by name, the best ones as `best_<name>`; None: not measured.
        duration_seconds: of the whole phase.
        artifacts: paths by name (`run_folder`, `final_model`, `metrics`, `validation`, `phase6`).
        config: the settings, plain.
        error: what went wrong, or why the run stopped before its end.
        start_time, end_time: in UTC.
    """

    success: bool
    model: nn.Module | None
    phase_name: str = PHASE_NAME
    metrics: dict[str, float | None] = field(default_factory=dict)
    duration_seconds: float = 0.0
    artifacts: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    start_time: datetime.datetime
    end_time: datetime.datetime

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.duration_seconds


class Phase5Controller:
    """Trains the model that it is given: `await run(model)` or `execute([model])`.

    A failure is an answer (`success` False, `error` says why), not an exception; a cancelled
    `await` stops the run at the next step's edge and is raised on.

    Args:
        train_data_path: file with the samples.
        architecture: the model to load into, or a function that makes it, for input that carries
            weights only (see `load_phase4`).
        phase6_dir: where to write what Phase 6 reads; None: nowhere.
        on_progress: told of start, log intervals, validations and end, in the training's thread.
        options: of `create_training_pipeline` (`use_bitnet`, `output_dir`, `training_config`...).
    """

    phase_name = PHASE_NAME

    def __init__(
        self,
        train_data_path: str | Path,
        *,
        architecture: nn.Module | Callable[[], nn.Module] | None = None,
        phase6_dir: str | Path | None = None,
        on_progress: Progress | None = None,
        **options: Any,
    ) -> None:
        self.train_data_path = train_data_path
        self.architecture = architecture
        self.phase6_dir = phase6_dir
        self.on_progress = on_progress
        self.options = options
        self.pipeline: TrainingPipeline | None = None
        self._cancelled = threading.Event()

    # -- both shapes ------------------------------------------------------------------------------

    async def run(self, model: Any) -> PhaseResult:
        """Train in a thread of its own, beside the running event loop."""
        work = asyncio.ensure_future(asyncio.to_thread(self._trained, model))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            self.cancel()
            await asyncio.wait([work])
            raise

    def execute(self, input_models: Any) -> PhaseResult:
        """Train in this thread.

        Args:
            input_models: a model, a list of one, or a mapping with one.
        """
        return self._trained(input_models)

    def cancel(self) -> None:
        """Stop at the next step's edge; the run can be resumed. Callable from any thread."""
        self._cancelled.set()
        if self.pipeline is not None:
            self.pipeline.cancel()

    def validate_input(self, input_models: Any) -> bool:
        """Whether there is one model to train; nothing is changed."""
        try:
            content = _only_one(input_models)
            if not isinstance(content, nn.Module):
                load_phase4(content, copy.deepcopy(self._architecture()))
            return True
        except (ForgeError, OSError, ValueError, RuntimeError):
            return False

    def validate_output(self, result: PhaseResult) -> bool:
        """Whether the phase succeeded and its files are there."""
        there = all(Path(path).exists() for path in result.artifacts.values())
        return result.success and result.model is not None and there

    def cleanup(self) -> None:
        """Stop what still works and close files; a second call is fine."""
        if self.pipeline is not None:
            self.pipeline.cleanup()

    # -- the work ---------------------------------------------------------------------------------

    def _loaded(self, content: Any) -> nn.Module:
        return load_phase4(content, self._architecture())

    def _architecture(self) -> nn.Module | None:
        into = self.architecture
        return into if into is None or isinstance(into, nn.Module) else into()

    def _trained(self, input_models: Any) -> PhaseResult:
        began = datetime.datetime.now(datetime.UTC)
        result: RunResult | None = None
        error: str | None = None
        artifacts: dict[str, str] = {}
        self.pipeline = None
        try:
            model = self._loaded(_only_one(input_models))
            pipeline = create_training_pipeline(model, self.train_data_path, **self.options)
            self.pipeline = pipeline
            if self._cancelled.is_set():
                pipeline.cancel()
            result = pipeline.train(self.on_progress)
            artifacts = self._artifacts(pipeline, result)
            if result.outcome != "completed":
                error = f"stopped before its end: {result.stop_reason}"
        except Exception as fault:  # noqa: BLE001  an answer for the orchestrator, not lost
            error = f"{type(fault).__name__}: {fault}"
        finally:
            self.cleanup()
            self._cancelled.clear()
        ended = datetime.datetime.now(datetime.UTC)
        pipeline_now = self.pipeline
        return PhaseResult(
            success=error is None,
            model=None if pipeline_now is None or error else pipeline_now.model,
            metrics=_metrics(result),
            duration_seconds=(ended - began).total_seconds(),
            artifacts=artifacts,
            config={} if pipeline_now is None else pipeline_now.config.to_dict(),
            error=error,
            start_time=began,
            end_time=ended,
        )

    def _artifacts(self, pipeline: TrainingPipeline, result: RunResult) -> dict[str, str]:
        name, folder = pipeline.config.experiment_name, pipeline.output_dir
        found = {
            "run_folder": result.folder,
            "final_model": folder / f"{name}_final_model.pt",
            "metrics": folder / f"{name}_metrics.json",
            "validation": folder / f"{name}_validation.json",
        }
        if self.phase6_dir is not None and result.outcome == "completed":
            found["phase6"] = pipeline.export_phase6(self.phase6_dir)
        return {name: str(path) for name, path in found.items() if path and Path(path).exists()}


def _metrics(result: RunResult | None) -> dict[str, float | None]:
    if result is None:
        return {}
    return {**result.final, **{f"best_{name}": value for name, value in result.best.items()}}


def _only_one(input_models: Any) -> Any:
    """The model of a list or mapping of one.

    Raises:
        ConfigError: there is none, or more than one.
    """
    result: Sequence[Any] = [input_models]
    if isinstance(input_models, list | tuple):
        result = input_models
    elif isinstance(input_models, Mapping) and all(
        isinstance(item, nn.Module) for item in input_models.values()
    ):
        result = list(input_models.values())
    if len(result) != 1:
        raise ConfigError(f"Phase 5 trains one model at a time; it was given {len(result)}")
    return result[0]
