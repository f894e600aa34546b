"""Learning-rate schedules for any torch optimizer: the kernel's plugins behind torch's face.

A rate is `base rate of the group x factor of the plugin`; the groups keep the ratio that they had.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from agent_forge.phases.phase5_training.configuration import SettingError
from agent_forge.phases.phase5_training.schedule_settings import (
    SchedulerConfig,
    SchedulerType,
    ScheduleValues,
    schedule_plugin,
)
from forge_kernel.api import ScheduleFactors, Step
from forge_kernel.embedding import initial_momentum, initial_rate, write_momentum, write_rate
from forge_plugins.mathematics.grokfast import phase_lengths
from forge_plugins.phases.grokfast import GrokfastPhasesConfig
from forge_plugins.reports.chart import Series, line_chart
from forge_plugins.reports.style import STYLE

__all__ = [
    "AdaptiveScheduler",
    "BitNetScheduler",
    "CompositeScheduler",
    "ConstantScheduler",
    "CosineScheduler",
    "CyclicScheduler",
    "ExponentialScheduler",
    "GrokfastScheduler",
    "LinearScheduler",
    "OneCycleScheduler",
    "PolynomialScheduler",
    "Scheduler",
    "SchedulerConfig",
    "SchedulerFactory",
    "SchedulerMonitor",
    "SchedulerType",
]

Clock = Callable[[int], str]
"""The phase of an optimizer step, counted from 1."""


@dataclass(slots=True)
class _Progress:
    step: int = 0


@dataclass(slots=True)
class _RunView:
    """As much of a run as schedules look at."""

    total_steps: int | None
    progress: _Progress = field(default_factory=_Progress)

    def emit_event(self, name: str, message: str, **facts: Any) -> None:
        """Nobody listens: the caller has no event log."""
        del name, message, facts


def grokfast_clock(config: ScheduleValues) -> Clock:
    """The phases of a Grokfast run after this `warmup_steps`, fitted into `total_steps`."""
    lengths = GrokfastPhasesConfig(warmup_steps=config.warmup_steps).lengths()
    rise = lengths.pop("warmup")
    fitted = {"warmup": rise, **phase_lengths.fitted(lengths, max(0, config.total_steps - rise))}
    return lambda step: phase_lengths.phase_at(step, fitted)


class Scheduler(LRScheduler):
    """A schedule for an optimizer, used as torch's own: `step()` after `optimizer.step()`.

    The rate of the first step is set on construction. `step(metrics)` hands metrics to strategies
    that listen (adaptive, composite): a number is `monitor_metric`, a mapping names them.

    Args:
        optimizer: the first group's rate becomes `base_lr` times the factor (of a cyclic or
            one_cycle schedule `max_lr`), those of the others keep their ratio to it.
        config: see `SchedulerConfig`; read once. Its type is the class's where it is null.
        clock: names the phase of a step (grokfast), such as the trainer's; None: see
            `grokfast_clock`.

    Raises:
        SettingError: settings that contradict each other.
    """

    kind: ClassVar[SchedulerType | None] = None

    def __init__(
        self, optimizer: Optimizer, config: SchedulerConfig, clock: Clock | None = None
    ) -> None:
        values = config.values(**({} if self.kind is None else {"scheduler_type": self.kind}))
        if self.kind is not None and values.scheduler_type is not self.kind:
            raise SettingError(
                f"{type(self).__name__} with SchedulerConfig.scheduler_type "
                f"{values.scheduler_type.name}: it is {self.kind.name}"
            )
        self.optimizer = optimizer
        self.config = config
        self.plugin = schedule_plugin(values)
        self.monitor_metric = values.monitor_metric
        self._window: deque[float] = deque(maxlen=values.performance_window)
        self._run: Any = _RunView(values.total_steps)
        self._clock = clock or grokfast_clock(values)
        self._phase: str | None = None
        self.base_lrs: list[Any] = _reference_rates(optimizer, values.reference_lr)
        self._momentum = values.max_momentum
        self.last_epoch = -1
        self._last_lr: list[Any] = list(self.base_lrs)
        self._last_momentum: float | None = None
        self.step()

    def rates_of(self, number: int) -> tuple[list[float], float | None]:
        """Learning rate of each group, and momentum (None: it stays), at an optimizer step.

        Strategies with a memory must be asked for one step after the other.
        """
        phase = self._clock(number)
        self._run.progress.step = number - 1
        if phase != self._phase and hasattr(self.plugin, "on_phase_change"):
            self.plugin.on_phase_change(self._run, self._phase, phase)
        self._phase = phase
        result: ScheduleFactors = self.plugin.compute_schedule_factors(
            self._run, Step(number=number, phase=phase)
        )
        factor = result.learning_rate
        factors = factor if isinstance(factor, tuple) else (factor,) * len(self.base_lrs)
        rates = [base * item for base, item in zip(self.base_lrs, factors, strict=True)]
        momentum = result.momentum
        assert not isinstance(momentum, tuple), "no strategy here has one for each group"
        return rates, None if momentum is None else self._momentum * momentum

    def report(self, metrics: float | Mapping[str, float]) -> None:
        """Hand metrics to a strategy that listens to them."""
        values = dict(metrics) if isinstance(metrics, Mapping) else {}
        if not isinstance(metrics, Mapping):
            values[self.monitor_metric] = float(metrics)
        value = values.get(self.monitor_metric)
        if value is not None and math.isfinite(value):
            self._window.append(value)
            values[self.monitor_metric] = math.fsum(self._window) / len(self._window)
        if hasattr(self.plugin, "on_validation"):
            self.plugin.on_validation(self._run, values)

    def step(self, metrics: float | Mapping[str, float] | None = None) -> None:
        """Set the rate of the next optimizer step."""
        if metrics is not None:
            self.report(metrics)
        self.last_epoch += 1
        rates, momentum = self.rates_of(self.last_epoch + 1)
        self._last_lr = _write(self.optimizer, rates, momentum)
        self._last_momentum = momentum

    def state_dict(self) -> dict[str, Any]:
        """Plain values: where the schedule is, and what its strategy remembers."""
        remembers = hasattr(self.plugin, "state_dict")
        return {
            "last_epoch": self.last_epoch,
            "base_lrs": list(self.base_lrs),
            "last_lr": list(self._last_lr),
            "last_momentum": self._last_momentum,
            "phase": self._phase,
            "window": list(self._window),
            "strategy": self.plugin.state_dict() if remembers else {},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state; the optimizer's rate and momentum are those that it had.

        Raises:
            ValueError: it is of an optimizer with another number of groups.
        """
        if len(state_dict["base_lrs"]) != len(self.base_lrs):
            raise ValueError(
                f"the state is of {len(state_dict['base_lrs'])} parameter groups, the optimizer "
                f"has {len(self.base_lrs)}"
            )
        self.last_epoch = int(state_dict["last_epoch"])
        self.base_lrs = list(state_dict["base_lrs"])
        self._phase = state_dict["phase"]
        self._window = deque(state_dict["window"], maxlen=self._window.maxlen)
        if hasattr(self.plugin, "load_state_dict"):
            self.plugin.load_state_dict(state_dict["strategy"])
        self._last_momentum = state_dict.get("last_momentum")
        self._last_lr = _write(self.optimizer, state_dict["last_lr"], self._last_momentum)


