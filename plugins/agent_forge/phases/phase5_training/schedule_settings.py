"""Settings of a learning-rate schedule, and the kernel's plugin of the same curve."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
    """ScheduleFactors are absolute and lengths are optimizer steps.

    All is null until it is assigned. A scheduler of its own then goes by the default
    (`ScheduleValues`), without a type by the cosine. In a pipeline `TrainingConfig` has the
    schedule until something is assigned here, which takes effect or is refused; the type without
    assignment is TrainingConfig's, or that of Grokfast's phases.

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

    scheduler_type: SchedulerType | None = None
    base_lr: _Positive | None = None
    max_lr: _Positive | None = None
    min_lr: _Rate | None = None
    final_lr: _Rate | None = None
    warmup_steps: _Count | None = None
    warmup_type: Literal["linear", "none"] | None = None
    total_steps: _Length | None = None
    decay_steps: _Length | None = None
    decay_rate: Annotated[float, Meta(gt=0, le=1)] | None = None
    power: _Positive | None = None
    cycle_momentum: bool | None = None
    base_momentum: _Share | None = None
    max_momentum: _Share | None = None
    cycle_length: Annotated[int, Meta(ge=2)] | None = None
    patience: _Count | None = None
    factor: _Share | None = None
    threshold: _Rate | None = None
    cooldown: _Count | None = None
    min_lr_threshold: _Rate | None = None
    monitor_metric: Annotated[str, Meta(min_length=1)] | None = None
    mode: Literal["min", "max"] | None = None
    performance_window: _Length | None = None
    bitnet_warmup_multiplier: Annotated[float, Meta(gt=0, le=1)] | None = None
    quantization_phase_lr: _Positive | None = None
    acceleration_multiplier: _Rate | None = None
    consolidation_multiplier: _Rate | None = None
    phase_transition_smoothing: _Count | None = None

    @property
    def rise_steps(self) -> int:
        """Steps of the warm-up; 0 when there is none."""
        return self.values().rise_steps

    @property
    def reference_lr(self) -> float:
        """The rate that the plugin's factors are of."""
        return self.values().reference_lr

    def set_fields(self) -> dict[str, Any]:
        """The values that are not null, by name."""
        names = [item.name for item in dataclasses.fields(ScheduleValues)]
        result = {name: getattr(self, name) for name in names}
        return {name: value for name, value in result.items() if value is not None}

    def values(self, **otherwise: Any) -> ScheduleValues:
        """The values, with defaults in the place of those that are null.

        Args:
            otherwise: in the place of the defaults.
        """
        return ScheduleValues(**{**otherwise, **self.set_fields()})

    def plugin_settings(self) -> tuple[str, dict[str, Any]]:
        """Name and settings of the kernel's schedule plugin of the same curve.

        Raises:
            SettingError: settings that contradict each other.
        """
        return self.values().plugin_settings()


@dataclass(frozen=True, kw_only=True)
class ScheduleValues:
    """The values of a schedule, all of them; see `SchedulerConfig`."""

    scheduler_type: SchedulerType = SchedulerType.COSINE
    base_lr: float = 1e-3
    max_lr: float = 1e-2
    min_lr: float = 1e-6
    final_lr: float = 1e-5
    warmup_steps: int = 1000
    warmup_type: str = "linear"
    total_steps: int = 100_000
    decay_steps: int = 50_000
    decay_rate: float = 0.95
    power: float = 1.0
    cycle_momentum: bool = True
    base_momentum: float = 0.8
    max_momentum: float = 0.95
    cycle_length: int = 2000
    patience: int = 10
    factor: float = 0.5
    threshold: float = 1e-4
    cooldown: int = 0
    min_lr_threshold: float = 1e-7
    monitor_metric: str = "loss"
    mode: str = "min"
    performance_window: int = 100
    bitnet_warmup_multiplier: float = 0.1
    quantization_phase_lr: float = 5e-4
    acceleration_multiplier: float = 5.0
    consolidation_multiplier: float = 0.2
    phase_transition_smoothing: int = 100

    @property
    def rise_steps(self) -> int:
        """Steps of the warm-up; 0 when there is none."""
        return self.warmup_steps if self.warmup_type == "linear" else 0

    @property
    def cycles(self) -> bool:
        """Whether the rate rises to `max_lr`, and momentum may move against it."""
        return self.scheduler_type in (SchedulerType.CYCLIC, SchedulerType.ONE_CYCLE)

    @property
    def reference_lr(self) -> float:
        """The rate that the plugin's factors are of."""
        return self.max_lr if self.cycles else self.base_lr

    def plugin_settings(self) -> tuple[str, dict[str, Any]]:
        """Name and settings of the kernel's schedule plugin of the same curve.

        Raises:
            SettingError: settings that contradict each other.
        """
        return _TRANSLATIONS[self.scheduler_type](self)


