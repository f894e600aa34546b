"""Grokfast: the slow component of the gradients amplified."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, cast

from msgspec import Meta

from forge_kernel.api import (
    Kind,
    LazyModule,
    LogRecord,
    MetricInfo,
    PluginError,
    PluginInfo,
    Run,
    ScheduleFactors,
    Step,
    UseSchedule,
    hookimpl,
)
from forge_plugins.mathematics.grokfast.adaptation import AdaptationRule, FilterAdaptation
from forge_plugins.mathematics.grokfast.setting_checks import swapped

if TYPE_CHECKING:
    import torch

    from forge_plugins.mathematics.grokfast import filters as mathematics
else:
    torch = LazyModule("torch")
    mathematics = LazyModule("forge_plugins.mathematics.grokfast.filters")


class Schedule(Protocol):
    """What a nested plugin is asked for."""

    def compute_schedule_factors(self, run: Run, step: Step) -> ScheduleFactors:
        """Factors; the one of the learning rate is taken."""
        ...


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """A rule that changes alpha and lambda_reg by how a metric goes.

    After each window of values its mean is compared with the one before. Stalled: the slow gradient
    gets more weight and a longer memory; worse: less and a shorter one; better: nothing changes.
    Each change is an event of the log.
    """

    metric: Annotated[str, Meta(min_length=1, description="name of the metric")] = "loss"
    source: Annotated[
        Literal["validation", "log"],
        Meta(description="where it is read: at each validation, or at each line of the log "
             "(run.log_every)"),
    ] = "validation"  # fmt: skip
    mode: Annotated[
        Literal["max", "min"], Meta(description="whether higher (max) or lower (min) is better")
    ] = "min"
    window: Annotated[int, Meta(ge=1, description="values in one judgement")] = 3
    tolerance: Annotated[
        float, Meta(ge=0, description="relative change of the mean that counts as none")
    ] = 0.01
    lambda_factor: Annotated[
        float, Meta(ge=1, description="lambda_reg times this when stalled; 1 leaves it alone")
    ] = 1.25
    alpha_factor: Annotated[
        float,
        Meta(ge=1, description="memory 1 / (1 - alpha) times this when stalled; 1 leaves it alone"),
    ] = 1.0
    lambda_bounds: Annotated[
        tuple[Annotated[float, Meta(ge=0)], Annotated[float, Meta(ge=0)]],
        Meta(description="least and greatest lambda_reg"),
    ] = (0.1, 10.0)
    alpha_bounds: Annotated[
        tuple[Annotated[float, Meta(ge=0, lt=1)], Annotated[float, Meta(ge=0, lt=1)]],
        Meta(description="least and greatest alpha"),
    ] = (0.5, 0.999)

    def __post_init__(self) -> None:
        for name in ("lambda_bounds", "alpha_bounds"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: the least, {low:g}, is above the greatest, {high:g}")
        if self.lambda_factor == 1.0 and self.alpha_factor == 1.0:
            raise ValueError("lambda_factor and alpha_factor are both 1: nothing would be adapted")

    def rule(self) -> AdaptationRule:
        """The rule of the mathematics."""
        return AdaptationRule(
            window=self.window, tolerance=self.tolerance, lambda_factor=self.lambda_factor,
            alpha_factor=self.alpha_factor, lambda_bounds=self.lambda_bounds,
            alpha_bounds=self.alpha_bounds, mode=self.mode,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GrokfastConfig:
    """Which average, how slow, how much of it, and when."""

    renamed: ClassVar[Mapping[str, str]] = {"adapt.figure": "metric"}

    filter: Annotated[
        Literal["ema", "ma"],
        Meta(description="exponential moving average, or mean over a window"),
    ] = "ema"
    alpha: Annotated[float, Meta(ge=0, lt=1, description="decay of the moving average (ema)")] = (
        0.98
    )
    lambda_reg: Annotated[
        float, Meta(ge=0, description="how much of the slow gradient is added")
    ] = 2.0
    window: Annotated[int, Meta(ge=1, description="gradients in the window (ma)")] = 100
    wait_until_full: Annotated[
        bool, Meta(description="leave gradients alone until the window is full (ma)")
    ] = True
    beginning: Annotated[
        Literal["first", "zero", "debiased"],
        Meta(description="what the average starts from: the first gradient, zero, or zero with "
             "the bias divided out (ema)"),
    ] = "first"  # fmt: skip
    normalize: Annotated[
        bool, Meta(description="divide by 1 + lambda_reg, so that a steady gradient keeps its size")
    ] = False
    start_step: Annotated[
        int,
        Meta(ge=1, description="first step that is amplified; before it gradients are averaged "
             "only (the paper's two stages)"),
    ] = 1  # fmt: skip
    lambda_schedule: Annotated[
        UseSchedule[Schedule] | None, Meta(description="factor of lambda_reg by step; null: 1")
    ] = None
    alpha_schedule: Annotated[
        UseSchedule[Schedule] | None, Meta(description="factor of alpha by step (ema); null: 1")
    ] = None
    phase_lambda: Annotated[
        dict[str, Annotated[float, Meta(ge=0)]],
        Meta(description="factor of lambda_reg in phases of the run's clock; 1 in others"),
    ] = field(default_factory=dict)
    adapt: Annotated[
        Adaptation | None,
        Meta(description="change alpha and lambda_reg by how a metric goes; null: do not"),
    ] = None

    @staticmethod
    def advice(values: Mapping[str, Any]) -> str | None:
        """A hint for settings that are wrong in a known way."""
        return swapped(values)

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < 1 or self.lambda_reg < 0:
            hint = self.advice({"alpha": self.alpha, "lambda_reg": self.lambda_reg})
            raise ValueError(hint or "alpha lies in [0, 1), lambda_reg is at least 0")
        if self.filter == "ma":
            if self.alpha_schedule is not None:
                raise ValueError("alpha_schedule: the filter ma has no alpha")
            if self.adapt is not None and self.adapt.alpha_factor != 1.0:
                raise ValueError("adapt.alpha_factor: the filter ma has no alpha; set it to 1")


def _needs(config: GrokfastConfig) -> tuple[str, ...]:
    """The facts that the run must bring."""
    result = [f"phase:{name}" for name in config.phase_lambda]
    if config.adapt is not None and config.adapt.source == "validation":
        result.append(f"metric:{config.adapt.metric}")
    return tuple(result)


def _factor(schedule: object, run: Run, step: Step) -> float:
    """The factor that a nested schedule gives for this step (of the first group, if several)."""
    rate = cast(Schedule, schedule).compute_schedule_factors(run, step).learning_rate
    return rate[0] if isinstance(rate, tuple) else rate


class Grokfast:
    """Grokfast: the slow component of the gradients amplified.

    The filter with its memory, one for each parameter that has had a gradient.
    """

    info = PluginInfo(
        name="grokfast",
        kind=Kind.GRADIENTS,
        config=GrokfastConfig,
        requires=_needs,
        metrics=(
            MetricInfo("slow_gradient_norm", title="Slow gradient norm", section="Grokking"),
            MetricInfo("grokfast_alpha", title="Grokfast alpha", section="Grokking"),
            MetricInfo("grokfast_lambda", title="Grokfast lambda", section="Grokking"),
        ),
    )

    def __init__(self, config: GrokfastConfig) -> None:
        self.config = config
        self._memory: dict[torch.nn.Parameter, Any] = {}
        self._names: dict[torch.nn.Parameter, str] = {}
        self._loaded: dict[str, Any] = {}
        self._adaptation = (
            None
            if config.adapt is None
            else FilterAdaptation(config.adapt.rule(), config.alpha, config.lambda_reg)
        )
        self._in_force = (config.alpha, config.lambda_reg)

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Learn the parameters' names, which the checkpoint keeps the memory under."""
        self._names = {parameter: name for name, parameter in run.named_parameters()}
        for parameter, name in self._names.items():
            if name in self._loaded:
                self._memory[parameter] = self._revive(parameter, self._loaded[name])
        self._loaded = {}

    @hookimpl
    def on_gradients(self, run: Run, step: Step) -> None:
        """Filter in place; a parameter that joins late starts its own memory."""
        memory, config = self._memory, self.config
        alpha, lambda_reg = self._in_force = self._strength(run, step)
        for parameter, gradient in zip(step.parameters, step.gradients, strict=True):
            if parameter not in memory:
                memory[parameter] = self._begin(gradient)
        mine = [memory[parameter] for parameter in step.parameters]
        if config.filter == "ema":
            mathematics.filter_ema(
                step.gradients,
                mine,
                alpha=alpha,
                lambda_reg=lambda_reg,
                beginning=config.beginning,
                normalize=config.normalize,
            )
        else:
            mathematics.filter_ma(
                step.gradients,
                mine,
                lambda_reg=lambda_reg,
                wait_until_full=config.wait_until_full,
                normalize=config.normalize,
            )

    def _strength(self, run: Run, step: Step) -> tuple[float, float]:
        """Decay and amplification of this step.

        Raises:
            PluginError: the schedule brings the decay out of its range.
        """
        config, adapted = self.config, self._adaptation
        alpha = config.alpha if adapted is None else adapted.alpha
        amount = config.lambda_reg if adapted is None else adapted.lambda_reg
        if step.number < config.start_step:
            return alpha, 0.0
        if config.lambda_schedule is not None:
            amount *= _factor(config.lambda_schedule, run, step)
        if config.alpha_schedule is not None:
            alpha *= _factor(config.alpha_schedule, run, step)
            if not 0 <= alpha < 1:
                raise PluginError(
                    f"grokfast: alpha_schedule makes alpha {alpha:g} in step {step.number}; it "
                    "must stay below 1"
                )
        return alpha, amount * config.phase_lambda.get(step.phase or "", 1.0)

    @hookimpl
    def on_validation(self, run: Run, metrics: Mapping[str, float]) -> None:
        """The adaptation's metric, where it is one of the validation."""
        adapt = self.config.adapt
        if adapt is not None and adapt.source == "validation" and adapt.metric in metrics:
            self._adapt(run, metrics[adapt.metric])

    @hookimpl
    def on_log(self, run: Run, record: LogRecord) -> None:
        """The adaptation's metric, where it is one of the log."""
        adapt = self.config.adapt
        if adapt is None or adapt.source != "log":
            return
        if adapt.metric not in record.metrics:
            raise PluginError(
                f"grokfast: the log has no metric '{adapt.metric}' (adapt.metric); it has "
                f"{', '.join(sorted(record.metrics))}"
            )
        value = record.metrics[adapt.metric]
        if value is not None:
            self._adapt(run, value)

    def _adapt(self, run: Run, value: float) -> None:
        adaptation, adapt = self._adaptation, self.config.adapt
        assert adaptation is not None, "asked without a rule"
        assert adapt is not None, "asked without a rule"
        before = (adaptation.alpha, adaptation.lambda_reg)
        verdict = adaptation.take(value)
        if (adaptation.alpha, adaptation.lambda_reg) == before:
            return
        run.emit_event(
            "filter_adapted",
            f"Grokfast: {adapt.metric} is {verdict}; alpha {before[0]:.4g} -> "
            f"{adaptation.alpha:.4g}, lambda_reg {before[1]:.4g} -> {adaptation.lambda_reg:.4g}.",
            verdict=verdict,
            alpha=adaptation.alpha,
            lambda_reg=adaptation.lambda_reg,
        )

    def _begin(self, gradient: torch.Tensor) -> Any:
        if self.config.filter == "ema":
            return mathematics.SlowGradient.like(gradient)
        return mathematics.Window(gradient, self.config.window)

    @hookimpl
    def log_metrics(self, run: Run, step: Step) -> dict[str, Any]:
        """Norm of the slow gradient, and the two numbers in force."""
        del run, step
        alpha, amount = self._in_force
        strength = {"grokfast_alpha": alpha} if self.config.filter == "ema" else {}
        strength["grokfast_lambda"] = amount
        if not self._memory:
            return {"slow_gradient_norm": None, **strength}
        if self.config.filter == "ema":
            slow = [memory.mean for memory in self._memory.values()]
        else:
            slow = [
                memory.sum / max(1, min(memory.count, len(memory.ring)))
                for memory in self._memory.values()
            ]
        return {"slow_gradient_norm": torch.nn.utils.get_total_norm(slow), **strength}

    def state_dict(self) -> dict[str, Any]:
        """The averages by parameter name."""
        kept: dict[str, Any] = {}
        for parameter, memory in self._memory.items():
            if self.config.filter == "ema":
                kept[self._names[parameter]] = {"mean": memory.mean, "count": memory.count}
            else:
                kept[self._names[parameter]] = {
                    "ring": memory.ring, "sum": memory.sum, "count": memory.count,
                }  # fmt: skip
        adapted = None if self._adaptation is None else self._adaptation.state_dict()
        return {"filter": self.config.filter, "memory": kept, "adaptation": adapted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the averages up when the parameters are known.

        Raises:
            ValueError: the state is of the other filter or of another window.
        """
        if state["filter"] != self.config.filter:
            raise ValueError(
                f"grokfast: the checkpoint holds the memory of the {state['filter']} filter, "
                f"the configuration says {self.config.filter}"
            )
        if self._adaptation is not None and state["adaptation"] is not None:
            self._adaptation.load_state_dict(state["adaptation"])
        self._memory, self._loaded = {}, dict(state["memory"])
        for parameter, name in self._names.items():  # in mid-run: a rollback
            if name in self._loaded:
                self._memory[parameter] = self._revive(parameter, self._loaded.pop(name))

    def _revive(self, parameter: torch.nn.Parameter, kept: Mapping[str, Any]) -> Any:
        memory = self._begin(parameter.detach())
        if self.config.filter == "ema":
            memory.mean.copy_(kept["mean"])
        else:
            if memory.ring.shape != kept["ring"].shape:
                raise ValueError(
                    f"grokfast: the checkpoint holds a window of {len(kept['ring'])} gradients, "
                    f"the configuration says {self.config.window}"
                )
            memory.ring.copy_(kept["ring"])
            memory.sum.copy_(kept["sum"])
        memory.count = int(kept["count"])
        return memory
