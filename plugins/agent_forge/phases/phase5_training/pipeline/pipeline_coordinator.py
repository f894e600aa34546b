"""The whole pipeline: a configuration becomes a kernel pipeline, which the kernel runs."""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal, TextIO

import msgspec
import torch
from torch import nn

from agent_forge.phases.phase5_training.configuration import SettingError
from agent_forge.phases.phase5_training.model_file import needs_model, written_model
from agent_forge.phases.phase5_training.pipeline.bitnet_optimizer import BitNetConfig
from agent_forge.phases.phase5_training.pipeline.grokfast_trainer import (
    GrokfastConfig,
    GrokfastTrainer,
)
from agent_forge.phases.phase5_training.pipeline.training_loop import (
    MemoryMonitor,
    TrainingLoop,
    TrainingState,
)
from agent_forge.phases.phase5_training.pipeline.validation import RealTimeValidator
from agent_forge.phases.phase5_training.pipeline_config import PipelineConfig
from agent_forge.phases.phase5_training.pipeline_metrics import (
    PipelineMetrics,
    PipelinePhase,
    PipelineState,
)
from agent_forge.phases.phase5_training.pipeline_settings import Declaration, Lengths, face_names
from agent_forge.phases.phase5_training.training_identity import TrainingIdentity
from forge_kernel import resume, run
from forge_kernel.api import (
    DataSpec,
    Event,
    Kind,
    LogRecord,
    PluginInfo,
    Run,
    RunError,
    RunResult,
    Step,
    UseModel,
    hookimpl,
)
from forge_kernel.embedding import (
    Catalog,
    ConfigError,
    InMemoryModel,
    NoConfig,
    OneProcess,
    RunConfig,
    check_pipeline,
    code_allowed,
    fill,
    plan,
    read_yaml,
    with_absolute_paths,
    write_bytes,
    write_json,
    write_text,
    write_yaml,
)
from forge_kernel.embedding import PipelineConfig as KernelPipeline
from forge_plugins.data.file import File
from forge_plugins.data.file_config import FileConfig
from forge_plugins.data.train_validation import merged
from forge_plugins.exporters.phase6 import TrainingFacts, write_phase6

__all__ = [
    "PipelineConfig",
    "PipelineMetrics",
    "PipelinePhase",
    "PipelineState",
    "TrainingPipeline",
    "create_training_pipeline",
]

log = logging.getLogger("agent_forge.phase5_training")

LOCK: Final = "was changed after setup(): the run is decided; make a new pipeline"
RUNS: Final = "runs"
IDENTITY: Final = "phase5_model.json"
"""File of a run folder that tells which model the run began with."""


