"""The schedulers of the Phase 5 face against closed forms, torch's own and the kernel's plugins."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CyclicLR, LinearLR, LRScheduler

from agent_forge.phases.phase5_training.configuration import SettingError
from agent_forge.phases.phase5_training.pipeline.scheduler import (
    CompositeScheduler,
    CosineScheduler,
    LinearScheduler,
    SchedulerConfig,
    SchedulerFactory,
    SchedulerMonitor,
    SchedulerType,
)
from forge_kernel import PipelineConfig, RunConfig, run
from forge_kernel.config.use import UseData, UseLoss, UseModel, UseOptimizer, UsePhases, UseSchedule
from forge_kernel.contract.hookspecs import hookimpl
from forge_kernel.contract.plugin import Kind, PluginInfo
from forge_kernel.training.loaders.in_memory import NoConfig

SHORT = {"warmup_steps": 10, "total_steps": 100, "decay_steps": 50, "cycle_length": 20}


def optimizer(*rates: float, momentum: float = 0.9) -> torch.optim.Optimizer:
    groups = [{"params": [nn.Parameter(torch.zeros(2))], "lr": rate} for rate in rates or (0.1,)]
    return torch.optim.SGD(groups, lr=0.1, momentum=momentum)


def config(kind: SchedulerType, **settings: Any) -> SchedulerConfig:
    return SchedulerConfig(**{"scheduler_type": kind, **SHORT, **settings})


def trace(scheduler: Any, steps: int, metric: float | None = None) -> list[float]:
    """The rate that each of the first steps is made with."""
    found = []
    for _ in range(steps):
        found.append(float(scheduler.optimizer.param_groups[0]["lr"]))
        scheduler.step() if metric is None else scheduler.step(metric)
    return found


@pytest.mark.parametrize("kind", SchedulerType)
def test_each_strategy_makes_a_scheduler_that_steps_past_its_end(kind: SchedulerType) -> None:
    """Spec: G1, G2, G3, F2."""
    scheduler = SchedulerFactory.create_scheduler(optimizer(), config(kind))
    assert isinstance(scheduler, LRScheduler)
    found = trace(scheduler, 150)
    assert all(math.isfinite(rate) and rate > 0 for rate in found)
    assert scheduler.get_last_lr() == [scheduler.optimizer.param_groups[0]["lr"]]


@pytest.mark.parametrize("kind", SchedulerType)
def test_groups_keep_their_ratio(kind: SchedulerType) -> None:
    """Spec: G9. Planted: every group set to the first one's rate."""
    made = optimizer(0.1, 0.02)
    scheduler = SchedulerFactory.create_scheduler(made, config(kind))
    for _ in range(120):
        first, second = (group["lr"] for group in made.param_groups)
        assert second == pytest.approx(first / 5, rel=1e-12)
        scheduler.step()


@pytest.mark.parametrize("kind", SchedulerType)
def test_a_state_taken_up_in_the_middle_gives_the_same_rates(kind: SchedulerType) -> None:
    """Spec: G3. Planted: the strategy's own state left out (grokfast, adaptive differ)."""
    settings = config(kind, patience=2)
    straight = SchedulerFactory.create_scheduler(optimizer(), settings)
    trace(straight, 37, metric=1.0)
    fresh = SchedulerFactory.create_scheduler(optimizer(), settings)
    fresh.load_state_dict(straight.state_dict())
    assert trace(fresh, 60, metric=1.0) == trace(straight, 60, metric=1.0)


def test_linear_and_cosine_and_polynomial_follow_their_closed_forms() -> None:
    """Spec: G4."""
    positions = [10, 11, 20, 33, 47, 58, 69, 80, 99, 100]
    linear = trace(
        SchedulerFactory.create_scheduler(optimizer(), config(SchedulerType.LINEAR)), 130
    )
    cosine = trace(
        SchedulerFactory.create_scheduler(optimizer(), config(SchedulerType.COSINE)), 130
    )
    power = trace(
        SchedulerFactory.create_scheduler(optimizer(), config(SchedulerType.POLYNOMIAL, power=2.0)),
        130,
    )
    for step in positions:
        share = (step - 10) / 90
        assert linear[step - 1] == pytest.approx(1e-3 - (1e-3 - 1e-5) * share, rel=1e-9)
        half = 0.5 * (1 + math.cos(math.pi * share))
        assert cosine[step - 1] == pytest.approx(1e-6 + (1e-3 - 1e-6) * half, rel=1e-9)
        left = max(0.0, 1 - (step - 10) / 50)
        assert power[step - 1] == pytest.approx(1e-5 + (1e-3 - 1e-5) * left**2, rel=1e-9)
    assert linear[:10] == pytest.approx([1e-4 * step for step in range(1, 11)])
    assert set(linear[100:]) == {linear[99]}
    assert cosine[100:] == pytest.approx([1e-6] * 30)


