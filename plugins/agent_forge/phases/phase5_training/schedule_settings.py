"""Settings of a learning-rate schedule, and the kernel's plugin of the same curve."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from agent_forge.phases.phase5_training.configuration import Configuration, SettingError
from forge_plugins.schedules.bitnet import BitNetSchedule, BitNetScheduleConfig
from forge_plugins.schedules.composite import Composite, CompositeConfig, Until
from forge_plugins.schedules.constant import Constant, ConstantConfig
from forge_plugins.schedules.cyclic import Cyclic, CyclicConfig
from forge_plugins.schedules.exponential import Exponential, ExponentialConfig
from forge_plugins.schedules.grokfast import GrokfastSchedule, GrokfastScheduleConfig
from forge_plugins.schedules.linear import Linear
from forge_plugins.schedules.linear_warmup import LinearWarmup, LinearWarmupConfig
from forge_plugins.schedules.one_cycle import OneCycle, OneCycleConfig
from forge_plugins.schedules.plateau import Plateau, PlateauConfig
from forge_plugins.schedules.polynomial import Polynomial, PolynomialConfig
from forge_plugins.schedules.span import SpanConfig
from forge_plugins.schedules.warmup_cosine import WarmupCosine

_Positive = Annotated[float, Meta(gt=0)]
_Rate = Annotated[float, Meta(ge=0)]
_Count = Annotated[int, Meta(ge=0)]
_Length = Annotated[int, Meta(ge=1)]
_Share = Annotated[float, Meta(gt=0, lt=1)]


class SchedulerType(enum.Enum):
    """The strategies."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"
    EXPONENTIAL = "exponential"
    POLYNOMIAL = "polynomial"
    CYCLIC = "cyclic"
    ONE_CYCLE = "one_cycle"
    ADAPTIVE = "adaptive"
    GROKFAST = "grokfast"
    BITNET = "bitnet"


class SchedulerConfig(Configuration):
    """Rates are absolute and lengths are optimizer steps.

    - constant: `base_lr` after the warm-up;
    - linear: down to `final_lr` at `total_steps`; cosine: down to `min_lr` there;
    - exponential: times `decay_rate` every `decay_steps`, not below `min_lr`;
    - polynomial: down to `final_lr` at `decay_steps` after the warm-up, with `power`;
    - cyclic: between `base_lr` and `max_lr`, `cycle_length` steps from one low to the next;
    - one_cycle: from `base_lr` up to `max_lr` in `warmup_steps`, down to `final_lr` at
      `total_steps`; both move momentum against the rate when `cycle_momentum`;
    - adaptive: times `factor` when `monitor_metric` (its mean over the last `performance_window`
      reports) has not become better for `patience` reports, not below `min_lr_threshold`;
    - grokfast: `base_lr` times the multiplier of the phase that the clock names (refinement: half
      of consolidation's; completed: `min_lr`), each transition eased over
      `phase_transition_smoothing` steps;
    - bitnet: rises to `bitnet_warmup_multiplier x base_lr` in `warmup_steps`, holds
      `quantization_phase_lr` for as long again, then falls as a cosine to `min_lr`.
    """

    scheduler_type: SchedulerType = SchedulerType.COSINE
    base_lr: _Positive = 1e-3
    max_lr: _Positive = 1e-2
    min_lr: _Rate = 1e-6
    final_lr: _Rate = 1e-5
    warmup_steps: _Count = 1000
    warmup_type: Literal["linear", "none"] = "linear"
    total_steps: _Length = 100_000
    decay_steps: _Length = 50_000
    decay_rate: Annotated[float, Meta(gt=0, le=1)] = 0.95
    power: _Positive = 1.0
    cycle_momentum: bool = True
    base_momentum: _Share = 0.8
    max_momentum: _Share = 0.95
    cycle_length: Annotated[int, Meta(ge=2)] = 2000
    patience: _Count = 10
    factor: _Share = 0.5
    threshold: _Rate = 1e-4
    cooldown: _Count = 0
    min_lr_threshold: _Rate = 1e-7
    monitor_metric: Annotated[str, Meta(min_length=1)] = "loss"
    mode: Literal["min", "max"] = "min"
    performance_window: _Length = 100
    bitnet_warmup_multiplier: Annotated[float, Meta(gt=0, le=1)] = 0.1
    quantization_phase_lr: _Positive = 5e-4
    acceleration_multiplier: _Rate = 5.0
    consolidation_multiplier: _Rate = 0.2
    phase_transition_smoothing: _Count = 100

    @property
    def rise_steps(self) -> int:
        """Steps of the warm-up; 0 when there is none."""
        return self.warmup_steps if self.warmup_type == "linear" else 0

    @property
    def reference_lr(self) -> float:
        """The rate that the plugin's factors are of."""
        cycles = self.scheduler_type in (SchedulerType.CYCLIC, SchedulerType.ONE_CYCLE)
        return self.max_lr if cycles else self.base_lr

    def plugin_settings(self) -> tuple[str, dict[str, Any]]:
        """Name and settings of the kernel's schedule plugin of the same curve.

        Raises:
            SettingError: settings that contradict each other.
        """
        return _TRANSLATIONS[self.scheduler_type](self)