class _Follower:
    """Tells the pipeline's objects, and its log file, what the run tells."""

    info = PluginInfo(name="phase5_face", kind=Kind.OBSERVERS, config=NoConfig)

    def __init__(self, pipeline: TrainingPipeline) -> None:
        self.config = NoConfig()
        self._pipeline = pipeline
        self._begun = False
        self._since = time.monotonic()
        self._memory: MemoryMonitor | None = None

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """The trainer is that of this run."""
        self._pipeline.model = run.model
        self._pipeline.note_identity(run.folder)
        most = self._pipeline.config.training_config.max_memory_usage
        self._memory = MemoryMonitor(most, run.device)
        self._since = time.monotonic()
        self._pipeline.write_line("training begins", device=str(run.device), steps=run.total_steps)

    @hookimpl
    def on_step_end(self, run: Run, step: Step) -> None:
        """The first step hands the trainer the run."""
        trainer = self._pipeline.trainer
        if isinstance(trainer, TrainingLoop):
            trainer.global_step, trainer.epoch = run.progress.step, run.progress.epoch
        elif not self._begun:
            trainer.follow(run, step)
        self._begun = True

    @hookimpl
    def on_log(self, run: Run, record: LogRecord) -> None:
        """Metrics of a log interval."""
        self._pipeline.metrics.record_training_metrics(record.metrics)
        self._pipeline.trainer.metrics.update(**record.metrics)
        self._pipeline.write_line("log", step=run.progress.step, **record.metrics)
        begun, self._since = self._since, time.monotonic()
        pace = record.metrics.get("samples_per_second")
        if pace is not None:
            passed = self._since - begun
            self._pipeline.validator.monitor.count(round(pace * passed), passed)
        over = [] if self._memory is None else self._memory.over()
        if over:
            self._memory = None  # said once
            message = f"memory: {', '.join(over)} of what there is is in use"
            log.warning("%s", message)
            self._pipeline.write_line(message, step=run.progress.step)

    @hookimpl
    def on_validation(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Metrics of a validation."""
        named = face_names(metrics)
        self._pipeline.validator.record(named, run.progress.step)
        self._pipeline.metrics.record_validation_metrics(named)
        self._pipeline.write_line("validation", step=run.progress.step, **named)

    @hookimpl
    def on_event(self, run: Run, event: Event) -> None:
        """What a plugin told."""
        del run
        self._pipeline.metrics.record_event()
        self._pipeline.write_line(event.message, step=event.step)


class TrainingPipeline:
    """Trains a model as its configuration says.

    `model`, `trainer`, `validator` and `metrics` are there from construction. The configuration
    may be changed until `setup()`.

    Args:
        model: trained in place; the content of a Phase 4 file with a whole module too.
        config: see `PipelineConfig`.
        train_data_path: file with the samples, see `forge plugins file`.
        val_data_path: file to validate with; a share of the first otherwise.

    Raises:
        ConfigError: the model is none.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Any],
        config: PipelineConfig | None = None,
        train_data_path: str | Path = "train.json",
        val_data_path: str | Path | None = None,
    ) -> None:
        self.model = needs_model(model)
        self.config = config or PipelineConfig()
        self.train_data_path = Path(train_data_path)
        self.val_data_path = None if val_data_path is None else Path(val_data_path)
        self.metrics = PipelineMetrics()
        self.state = PipelineState.INITIALIZING
        self.phase = PipelinePhase.SETUP
        self.result: RunResult | None = None
        self.trainer: GrokfastTrainer | TrainingLoop = self._new_trainer()
        self.validator = RealTimeValidator(self.model, self.config.validation_config, "cpu")
        self._declaration: Declaration | None = None
        self._pipeline: KernelPipeline | None = None
        self._cancel = threading.Event()
        self._log: TextIO | None = None
        self._samples: int | None = None
        self._identity: TrainingIdentity | None = None

    def _new_trainer(self) -> GrokfastTrainer | TrainingLoop:
        config = self.config
        if config.grokfast_config is None:
            return TrainingLoop(self.model, config.training_config)
        return GrokfastTrainer(self.model, None, config.grokfast_config)

    @property
    def output_dir(self) -> Path:
        """Where everything is written."""
        return Path(self.config.output_dir)

    # -- setup ----------------------------------------------------------------------------------

    def setup(self) -> None:
        """Decide the run: look at the data, plan, close the configuration. A second call is fine.

        Raises:
            ConfigError: a setting, with its name; PluginError: the data, with file and record;
            PlanError: the parts do not make a run.
        """
        if self._pipeline is not None:
            return
        config = self.config
        config.check()
        for name, path in (("train_data_path", self.train_data_path),
                           ("val_data_path", self.val_data_path)):  # fmt: skip
            if path is not None and not path.is_file():
                raise ConfigError(f"{name}: there is no file {path}")
        self._renew_parts()
        with self._in_phase(PipelinePhase.DATA_LOADING):
            declaration = Declaration(config, self.train_data_path, self.val_data_path)
            lengths = self._lengths(declaration)
        with self._in_phase(PipelinePhase.MODEL_PREPARATION):
            pipeline = declaration.kernel_pipeline(lengths)
            if isinstance(self.trainer, GrokfastTrainer):
                whole = sum(declaration.phase_lengths().values())
                self._fit_capabilities(self.trainer, whole, lengths.total)
            catalog = Catalog.installed()
            pipeline = check_pipeline(pipeline, catalog, {Kind.MODEL})
            with code_allowed(config.data_config.trust_pickle):  # the program says so, no file
                plan(pipeline, catalog, plugins=[InMemoryModel(self.model), *self._plugins()])
        config.lock(LOCK)
        self._declaration, self._pipeline = declaration, pipeline
        for device in (self.trainer, self.validator):
            device.device = declaration.device
        for notice in declaration.notices:
            log.warning("%s", notice)
        self.state = PipelineState.READY

    def _renew_parts(self) -> None:
        """Groups that were exchanged as a whole since construction."""
        config, trainer = self.config, self.trainer
        if isinstance(trainer, GrokfastTrainer) and config.grokfast_config is not None:
            trainer.config = trainer.capabilities.settings = config.grokfast_config
        elif isinstance(trainer, TrainingLoop) and config.grokfast_config is None:
            trainer.config = config.training_config
        else:
            self.trainer = self._new_trainer()
        self.validator.config = self.validator.monitor.config = config.validation_config

    def _lengths(self, declaration: Declaration) -> Lengths:
        """What the data are, seen once before the run."""
        looking = Run(RunConfig(seed=self.config.seed), None, OneProcess(), quiet=True)
        result, specs = [], []
        files = ((self.train_data_path, True), (self.val_data_path, False))
        for path, trained_on in files:
            if path is None:
                continue
            settings = declaration.data.file_settings(path, trained_on=trained_on)
            source: Any = File(msgspec.convert(settings, FileConfig))
            data = source.make_data(looking)
            result.append(data)
            specs.append(data.spec)
        _ = merged(specs[0], specs[-1]) if len(specs) > 1 else DataSpec()
        self._samples = specs[0].samples
        training = self.config.training_config
        windows = -(-result[0].batches_per_epoch // training.gradient_accumulation_steps)
        validates = len(result) > 1 or next(iter(result[0].validation()), None) is not None
        return Lengths(windows=windows, total=windows * training.epochs, validates=validates)

    @staticmethod
    def _fit_capabilities(trainer: GrokfastTrainer, whole: int, total: int) -> None:
        """Durations shrink with the phases, where the run is shorter than these."""
        asked = trainer.config.min_capability_duration
        shrunk = max(1, round(asked * total / whole)) if whole > total else asked
        trainer.capabilities.duration = min(asked, shrunk)

    def _plugins(self) -> list[Any]:
        """What is handed in beside the declared plugins."""
        result: list[Any] = [_Follower(self)]
        if isinstance(self.trainer, GrokfastTrainer):
            result.append(self.trainer.capabilities)
        return result

    # -- training -------------------------------------------------------------------------------

    def train(self, on_progress: Callable[[Mapping[str, Any]], None] | None = None) -> RunResult:
        """Run to the end; `setup()` comes first when it was not called.

        Args:
            on_progress: told of start, log intervals, validations and end, as `forge_kernel.run`
                does.

        Returns:
            Outcome, metrics, and the run folder.

        Raises:
            What `setup` raises; and what a part of the run raises, after the run folder says why.
        """
        self.setup()
        assert self._pipeline is not None
        if self.state is PipelineState.COMPLETED:
            raise RunError("this pipeline has been trained: make a new one to train on")
        self._open_log()
        self.state = PipelineState.TRAINING
        self._say(TrainingState.TRAINING)
        self.validator.start_monitoring()
        try:
            with self._in_phase(PipelinePhase.TRAINING):
                result = self._run(on_progress)
            with self._in_phase(PipelinePhase.COMPLETION):
                self._end(result)
        except BaseException as error:
            self.state = PipelineState.ERROR
            self._say(TrainingState.ERROR)
            self.write_line("failed", error=f"{type(error).__name__}: {error}")
            raise
        finally:
            self.validator.stop_monitoring_thread()
            self._close_log()
        return result

    def _end(self, result: RunResult) -> None:
        """Take the result; write it, when the run has come to its end."""
        self.result = result
        self._say(TrainingState.STOPPED)
        if result.model is not None:  # a bare layer is exchanged as a whole
            self.model = self.trainer.model = self.validator.model = result.model
        self.write_line("training ends", outcome=result.outcome, reason=result.stop_reason)
        if result.outcome == "stopped":
            self.state = PipelineState.PAUSED
            return
        self._write_results()
        self.state = PipelineState.COMPLETED

    def _run(self, on_progress: Callable[[Mapping[str, Any]], None] | None) -> RunResult:
        assert self._pipeline is not None
        parts: dict[str, Any] = {
            "model": self.model, "plugins": self._plugins(), "cancel": self._cancel, "quiet": True,
            "on_progress": on_progress, "allow_code": self.config.data_config.trust_pickle,
        }  # fmt: skip
        self._identity = TrainingIdentity.of(self.model)
        unfinished = self._unfinished(self._identity)
        if unfinished is not None:
            self.write_line("going on with an unfinished run", folder=str(unfinished))
            return resume(unfinished, **parts)
        now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
        name = f"{self.config.experiment_name}-{now}-{secrets.token_hex(2)}"
        return run(self._pipeline, output_dir=self.output_dir / RUNS / name, **parts)

    def _unfinished(self, own: TrainingIdentity) -> Path | None:
        """The newest run of this configuration and network that was stopped or killed.

        Where its model began with other weights, that is told: a program that draws them anew at
        each start cannot have the same.
        """
        if not self.config.auto_resume:
            return None
        assert self._pipeline is not None
        recorded = with_absolute_paths(fill(self._pipeline), self._pipeline)
        wanted = json.loads(json.dumps(recorded))
        folders = (self.output_dir / RUNS).glob(f"{self.config.experiment_name}-*")
        for folder in sorted(folders, key=lambda one: one.stat().st_mtime, reverse=True):
            try:
                state = json.loads((folder / "status.json").read_text())["state"]
                about = _declared(folder / "config.yaml")
                known = TrainingIdentity.from_data(json.loads((folder / IDENTITY).read_text()))
                if wanted["run"]["precision"] == "auto":  # a folder records what it came to be
                    about["run"]["precision"] = "auto"
            except (OSError, ValueError, KeyError):
                continue
            steps = any((folder / "checkpoints").glob("step-*"))
            if not steps or state in ("completed", "failed") or about != wanted or known is None:
                continue
            if known.network != own.network:
                self._warn(f"{folder} is an unfinished run of another model: it is left as it is")
                continue
            if known.weights != own.weights:
                self._warn(
                    f"going on with the unfinished run {folder}, with its weights in the place of "
                    "the model's, which are not those that it began with; for a run of its own set "
                    "auto_resume=False or another output_dir"
                )
            return folder
        return None

    def _warn(self, message: str) -> None:
        log.warning("%s", message)
        self.write_line(message)

    def note_identity(self, folder: Path | None) -> None:
        """Write beside a new run which model it began with."""
        if folder is not None and self._identity is not None:
            file = folder / IDENTITY
            if not file.exists():
                write_json(file, self._identity.to_data())

    def cancel(self) -> None:
        """Stop `train()` at the next step's edge, from any thread; a later pipeline goes on."""
        self._cancel.set()

    def _say(self, state: TrainingState) -> None:
        if isinstance(self.trainer, TrainingLoop):
            self.trainer.state = state

    # -- telling --------------------------------------------------------------------------------

    def get_status(self) -> dict[str, Any]:
        """Where the pipeline is, in plain values."""
        return {
            "state": self.state.value,
            "current_phase": self.phase.value,
            "experiment_name": self.config.experiment_name,
            "metrics_summary": self.metrics.get_summary(),
            "validation_summary": self.validator.get_validation_summary(),
            "training_summary": self.trainer.get_training_summary(),
            "result": None if self.result is None else self.result.to_data(),
        }

    def to_yaml(
        self,
        path: str | Path | None = None,
        *,
        factory: str | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The pipeline as a file that `forge run` trains to the very same weights.

        The model is named by its class, and its weights as they are now go into a safetensors file
        beside the YAML. So the class must be importable where `forge run` works, a script's
        `__main__` is not; where it takes arguments, name them here. Call this before `train()`.
        Capability functions and callbacks stay behind: they change no weights.

        Args:
            path: where to write; None: nothing is written, and the class draws its own weights.
            factory: `module:Class` or `module:function`; the model's own class otherwise.
            arguments: of the factory, plain values.

        Raises:
            ConfigError: the model cannot be named so, with what to do about it; or it has been
                trained.
        """
        self.setup()
        assert self._pipeline is not None
        if self.state not in (PipelineState.READY,):
            raise ConfigError("to_yaml() comes before train(): the weights to begin with are gone")
        file = None if path is None else Path(path)
        settings = written_model(self.model, file, factory, arguments or {})
        model: UseModel[Any] = UseModel("python_class", settings)
        catalog = Catalog.installed()
        whole = check_pipeline(replace(self._pipeline, model=model), catalog, ())
        text = write_yaml(fill(whole))
        if file is not None:
            write_text(file, text)
        return text

    # -- files ----------------------------------------------------------------------------------

    def _place(self, ending: str) -> Path:
        return self.output_dir / f"{self.config.experiment_name}{ending}"

    def _open_log(self) -> None:
        if self._log is None:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self._log = self._place(".log").open("a", encoding="utf-8")

    def _close_log(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    def write_line(self, what: str, **facts: Any) -> None:
        """A line of `<name>.log`: the time, what, and facts as JSON."""
        if self._log is not None:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
            message = f" {json.dumps(facts, default=str)}" if facts else ""
            self._log.write(f"{now} {what}{message}\n")
            self._log.flush()

    def _write_results(self) -> None:
        """The model, its metrics, its validations."""
        assert self.result is not None
        stream = io.BytesIO()
        summary = self.metrics.get_summary()
        torch.save(
            {
                "model_state_dict": self.model.state_dict(),
                "config": self.config,
                "metrics_summary": summary,
            },
            stream,
        )
        write_bytes(self._place("_final_model.pt"), stream.getvalue())
        held = {"result": self.result.to_data(), "metrics_summary": summary}
        write_json(self._place("_metrics.json"), held)
        self.validator.export_results(self._place("_validation.json"))

    def export_phase6(
        self, folder: str | Path, weights: Literal["latent", "applied"] = "latent"
    ) -> Path:
        """Write what Phase 6 reads; the folder is made.

        Args:
            folder: where to; files of these names in it are replaced.
            weights: in `trained_model.pt`: the trained ones, or those that are multiplied with.

        Raises:
            RunError: there is no trained model yet.
        """
        result = self.result
        if result is None or result.folder is None:
            raise RunError("export_phase6() comes after train(): there is nothing to export yet")
        named = dict(result.final)
        validation = {
            name.removeprefix("validation_"): named.pop(name)
            for name in list(named) if name.startswith("validation_")
        }  # fmt: skip
        facts = TrainingFacts(
            folder=result.folder, steps=result.steps, epochs=result.epochs, seconds=result.seconds,
            samples=self._samples, training=named, validation=validation,
        )  # fmt: skip
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        write_phase6(place, self.model, facts, weights)
        return place

    def cleanup(self) -> None:
        """Stop what still works and close files; a second call is fine."""
        self._cancel.set()
        self.validator.stop_monitoring_thread()
        self._close_log()

    @contextlib.contextmanager
    def _in_phase(self, phase: PipelinePhase) -> Iterator[None]:
        """A stretch of the pipeline that is timed under its name."""
        self.phase = phase
        self.metrics.start_phase(phase)
        try:
            yield
        finally:
            self.metrics.end_phase(phase)


def _declared(file: Path) -> Any:
    """A recorded pipeline without what the recorder added."""
    data = dict(read_yaml(file).data)
    data.pop("x-live", None)
    return data


def create_training_pipeline(
    model: nn.Module | Mapping[str, Any],
    train_data_path: str | Path,
    experiment_name: str = "agent_forge_training",
    val_data_path: str | Path | None = None,
    use_bitnet: bool = False,
    use_grokfast: bool = False,
    **config: Any,
) -> TrainingPipeline:
    """A pipeline, ready to be changed in its `config` and then set up.

    Args:
        model: trained in place; see `TrainingPipeline`.
        train_data_path: file with the samples.
        experiment_name: start of the names of its files.
        val_data_path: file to validate with; a share of the first otherwise.
        use_bitnet: convert the linear layers; `config.bitnet_config` has the settings.
        use_grokfast: filter, phases, capabilities; `config.grokfast_config` has the settings.
        config: further fields of `PipelineConfig`.

    Raises:
        ConfigError: a field is not known or has a wrong value, or the model is none.
    """
    for wanted, name, group in (
        (use_bitnet, "bitnet_config", BitNetConfig),
        (use_grokfast, "grokfast_config", GrokfastConfig),
    ):
        if wanted and config.get(name) is None:
            config[name] = group()
        elif not wanted and config.get(name) is not None:
            raise SettingError(f"{name} is given, and use_{name.split('_')[0]} is False")
    settings = PipelineConfig(experiment_name=experiment_name, **config)
    if settings.distributed:
        settings.check()
    return TrainingPipeline(model, settings, train_data_path, val_data_path)