_RISE: Final = ("base_lr", "warmup_steps", "warmup_type")
_MOMENTUM: Final = ("cycle_momentum", "base_momentum", "max_momentum")
READ: Final[Mapping[SchedulerType, tuple[str, ...]]] = {
    SchedulerType.CONSTANT: _RISE,
    SchedulerType.LINEAR: (*_RISE, "total_steps", "final_lr"),
    SchedulerType.COSINE: (*_RISE, "total_steps", "min_lr"),
    SchedulerType.EXPONENTIAL: (*_RISE, "decay_rate", "decay_steps", "min_lr"),
    SchedulerType.POLYNOMIAL: (*_RISE, "decay_steps", "final_lr", "power"),
    SchedulerType.CYCLIC: ("base_lr", "max_lr", "cycle_length", *_MOMENTUM),
    SchedulerType.ONE_CYCLE: (*_RISE, "max_lr", "final_lr", "total_steps", *_MOMENTUM),
    SchedulerType.ADAPTIVE: (
        *_RISE, "patience", "factor", "threshold", "cooldown", "min_lr_threshold",
        "monitor_metric", "mode", "performance_window",
    ),
    SchedulerType.GROKFAST: (
        *_RISE, "total_steps", "min_lr", "acceleration_multiplier", "consolidation_multiplier",
        "phase_transition_smoothing",
    ),
    SchedulerType.BITNET: (
        *_RISE, "total_steps", "min_lr", "bitnet_warmup_multiplier", "quantization_phase_lr",
    ),
}  # fmt: skip
"""The values that each strategy reads."""


def readers(name: str) -> str:
    """The strategies that read a value, for messages."""
    return ", ".join(kind.name for kind, names in READ.items() if name in names)


def _share(config: ScheduleValues, name: str) -> float:
    rate = float(getattr(config, name))
    if rate > config.reference_lr:
        top = "max_lr" if config.reference_lr == config.max_lr else "base_lr"
        raise SettingError(
            f"SchedulerConfig.{name} {rate:g} is above {top} {config.reference_lr:g}: a "
            f"{config.scheduler_type.value} schedule falls to it"
        )
    return rate / config.reference_lr


def _check_end(config: ScheduleValues) -> None:
    if config.total_steps <= config.rise_steps:
        raise SettingError(
            f"SchedulerConfig.total_steps {config.total_steps} is not beyond warmup_steps "
            f"{config.warmup_steps}"
        )


def _constant(config: ScheduleValues) -> tuple[str, dict[str, Any]]:
    return "linear_warmup", {"warmup_steps": config.rise_steps}


def _span(config: ScheduleValues, floor: str) -> dict[str, Any]:
    _check_end(config)
    return {
        "warmup_steps": config.rise_steps,
        "total_steps": config.total_steps,
        "floor": _share(config, floor),
    }


def _linear(config: ScheduleValues) -> tuple[str, dict[str, Any]]:
    return "linear", _span(config, "final_lr")


def _cosine(config: ScheduleValues) -> tuple[str, dict[str, Any]]:
    return "warmup_cosine", _span(config, "min_lr")


def _exponential(config: ScheduleValues) -> tuple[str, dict[str, Any]]:
    return "exponential", {
        "warmup_steps": config.rise_steps,
        "decay_rate": config.decay_rate,
        "decay_steps": config.decay_steps,
        "floor": _share(config, "min_lr"),
    }


def _polynomial(config: ScheduleValues) -> tuple[str, dict[str, Any]]:
    return "polynomial", {
        "warmup_steps": config.rise_steps,
        "total_steps": max(config.rise_steps, 1) + config.decay_steps,
        "floor": _share(config, "final_lr"),
        "power": config.power,
    }


def _lowest_momentum(config: ScheduleValues) -> float | None:
    if not config.cycle_momentum:
        return None
    if config.base_momentum > config.max_momentum:
        raise SettingError(
            f"SchedulerConfig.base_momentum {config.base_momentum:g} (at the highest rate) is "
            f"above max_momentum {config.max_momentum:g}"
        )
    return config.base_momentum / config.max_momentum


def _cyclic(config: ScheduleValues) -> tuple[str, dict[str, Any]]:
    return "cyclic", {
        "rise_steps": config.cycle_length // 2,
        "fall_steps": config.cycle_length - config.cycle_length // 2,
        "floor": _share(config, "base_lr"),
        "lowest_momentum": _lowest_momentum(config),
    }


def _one_cycle(config: ScheduleValues) -> tuple[str, dict[str, Any]]:
    _check_end(config)
    rise = max(1, config.rise_steps)
    return "one_cycle", {
        "total_steps": max(2, config.total_steps),
        "rise_fraction": min(rise / config.total_steps, 1.0 - 1.0 / (config.total_steps + 1)),
        "start": _share(config, "base_lr"),
        "end": _share(config, "final_lr"),
        "lowest_momentum": _lowest_momentum(config),
    }


def _adaptive(config: ScheduleValues) -> tuple[str, dict[str, Any]]:
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


def _grokfast(config: ScheduleValues) -> tuple[str, dict[str, Any]]:
    return "grokfast", {
        "warmup_steps": config.rise_steps,
        "acceleration_multiplier": config.acceleration_multiplier,
        "consolidation_multiplier": config.consolidation_multiplier,
        "refinement_multiplier": config.consolidation_multiplier / 2.0,
        "completed_multiplier": _share(config, "min_lr"),
        "smoothing_steps": config.phase_transition_smoothing,
    }


def _bitnet(config: ScheduleValues) -> tuple[str, dict[str, Any]]:
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


_Translation = Callable[[ScheduleValues], tuple[str, dict[str, Any]]]
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


def schedule_plugin(config: ScheduleValues) -> Any:
    """The kernel's schedule plugin of the values, with its parts.

    Raises:
        SettingError: settings that contradict each other.
    """
    name, settings = config.plugin_settings()
    if name != "composite":
        return _plain_plugin(name, settings)
    parts: Any = tuple(_stage(use) for use in settings["schedules"])
    until = tuple(msgspec.convert(end, Until) for end in settings["until"])
    return Composite(CompositeConfig(schedules=parts, until=until, join=settings["join"]))