def _share(config: SchedulerConfig, name: str) -> float:
    rate = float(getattr(config, name))
    if rate > config.reference_lr:
        top = "max_lr" if config.reference_lr == config.max_lr else "base_lr"
        raise SettingError(
            f"SchedulerConfig.{name} {rate:g} is above {top} {config.reference_lr:g}: a "
            f"{config.scheduler_type.value} schedule falls to it"
        )
    return rate / config.reference_lr


def _check_end(config: SchedulerConfig) -> None:
    if config.total_steps <= config.rise_steps:
        raise SettingError(
            f"SchedulerConfig.total_steps {config.total_steps} is not beyond warmup_steps "
            f"{config.warmup_steps}"
        )


def _constant(config: SchedulerConfig) -> tuple[str, dict[str, Any]]:
    return "linear_warmup", {"warmup_steps": config.rise_steps}


def _span(config: SchedulerConfig, floor: str) -> dict[str, Any]:
    _check_end(config)
    return {
        "warmup_steps": config.rise_steps,
        "total_steps": config.total_steps,
        "floor": _share(config, floor),
    }


def _linear(config: SchedulerConfig) -> tuple[str, dict[str, Any]]:
    return "linear", _span(config, "final_lr")


def _cosine(config: SchedulerConfig) -> tuple[str, dict[str, Any]]:
    return "warmup_cosine", _span(config, "min_lr")


def _exponential(config: SchedulerConfig) -> tuple[str, dict[str, Any]]:
    return "exponential", {
        "warmup_steps": config.rise_steps,
        "decay_rate": config.decay_rate,
        "decay_steps": config.decay_steps,
        "floor": _share(config, "min_lr"),
    }


def _polynomial(config: SchedulerConfig) -> tuple[str, dict[str, Any]]:
    return "polynomial", {
        "warmup_steps": config.rise_steps,
        "total_steps": max(config.rise_steps, 1) + config.decay_steps,
        "floor": _share(config, "final_lr"),
        "power": config.power,
    }


def _lowest_momentum(config: SchedulerConfig) -> float | None:
    if not config.cycle_momentum:
        return None
    if config.base_momentum > config.max_momentum:
        raise SettingError(
            f"SchedulerConfig.base_momentum {config.base_momentum:g} (at the highest rate) is "
            f"above max_momentum {config.max_momentum:g}"
        )
    return config.base_momentum / config.max_momentum


def _cyclic(config: SchedulerConfig) -> tuple[str, dict[str, Any]]:
    return "cyclic", {
        "rise_steps": config.cycle_length // 2,
        "fall_steps": config.cycle_length - config.cycle_length // 2,
        "floor": _share(config, "base_lr"),
        "lowest_momentum": _lowest_momentum(config),
    }


def _one_cycle(config: SchedulerConfig) -> tuple[str, dict[str, Any]]:
    _check_end(config)
    rise = max(1, config.rise_steps)
    return "one_cycle", {
        "total_steps": max(2, config.total_steps),
        "rise_share": min(rise / config.total_steps, 1.0 - 1.0 / (config.total_steps + 1)),
        "start": _share(config, "base_lr"),
        "end": _share(config, "final_lr"),
        "lowest_momentum": _lowest_momentum(config),
    }


def _adaptive(config: SchedulerConfig) -> tuple[str, dict[str, Any]]:
    return "plateau", {
        "metric": config.monitor_metric,
        "mode": config.mode,
        "factor": config.factor,
        "patience": config.patience,
        "threshold": config.threshold,
        "cooldown": config.cooldown,
        "warmup_steps": config.rise_steps,
        "floor": _share(config, "min_lr_threshold"),
    }