def test_constant_and_exponential_follow_their_closed_forms() -> None:
    """Spec: G2, G4."""
    constant = SchedulerFactory.create_scheduler(
        optimizer(), config(SchedulerType.CONSTANT, warmup_type="none")
    )
    assert set(trace(constant, 30)) == {1e-3}
    falling = trace(
        SchedulerFactory.create_scheduler(optimizer(), config(SchedulerType.EXPONENTIAL)), 99
    )
    for step in (10, 20, 60, 99):
        assert falling[step - 1] == pytest.approx(1e-3 * 0.95 ** ((step - 10) / 50), rel=1e-9)


def test_cyclic_and_its_momentum_are_torchs() -> None:
    """Spec: G4."""
    ours, theirs = optimizer(), optimizer()
    scheduler = SchedulerFactory.create_scheduler(ours, config(SchedulerType.CYCLIC))
    reference = CyclicLR(
        theirs, base_lr=1e-3, max_lr=1e-2, step_size_up=10, base_momentum=0.8, max_momentum=0.95
    )
    for _ in range(50):
        for name in ("lr", "momentum"):
            assert ours.param_groups[0][name] == pytest.approx(
                theirs.param_groups[0][name], rel=1e-9
            )
        theirs.step()
        scheduler.step()
        reference.step()


def test_one_cycle_goes_from_base_to_max_to_final_with_momentum_against_it() -> None:
    """Spec: G4."""
    made = optimizer()
    scheduler = SchedulerFactory.create_scheduler(made, config(SchedulerType.ONE_CYCLE))
    rates, momenta = [], []
    for _ in range(100):
        rates.append(made.param_groups[0]["lr"])
        momenta.append(made.param_groups[0]["momentum"])
        scheduler.step()
    assert rates[0] == pytest.approx(1e-3)
    assert max(rates) == pytest.approx(1e-2)
    assert rates.index(max(rates)) == 9
    assert rates[-1] == pytest.approx(1e-5)
    assert (momenta[0], min(momenta), momenta[-1]) == pytest.approx((0.95, 0.8, 0.95))
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_adaptive_falls_after_patience_and_not_below_its_least() -> None:
    """Spec: G7. Planted: the metric not handed to the strategy."""
    settings = config(SchedulerType.ADAPTIVE, warmup_type="none", patience=2, performance_window=1,
                      min_lr_threshold=3e-4)  # fmt: skip
    scheduler = SchedulerFactory.create_scheduler(optimizer(), settings)
    found = trace(scheduler, 4, metric=1.0)
    assert found == pytest.approx([1e-3] * 4)
    assert trace(scheduler, 12, metric=1.0) == pytest.approx([5e-4] * 3 + [3e-4] * 9)
    falling = SchedulerFactory.create_scheduler(optimizer(), settings)
    for number in range(20):
        falling.step({"loss": 1.0 / (number + 1), "accuracy": 0.0})
    assert falling.get_last_lr() == [1e-3]


def test_bitnet_is_low_while_weights_are_quantized_in() -> None:
    """Spec: G6."""
    found = trace(SchedulerFactory.create_scheduler(optimizer(), config(SchedulerType.BITNET)), 120)
    assert found[:10] == pytest.approx([1e-5 * step for step in range(1, 11)])
    assert found[10:20] == pytest.approx([5e-4] * 10)
    assert found[20] == pytest.approx(1e-3, rel=1e-3)
    assert found[99] == pytest.approx(1e-6)