def _reference_rates(optimizer: Optimizer, reference: float) -> list[float]:
    """What the factors are of, for each group; the groups keep their ratio to the first."""
    given = [float(initial_rate(group)) for group in optimizer.param_groups]
    if given[0] <= 0:
        return [reference] * len(given)
    return [reference * rate / given[0] for rate in given]


def _write(optimizer: Optimizer, rates: Sequence[float], momentum: float | None) -> list[float]:
    """Set both in each group; a schedule without momentum puts back the first one."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        write_rate(group, rate)
        if initial_momentum(group):  # plain gradient descent stays plain
            write_momentum(group, momentum)
    return list(rates)


def _of(kind: SchedulerType, about: str) -> type[Scheduler]:
    name = {SchedulerType.BITNET: "BitNet"}.get(kind, kind.value.title().replace("_", ""))
    body = {"kind": kind, "__doc__": about, "__module__": __name__}
    return type(f"{name}Scheduler", (Scheduler,), body)


ConstantScheduler = _of(SchedulerType.CONSTANT, "The base rate after the warm-up.")
LinearScheduler = _of(SchedulerType.LINEAR, "A straight line down.")
CosineScheduler = _of(SchedulerType.COSINE, "Half a cosine down.")
ExponentialScheduler = _of(SchedulerType.EXPONENTIAL, "A constant ratio from step to step.")
PolynomialScheduler = _of(SchedulerType.POLYNOMIAL, "A power of the share that is left.")
CyclicScheduler = _of(SchedulerType.CYCLIC, "Triangles.")
OneCycleScheduler = _of(SchedulerType.ONE_CYCLE, "One rise and one fall.")
AdaptiveScheduler = _of(SchedulerType.ADAPTIVE, "Falls when a metric stops to become better.")
GrokfastScheduler = _of(SchedulerType.GROKFAST, "A multiplier for each phase of the clock.")
BitNetScheduler = _of(SchedulerType.BITNET, "Low while weights are quantized in, then a cosine.")

_CLASSES: Final[dict[SchedulerType, type[Scheduler]]] = {
    found.kind: found
    for found in (
        ConstantScheduler, LinearScheduler, CosineScheduler, ExponentialScheduler,
        PolynomialScheduler, CyclicScheduler, OneCycleScheduler, AdaptiveScheduler,
        GrokfastScheduler, BitNetScheduler,
    )
    if found.kind is not None
}  # fmt: skip


class CompositeScheduler:
    """Several schedules of one optimizer, of which one at a time has the rate.

    Args:
        optimizer: the schedules' own.
        schedulers: by name, in order; the first one is active.
        strategy: `manual`: only `set_scheduler` switches; `sequential`: the next one takes over
            when the active one's entry of `until` is met.
        until: of `sequential`, by name: an optimizer step, or a function of the reported metrics
            that says when the schedule is over.
        join: `scale`: a schedule that takes over is scaled to begin at the rate that was (at its
            own after a rate of 0); `jump`: it begins at its own.

    Raises:
        ValueError: no schedule, or `until` names an unknown one, or is given to `manual`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedulers: Mapping[str, Scheduler],
        strategy: Literal["manual", "sequential"] = "sequential",
        *,
        until: Mapping[str, int | Callable[[Mapping[str, float]], bool]] | None = None,
        join: Literal["scale", "jump"] = "scale",
    ) -> None:
        until = dict(until or {})
        unknown = sorted(set(until) - set(schedulers))
        if not schedulers or unknown:
            raise ValueError(f"schedules: {sorted(schedulers)}; until names {unknown}")
        if strategy == "manual" and until:
            raise ValueError("until is read by the strategy 'sequential'; 'manual' has no ends")
        if strategy not in ("manual", "sequential") or join not in ("scale", "jump"):
            raise ValueError("strategy is 'manual' or 'sequential', join 'scale' or 'jump'")
        self.optimizer = optimizer
        self.schedulers = dict(schedulers)
        self.strategy, self.until, self.join = strategy, until, join
        self.active = next(iter(self.schedulers))
        self.last_epoch = 0
        self._scale = 1.0
        self._write()

    def set_scheduler(self, name: str) -> None:
        """Give the rate to a schedule, from the current step on.

        Raises:
            KeyError: there is none of this name.
        """
        if name not in self.schedulers:
            raise KeyError(f"no schedule '{name}'; there are {sorted(self.schedulers)}")
        before = self.get_last_lr()[0]
        self.active, self._scale = name, 1.0
        first = self.schedulers[name].rates_of(self.last_epoch + 1)[0][0]
        if self.join == "scale" and first > 0 and before > 0:  # 0 would be for ever
            self._scale = before / first
        self._write()

    def step(self, metrics: float | Mapping[str, float] | None = None) -> None:
        """Set the rate of the next optimizer step; metrics go to the active schedule."""
        if metrics is not None:
            self.schedulers[self.active].report(metrics)
        self.last_epoch += 1
        if self._over(metrics):
            names = list(self.schedulers)
            self.set_scheduler(names[names.index(self.active) + 1])
        else:
            self._write()

    def _over(self, metrics: float | Mapping[str, float] | None) -> bool:
        end = self.until.get(self.active)
        if end is None or self.active == list(self.schedulers)[-1]:
            return False
        if isinstance(end, int):
            return self.last_epoch >= end
        if metrics is None:
            return False
        name = self.schedulers[self.active].monitor_metric
        return bool(end(metrics if isinstance(metrics, Mapping) else {name: float(metrics)}))

    def _write(self) -> None:
        rates, momentum = self.schedulers[self.active].rates_of(self.last_epoch + 1)
        _write(self.optimizer, [rate * self._scale for rate in rates], momentum)

    def get_last_lr(self) -> list[float]:
        """The rate of each group."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """The active schedule, and the state of all."""
        return {
            "active": self.active,
            "scale": self._scale,
            "last_epoch": self.last_epoch,
            "schedulers": {name: item.state_dict() for name, item in self.schedulers.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up a state; the rate is the active schedule's."""
        for name, state in state_dict["schedulers"].items():
            self.schedulers[name].load_state_dict(state)
        self.active, self._scale = state_dict["active"], float(state_dict["scale"])
        self.last_epoch = int(state_dict["last_epoch"])
        self._write()