def _grokfast(config: SchedulerConfig) -> tuple[str, dict[str, Any]]:
    return "grokfast", {
        "warmup_steps": config.rise_steps,
        "acceleration_multiplier": config.acceleration_multiplier,
        "consolidation_multiplier": config.consolidation_multiplier,
        "refinement_multiplier": config.consolidation_multiplier / 2.0,
        "completed_multiplier": _share(config, "min_lr"),
        "smoothing_steps": config.phase_transition_smoothing,
    }


def _bitnet(config: SchedulerConfig) -> tuple[str, dict[str, Any]]:
    steps = max(1, config.warmup_steps)
    if config.total_steps <= 2 * steps:
        raise SettingError(
            f"SchedulerConfig.total_steps {config.total_steps} leaves nothing after twice the "
            f"{steps} warmup_steps of a bitnet schedule"
        )
    low = config.bitnet_warmup_multiplier
    rise = {"use": "linear_warmup", "with": {"warmup_steps": config.rise_steps}}
    return "composite", {
        "schedules": [
            {"use": "bitnet", "with": {"quantization_steps": steps, "low": low,
                                       "smoothing_steps": 0, "schedule": rise}},
            {"use": "constant", "with": {"factor": config.quantization_phase_lr / config.base_lr}},
            {"use": "warmup_cosine", "with": {
                "warmup_steps": 2 * steps, "total_steps": config.total_steps,
                "floor": _share(config, "min_lr")}},
        ],
        "until": [{"step": steps}, {"step": 2 * steps}],
        "join": "jump",
    }  # fmt: skip


_Translation = Callable[[SchedulerConfig], tuple[str, dict[str, Any]]]
_TRANSLATIONS: Final[Mapping[SchedulerType, _Translation]] = {
    SchedulerType.CONSTANT: _constant,
    SchedulerType.LINEAR: _linear,
    SchedulerType.COSINE: _cosine,
    SchedulerType.EXPONENTIAL: _exponential,
    SchedulerType.POLYNOMIAL: _polynomial,
    SchedulerType.CYCLIC: _cyclic,
    SchedulerType.ONE_CYCLE: _one_cycle,
    SchedulerType.ADAPTIVE: _adaptive,
    SchedulerType.GROKFAST: _grokfast,
    SchedulerType.BITNET: _bitnet,
}


_PLUGINS: Final[dict[str, tuple[Any, Any]]] = {
    "constant": (Constant, ConstantConfig),
    "linear": (Linear, SpanConfig),
    "linear_warmup": (LinearWarmup, LinearWarmupConfig),
    "warmup_cosine": (WarmupCosine, SpanConfig),
    "exponential": (Exponential, ExponentialConfig),
    "polynomial": (Polynomial, PolynomialConfig),
    "cyclic": (Cyclic, CyclicConfig),
    "one_cycle": (OneCycle, OneCycleConfig),
    "plateau": (Plateau, PlateauConfig),
    "grokfast": (GrokfastSchedule, GrokfastScheduleConfig),
}


def _plain_plugin(name: str, settings: Mapping[str, Any]) -> Any:
    plugin, config = _PLUGINS[name]
    return plugin(msgspec.convert(dict(settings), config))


def _stage(use: Mapping[str, Any]) -> Any:
    """A schedule within a composite: a plain one, or one lowered while weights are quantized in."""
    settings = dict(use["with"])
    if use["use"] != "bitnet":
        return _plain_plugin(use["use"], settings)
    nested = settings.pop("schedule")
    config = msgspec.convert(settings, BitNetScheduleConfig)
    part: Any = _plain_plugin(nested["use"], nested["with"])
    return BitNetSchedule(dataclasses.replace(config, schedule=part))


def schedule_plugin(config: SchedulerConfig) -> Any:
    """The kernel's schedule plugin of a configuration, with its parts.

    Raises:
        SettingError: settings that contradict each other.
    """
    name, settings = config.plugin_settings()
    if name != "composite":
        return _plain_plugin(name, settings)
    parts: Any = tuple(_stage(use) for use in settings["schedules"])
    until = tuple(msgspec.convert(end, Until) for end in settings["until"])
    return Composite(CompositeConfig(schedules=parts, until=until, join=settings["join"]))
