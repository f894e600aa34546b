"""The kernel's pipeline that the settings of a whole one declare."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent_forge.phases.phase5_training.configuration import SettingError
from agent_forge.phases.phase5_training.data_declaration import DataDeclaration
from agent_forge.phases.phase5_training.grokfast_settings import GrokfastConfig
from agent_forge.phases.phase5_training.measuring import NAMES
from agent_forge.phases.phase5_training.pipeline.bitnet_optimizer import (
    LONGEST_WARMUP,
)
from agent_forge.phases.phase5_training.pipeline.loss_functions import LossType
from agent_forge.phases.phase5_training.pipeline_config import PipelineConfig, agreed
from agent_forge.phases.phase5_training.pipeline_loss import pipeline_loss, pipeline_regularizers
from agent_forge.phases.phase5_training.schedule_settings import (
    READ,
    SchedulerConfig,
    SchedulerType,
    readers,
)
from agent_forge.phases.phase5_training.training_settings import (
    TrainingConfig,
    fitted_warmup,
    goal_of,
    schedule_of,
)
from forge_kernel.api import (
    Use,
    UseCallback,
    UseGradients,
    UseObserver,
    UseOptimizer,
    UseSchedule,
    UseValidator,
)
from forge_kernel.embedding import PipelineConfig as KernelPipeline
from forge_kernel.embedding import RunConfig, UsePhases, UseQuantizer, UseWrapper, resolve_device
from forge_plugins.mathematics.grokfast.phase_lengths import fitted
from forge_plugins.mathematics.quantization.warmup import fitting

log = logging.getLogger("agent_forge.phase5_training")


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """What is known of the data before the run.

    Args:
        windows: optimizer steps in one epoch.
        total: in the whole run.
        validates: whether there is something to validate with.
    """

    windows: int
    total: int
    validates: bool


class Declaration:
    """The kernel's pipeline of a configuration, without the model.

    Args:
        config: checked.
        training: file to train on.
        validation: file to validate with; None: a share of the first.
    """

    def __init__(self, config: PipelineConfig, training: Path, validation: Path | None) -> None:
        self.config = config
        self.validation = validation
        self.device = resolve_device(config.device)
        self.notices: list[str] = []
        self.data = DataDeclaration(config, training, validation, self.notices)

    # -- rates ----------------------------------------------------------------------------------

    def rate(self) -> float:
        """The learning rate after the warm-up."""
        config = self.config
        own = config.training_config.learning_rate
        return float(agreed(
            (config.training_config, "learning_rate"),
            (config.bitnet_config, "learning_rate"),
            (config.grokfast_config, "base_learning_rate"),
            (config.scheduler_config, "base_lr"),
            otherwise=config.bitnet_config.learning_rate if config.bitnet_config else own,
        ))  # fmt: skip

    def optimizer(self, rate: float) -> Use[Any]:
        """AdamW with the values of the BitNet group where there is one."""
        training, bitnet = self.config.training_config, self.config.bitnet_config
        schedule = self.config.scheduler_config
        values = schedule.values()
        first = bitnet.momentum if bitnet else training.beta1
        moved = schedule.scheduler_type is not None and values.cycles and values.cycle_momentum
        if moved:  # the schedule's momentum is absolute
            first = values.max_momentum
        decay = (bitnet or training).weight_decay
        return UseOptimizer("adamw", {
            "lr": rate,
            "betas": [agreed((training, "beta1"), (bitnet, "momentum"),
                             (schedule if moved else None, "max_momentum"), otherwise=first),
                      training.beta2],
            "eps": agreed((training, "eps"), (bitnet, "eps"), otherwise=(bitnet or training).eps),
            "weight_decay": agreed((training, "weight_decay"), (bitnet, "weight_decay"),
                                   otherwise=decay),
            "fused": training.use_fused_optimizer,
        })  # fmt: skip

    def schedule(self, lengths: Lengths) -> tuple[Use[Any], float]:
        """The schedule, and the rate that its factors are of."""
        config, total, rate = self.config, lengths.total, self.rate()
        chosen, training = config.scheduler_config, config.training_config
        kind = self._schedule_type()
        self._check_read(chosen, kind)
        if kind is SchedulerType.GROKFAST:
            return self._phased(total, rate), rate
        if kind is SchedulerType.ADAPTIVE and not lengths.validates:
            raise SettingError(
                "SchedulerConfig.scheduler_type ADAPTIVE goes by validations, and there is nothing "
                "to validate with: set DataConfig.validation_split, or name a val_data_path"
            )
        if not chosen.set_fields():
            own = copy.copy(training)
            own.scheduler_type, own.warmup_steps = kind.value, self._warmup(training, total)
            return schedule_of(own, total), rate
        floor = {SchedulerType.COSINE: "min_lr", SchedulerType.LINEAR: "final_lr"}.get(kind)
        otherwise: dict[str, Any] = {"total_steps": total}
        if floor is None:
            training.refuse("min_lr_ratio", f"a {kind.name} schedule does not end at a share")
        elif chosen.scheduler_type is None or training.given("min_lr_ratio"):
            otherwise[floor] = training.min_lr_ratio * rate
            if training.given("min_lr_ratio") and getattr(chosen, floor) is not None:
                raise SettingError(
                    f"TrainingConfig.min_lr_ratio and SchedulerConfig.{floor} both say where the "
                    "schedule ends: set one of them"
                )
        metrics: dict[str, Any] = {}
        if chosen.monitor_metric is not None:
            metrics["monitor_metric"] = NAMES.get(chosen.monitor_metric, chosen.monitor_metric)
        values = dataclasses.replace(
            chosen.values(**otherwise), scheduler_type=kind, base_lr=rate,
            warmup_steps=self._warmup(chosen, total), **metrics,
        )  # fmt: skip
        name, settings = values.plugin_settings()
        return UseSchedule(name, settings), values.reference_lr

    def _schedule_type(self) -> SchedulerType:
        """The strategy that one of the groups names."""
        config = self.config
        chosen, training = config.scheduler_config.scheduler_type, config.training_config
        own = SchedulerType(training.scheduler_type)
        if chosen is None and (config.grokfast_config is None or training.given("scheduler_type")):
            return own
        if chosen is not None and training.given("scheduler_type") and own is not chosen:
            raise SettingError(
                f"TrainingConfig.scheduler_type is {own.name} and SchedulerConfig.scheduler_type "
                f"is {chosen.name}: they mean the same, so set one of them, or both alike"
            )
        result = chosen or SchedulerType.GROKFAST
        if result is SchedulerType.GROKFAST and config.grokfast_config is None:
            raise SettingError("SchedulerType.GROKFAST reads phases: say use_grokfast=True")
        return result

    @staticmethod
    def _check_read(chosen: SchedulerConfig, kind: SchedulerType) -> None:
        """Refuse values that the strategy does not read."""
        unread = {
            SchedulerType.GROKFAST: ("total_steps",),  # the phases have their lengths
            SchedulerType.ADAPTIVE: ("performance_window",),  # each validation counts
        }.get(kind, ())
        for name in chosen.set_fields():
            if name != "scheduler_type" and (name not in READ[kind] or name in unread):
                by = (
                    "a scheduler of its own"
                    if name in unread
                    else f"scheduler_type {readers(name)}"
                )
                chosen.refuse(name, f"the schedule is {kind.name}; it is read by {by}")

    def _warmup(self, group: TrainingConfig | SchedulerConfig, total: int) -> int:
        """Steps of the warm-up, at most a tenth of the run."""
        config = self.config
        schedule, training = config.scheduler_config, config.training_config
        default = training.warmup_steps
        if group is schedule and schedule.scheduler_type is not None:
            default = schedule.values().warmup_steps
        steps = agreed((schedule, "warmup_steps"), (training, "warmup_steps"), otherwise=default)
        result = fitted_warmup(steps, total)
        if result < steps:
            self.notices.append(f"the warm-up of {steps} steps is shortened to {result} of {total}")
        return result

    def phase_lengths(self) -> dict[str, int]:
        """Optimizer steps of Grokfast's phases."""
        config, grokfast = self.config, self.config.grokfast_config
        assert grokfast is not None
        warmup = agreed((grokfast, "warmup_steps"), (config.training_config, "warmup_steps"),
                        (config.scheduler_config, "warmup_steps"),
                        otherwise=grokfast.warmup_steps)  # fmt: skip
        return {**grokfast.lengths(), "warmup_steps": warmup}

    def _phased(self, total: int, rate: float) -> Use[Any]:
        chosen, grokfast = self.config.scheduler_config, self.config.grokfast_config
        assert grokfast is not None
        reason = "Grokfast's phases have multipliers of the rate (GrokfastConfig)"
        self.config.training_config.refuse("min_lr_ratio", reason)
        lengths = fitted(self.phase_lengths(), total)
        smoothing = min(100, max(lengths.values()) // 10)
        if chosen.phase_transition_smoothing is not None:
            smoothing = chosen.phase_transition_smoothing
        factors = grokfast.multipliers()
        for name in ("acceleration_multiplier", "consolidation_multiplier"):
            factors[name] = agreed((grokfast, name), (chosen, name), otherwise=factors[name])
        if chosen.min_lr is not None:
            factors["completed_multiplier"] = chosen.min_lr / rate
        warmup = 0 if chosen.warmup_type == "none" else lengths["warmup_steps"]
        return UseSchedule("grokfast", {
            "warmup_steps": warmup, "smoothing_steps": smoothing, **factors,
        })  # fmt: skip

    # -- the other kinds ------------------------------------------------------------------------

    def loss(self) -> Use[Any]:
        """The loss of the type that is asked for, with its further terms."""
        return pipeline_loss(self.config.loss_config, self.config.bitnet_config, self.notices)

    def regularizers(self) -> tuple[Use[Any], ...]:
        """Terms of the weights."""
        return pipeline_regularizers(self.config.loss_config, self.config.bitnet_config)

    def gradients(self, total: int) -> tuple[Use[Any], ...]:
        """Filter, scale, clip.

        Args:
            total: optimizer steps of the run.
        """
        config = self.config
        result: list[Use[Any]] = []
        grokfast, bitnet = config.grokfast_config, config.bitnet_config
        if grokfast is not None and grokfast.enable_grokfast:
            own = copy.copy(grokfast)
            own.alpha = agreed((grokfast, "alpha"), (config.training_config, "grokfast_alpha"),
                               otherwise=grokfast.alpha)  # fmt: skip
            own.lambda_reg = agreed((grokfast, "lambda_reg"),
                                    (config.training_config, "grokfast_lambda"),
                                    otherwise=grokfast.lambda_reg)  # fmt: skip
            every = self.log_every(total)
            result.append(UseGradients("grokfast", own.filter_settings(every)))
        if bitnet is not None and bitnet.gradient_limit is not None:
            result.append(UseGradients("adaptive_scale", {"limit": bitnet.gradient_limit}))
        if config.training_config.gradient_clipping:
            largest = {"max_norm": config.training_config.max_grad_norm}
            result.append(UseGradients("clip_norm", largest))
        return tuple(result)

    def metric(self) -> tuple[str, str]:
        """The metric that decides, by the kernel's name, and whether it is to rise or to fall."""
        config = self.config
        primary = config.validation_config.primary_metric
        numbers = config.loss_config.loss_type is LossType.REGRESSION
        if primary == "perplexity" or (
            numbers and not config.validation_config.given("primary_metric")
        ):
            primary = "loss"
        return NAMES.get(primary, primary), goal_of(primary)

    def validators(self) -> tuple[Use[Any], ...]:
        """The metrics of the metrics that are asked for."""
        if self.config.loss_config.loss_type is LossType.REGRESSION:
            return (UseValidator("regression", {}),)
        asked = self.config.validation_config
        names = (*asked.metrics_to_track, asked.primary_metric)
        by_class = [kernel for own, kernel in NAMES.items() if own in names]
        return (
            UseValidator("classification", {"top_k": list(asked.top_k()), "by_class": by_class}),
        )

    def callbacks(self, lengths: Lengths) -> tuple[Use[Any], ...]:
        """What decides by the validations."""
        config = self.config
        result: list[Use[Any]] = []
        asked, training = config.validation_config, config.training_config
        if not lengths.validates:
            asked.refuse("validation_steps", "there is nothing to validate with")
            return ()
        if asked.validation_steps is not None:
            result.append(UseCallback("short_validation", {"batches": asked.validation_steps}))
        metric, mode = self.metric()
        if asked.early_stopping_enabled:
            either = "validation_patience" if asked.given("validation_patience") else \
                "early_stopping_patience"  # fmt: skip
            result.append(UseCallback("early_stopping", {
                "metric": metric,
                "mode": mode,
                "patience": agreed((asked, either), (training, "validation_patience"),
                                   otherwise=asked.patience),
                "not_before": self._settled(lengths.total),
                "min_delta": agreed((asked, "early_stopping_min_delta"), (training, "min_delta"),
                                    otherwise=asked.early_stopping_min_delta),
            }))  # fmt: skip
        if asked.save_best_model:
            result.append(UseCallback("best_checkpoint", {"metric": metric, "mode": mode}))
        if config.grokfast_config is not None:
            result += self._consolidation(config.grokfast_config, lengths.total)
        return tuple(result)

    def _settled(self, total: int) -> int:
        """The step from which on the weights are quantized as they will be, at the full rate."""
        bitnet, grokfast = self.config.bitnet_config, self.config.grokfast_config
        result = [0]
        if bitnet is not None:
            ramps = [bitnet.warmup_steps]
            ramps += [bitnet.sparsity_warmup_steps] if bitnet.target_sparsity else []
            result += [fitting(steps, total, LONGEST_WARMUP) for steps in ramps]
        if grokfast is not None:
            result.append(fitted(self.phase_lengths(), total)["warmup_steps"])
        return max(result)

    def _consolidation(self, grokfast: GrokfastConfig, total: int) -> list[Use[Any]]:
        steps = fitted(self.phase_lengths(), total)["consolidation_steps"]
        if steps < 4:
            return []
        every = max(2, min(50, steps // 3))
        share = grokfast.knowledge_retention_weight
        return [UseCallback("consolidation", {"fraction": share, "every": every})]

    def log_every(self, total: int) -> int:
        """Optimizer steps between lines of the log: as set, or ten lines at least."""
        training = self.config.training_config
        if training.given("log_interval"):
            return training.log_interval
        return max(1, min(training.log_interval, total // 10))

    def run(self, lengths: Lengths) -> RunConfig:
        """The loop's settings."""
        config = self.config
        training = config.training_config
        default = min(training.eval_interval, lengths.windows)
        every = agreed((training, "eval_interval"),
                       (config.validation_config, "validation_frequency"),
                       otherwise=default)  # fmt: skip
        if lengths.validates and every > lengths.total:
            self.notices.append(
                f"validations every {every} steps in a run of {lengths.total}: there is one, at "
                "the end"
            )
        return RunConfig(
            name=config.experiment_name,
            seed=config.seed,
            device=str(self.device),
            max_epochs=training.epochs,
            max_seconds=config.max_training_time,
            validate_every=every if lengths.validates else None,
            log_every=self.log_every(lengths.total),
            save_every=training.save_interval if config.save_intermediate_checkpoints else None,
            keep_checkpoints=training.max_checkpoints,
            accumulate=training.gradient_accumulation_steps,
            precision=training.precision() if config.mixed_precision else "fp32",
        )

    def kernel_pipeline(self, lengths: Lengths) -> KernelPipeline:
        """All of it."""
        config = self.config
        training = config.training_config
        bitnet, grokfast = config.bitnet_config, config.grokfast_config
        training.check_switches(
            bitnet_enabled=bitnet is not None,
            grokfast_enabled=grokfast is not None and grokfast.enable_grokfast,
        )
        self.data.check()
        schedule, rate = self.schedule(lengths)
        result: dict[str, Any] = {
            "run": self.run(lengths),
            "data": self.data.use(),
            "optimizer": self.optimizer(rate),
            "loss": self.loss(),
            "regularizers": self.regularizers(),
            "gradients": self.gradients(lengths.total),
            "schedule": schedule,
            "validators": self.validators(),
            "callbacks": self.callbacks(lengths),
            "observers": self._observers(),
        }
        if bitnet is not None:
            curve = {"warmup_curve": training.quantization_schedule}
            result["quantizer"] = UseQuantizer("bitnet", {**bitnet.plugin_settings(), **curve})
        if grokfast is not None:
            result["phases"] = UsePhases("grokfast", self.phase_lengths())
        wrappers: list[Use[Any]] = []
        if grokfast is not None and grokfast.gradient_checkpointing:
            wrappers.append(UseWrapper("activation_checkpointing", {}))
        if training.compile_model:
            wrappers.append(UseWrapper("compile", {}))
        result["wrappers"] = tuple(wrappers)
        return KernelPipeline(**result)

    def _observers(self) -> tuple[Use[Any], ...]:
        result: list[Use[Any]] = [UseObserver("metrics_jsonl", {})]
        asked = self.config.validation_config
        chosen = {
            "memory": asked.memory_monitoring,
            "device": asked.gpu_monitoring,
            "throughput": asked.throughput_monitoring,
        }
        if self.config.performance_profiling:
            result.append(UseObserver("resources", chosen))
        return tuple(result)


def face_names(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics of the kernel's validators under the names of the face."""
    own: dict[str, str] = {kernel: name for name, kernel in NAMES.items()}
    return {own.get(name, name): value for name, value in metrics.items()}