class SchedulerFactory:
    """Makes schedules."""

    @staticmethod
    def create_scheduler(
        optimizer: Optimizer, config: SchedulerConfig, clock: Clock | None = None
    ) -> Scheduler:
        """The schedule that the configuration names; see `Scheduler`."""
        return _CLASSES[config.values().scheduler_type](optimizer, config, clock)

    @staticmethod
    def create_composite_scheduler(
        optimizer: Optimizer,
        configs: Mapping[str, SchedulerConfig],
        strategy: Literal["manual", "sequential"] = "sequential",
        **options: Any,
    ) -> CompositeScheduler:
        """Schedules by name, one at a time; options: see `CompositeScheduler`."""
        made = {
            name: SchedulerFactory.create_scheduler(optimizer, item)
            for name, item in configs.items()
        }
        return CompositeScheduler(optimizer, made, strategy, **options)


class SchedulerMonitor:
    """ScheduleFactors and losses of the steps that it is told of, the newest `capacity` of them."""

    def __init__(self, capacity: int = 100_000) -> None:
        self._records: deque[tuple[int, float, float]] = deque(maxlen=capacity)

    def record_step(self, step: int, learning_rate: float, loss: float) -> None:
        """Keep a step's rate and loss."""
        self._records.append((int(step), float(learning_rate), float(loss)))

    def get_lr_effectiveness(self) -> dict[str, Any]:
        """How much the loss changed for each step at the rates of one order of magnitude.

        Returns:
            By band, such as `1e-3 to 1e-2`: `steps`, and `loss_change_per_step` (negative: it
            fell); a band that no two neighbouring records lie in is absent.
        """
        sums: dict[int, tuple[int, float]] = {}
        records = list(self._records)
        for (step, rate, loss), (next_step, _, next_loss) in itertools.pairwise(records):
            if next_step <= step or rate <= 0 or not math.isfinite(next_loss - loss):
                continue
            band = math.floor(math.log10(rate))
            steps, change = sums.get(band, (0, 0.0))
            sums[band] = (steps + next_step - step, change + next_loss - loss)
        return {
            f"1e{band} to 1e{band + 1}": {"steps": steps, "loss_change_per_step": change / steps}
            for band, (steps, change) in sorted(sums.items())
        }

    def plot_history(self, path: str | Path) -> Path:
        """Draw rate over step as an SVG file that needs no other.

        Raises:
            ValueError: nothing was recorded.
        """
        if not self._records:
            raise ValueError("no step was recorded: call record_step first")
        points = tuple((step, rate) for step, rate, _ in self._records)
        drawing = line_chart(
            [Series(label="learning rate", points=points)], title="Learning rate", y_label="rate"
        )
        tag, _, rest = drawing.partition(">")
        standing = f"{tag}><style>{STYLE}</style>{rest}"
        file = Path(path)
        file.write_text(standing, encoding="utf-8")
        return file