def test_grokfast_reads_the_clock_that_it_is_given() -> None:
    """Spec: G5, E4. Planted: the scheduler's own clock in place of the one given."""

    def clock(step: int) -> str:
        return "warmup" if step <= 3 else "acceleration" if step <= 6 else "consolidation"

    settings = config(SchedulerType.GROKFAST, warmup_steps=3, phase_transition_smoothing=0)
    found = trace(SchedulerFactory.create_scheduler(optimizer(), settings, clock), 9)
    assert found == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, *[5e-3] * 3, *[2e-4] * 3])


class _Rates:
    """Notes the rate of each step of a run."""

    info = PluginInfo(name="rates", kind=Kind.OBSERVERS, config=NoConfig)
    config = NoConfig()

    def __init__(self) -> None:
        self.found: list[float] = []

    @hookimpl
    def on_step_end(self, run: Any, step: Any) -> None:
        self.found.append(run.optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("kind", [kind for kind in SchedulerType if kind.value != "adaptive"])
def test_the_kernel_gives_the_same_rates_for_the_translated_settings(
    kind: SchedulerType, tmp_path: Path
) -> None:
    """Spec: G5, I15."""
    settings = config(kind, warmup_steps=4, total_steps=30, decay_steps=20, cycle_length=8,
                      cycle_momentum=False, phase_transition_smoothing=3)  # fmt: skip
    name, translated = settings.plugin_settings()
    phases = UsePhases("grokfast", {
        "warmup_steps": 4, "acceleration_steps": 16, "consolidation_steps": 7, "refinement_steps": 3,
    })  # fmt: skip
    rates = _Rates()
    run(
        PipelineConfig(
            run=RunConfig(max_steps=30, device="cpu"),
            data=UseData("modular_arithmetic", {"modulus": 5, "batch_size": 4}),
            model=UseModel("mlp", {"hidden": [4]}),
            optimizer=UseOptimizer("sgd", {"lr": settings.reference_lr}),
            loss=UseLoss("cross_entropy"),
            phases=phases,
            schedule=UseSchedule(name, translated),
        ),
        plugins=[rates],
        quiet=True,
        output_dir=tmp_path / "run",
    )

    def clock(step: int) -> str:
        ends = {4: "warmup", 20: "acceleration", 27: "consolidation", 30: "refinement"}
        return next((phase for end, phase in ends.items() if step <= end), "completed")

    alone = trace(SchedulerFactory.create_scheduler(optimizer(), settings, clock), 30)
    assert rates.found == pytest.approx(alone, rel=1e-12)


def test_a_composite_goes_on_from_the_rate_that_was_unless_told_to_jump() -> None:
    """Spec: G8. Planted: both schedules written at each step."""
    for join, after in (("scale", 1e-3), ("jump", 5e-4)):
        made = optimizer()
        first = LinearScheduler(made, config(SchedulerType.LINEAR, warmup_steps=0))
        second = CosineScheduler(
            made, config(SchedulerType.COSINE, warmup_steps=0, base_lr=5e-4, total_steps=10**6)
        )
        composite = CompositeScheduler(
            made,
            {"first": first, "second": second},
            until={"first": 20},
            join=join,  # type: ignore[arg-type]
        )
        found = trace(composite, 40)
        alone = trace(
            LinearScheduler(optimizer(), config(SchedulerType.LINEAR, warmup_steps=0)), 20
        )
        assert found[:20] == alone
        expected = found[19] if join == "scale" else after
        assert found[20] == pytest.approx(expected, rel=1e-3)
        assert composite.active == "second"


@pytest.mark.parametrize(
    ("order", "ends"),
    [
        ("abc", {"a": 10, "b": 20}),
        ("abcd", {"a": 5, "b": 12, "c": 20}),
        ("cab", {"c": 3, "a": 9}),  # by place, not by name
        ("abc", {"a": 6}),  # the second has no end
        ("abc", {"a": 8, "b": 8}),  # the second's end is past when its turn comes: one step
    ],
)
def test_a_composite_gives_the_rate_to_each_of_its_schedules_in_turn(
    order: str, ends: dict[str, int]
) -> None:
    """Spec: G8. Planted: the last one takes over; the first one again; the next by name."""
    made, rate = optimizer(), {"a": 1e-3, "b": 5e-4, "c": 2e-4, "d": 7e-5}
    composite = CompositeScheduler(
        made,
        {
            name: SchedulerFactory.create_scheduler(
                made, config(SchedulerType.CONSTANT, warmup_type="none", base_lr=rate[name])
            )
            for name in order
        },
        until=ends,
        join="jump",
    )
    expected, place = [], 0
    for done in range(30):
        if done >= ends.get(order[place], 30):
            place += 1
        expected.append(rate[order[place]])
    assert trace(composite, 30) == pytest.approx(expected, rel=1e-12)
    assert composite.active == order[place]


def test_metrics_hand_the_rate_from_one_of_four_schedules_to_the_next() -> None:
    """Spec: G8. Planted: the last one takes over."""
    names = ["far", "near", "there", "rest"]
    composite = SchedulerFactory.create_composite_scheduler(
        optimizer(),
        {name: config(SchedulerType.CONSTANT) for name in names},
        until={
            name: lambda metrics, bar=bar: metrics["loss"] < bar
            for name, bar in zip(names, (0.9, 0.5, 0.1), strict=False)
        },
    )
    seen = []
    for loss in (1.0, 0.8, 0.8, 0.4, 0.05, 0.05):
        composite.step(loss)
        seen.append(composite.active)
    assert seen == ["far", "near", "near", "there", "rest", "rest"]


def test_a_composite_switches_by_hand_and_by_a_metric_and_keeps_its_state() -> None:
    """Spec: G8."""

    def made() -> CompositeScheduler:
        return SchedulerFactory.create_composite_scheduler(
            optimizer(),
            {"a": config(SchedulerType.CONSTANT), "b": config(SchedulerType.COSINE)},
            until={"a": lambda metrics: metrics["loss"] < 0.5},
        )

    straight = made()
    straight.step(0.9)
    assert straight.active == "a"
    straight.step(0.4)
    assert straight.active == "b"
    again = made()
    again.load_state_dict(straight.state_dict())
    assert trace(again, 20) == trace(straight, 20)
    again.set_scheduler("a")
    assert again.active == "a"
    with pytest.raises(KeyError, match="no schedule 'c'"):
        again.set_scheduler("c")


def test_settings_that_contradict_each_other_are_refused() -> None:
    """Spec: G1."""
    with pytest.raises(SettingError, match="min_lr 0.01 is above base_lr 0.001"):
        SchedulerFactory.create_scheduler(optimizer(), config(SchedulerType.COSINE, min_lr=1e-2))
    with pytest.raises(SettingError, match="total_steps 5 is not beyond warmup_steps 10"):
        SchedulerFactory.create_scheduler(optimizer(), config(SchedulerType.LINEAR, total_steps=5))
    with pytest.raises(SettingError, match="LinearScheduler with .*COSINE"):
        LinearScheduler(optimizer(), config(SchedulerType.COSINE))
    with pytest.raises(AttributeError, match="warmup_steps"):
        SchedulerConfig(warmup_step=3)


def test_the_rate_of_the_first_step_is_set_on_construction_as_torch_does() -> None:
    """Spec: G3."""
    ours, theirs = optimizer(), optimizer(1e-3)
    scheduler = SchedulerFactory.create_scheduler(ours, config(SchedulerType.CONSTANT))
    reference = LinearLR(theirs, start_factor=0.1, total_iters=9)
    for _ in range(20):
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"])
        theirs.step()
        scheduler.step()
        reference.step()


def test_the_monitor_tells_what_a_rate_did_and_draws_it(tmp_path: Path) -> None:
    """Spec: K7."""
    monitor = SchedulerMonitor()
    with pytest.raises(ValueError, match="no step was recorded"):
        monitor.plot_history(tmp_path / "none.svg")
    for step in range(10):
        monitor.record_step(step, 2e-3, 1.0 - 0.01 * step)
    for step in range(10, 20):
        monitor.record_step(step, 2e-4, 0.9)
    found = monitor.get_lr_effectiveness()
    assert found["1e-3 to 1e-2"]["steps"] == 10
    assert found["1e-3 to 1e-2"]["loss_change_per_step"] == pytest.approx(-0.01)
    assert found["1e-4 to 1e-3"]["loss_change_per_step"] == 0.0
    drawing = ET.fromstring(monitor.plot_history(tmp_path / "rate.svg").read_text())
    assert drawing.tag.endswith("svg")
