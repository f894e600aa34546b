"""Schedules against their closed forms, and torch's own where torch has them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_parts import SgdPart, make_plugin, make_session
from torch import nn

from forge_kernel.config.use import UsePhases, UseSchedule
from forge_kernel.contract.plugin import Kind
from forge_kernel.contract.run import Run
from forge_kernel.contract.run_config import RunConfig
from forge_kernel.contract.values import Batch, Step
from forge_kernel.errors import ConfigError, PlanError, PluginError
from forge_kernel.training.one_process import OneProcess
from forge_plugins.mathematics.grokfast import phase_lengths
from forge_plugins.mathematics.optimizers import learning_rate_curves as rates
from forge_plugins.mathematics.optimizers.learning_rate_curves import linear_warmup
from forge_plugins.schedules.composite import Composite, CompositeConfig, Until
from forge_plugins.schedules.constant import Constant, ConstantConfig
from forge_plugins.schedules.plateau import Plateau, PlateauConfig


def trace(use: UseSchedule[Any], steps: int, **options: Any) -> list[float]:
    """The learning rate that each step is taken with."""
    batch = Batch(torch.randn(4, 4), torch.randint(3, (4,)))
    session = make_session(
        nn.Linear(4, 3), [batch], uses={"schedule": use}, lr=0.5, **{"max_steps": steps, **options}
    )
    rates = []
    for _ in range(steps):
        session.step(batch)
        rates.append(session.run.optimizer.param_groups[0]["lr"])
    return rates


def torchs_rates(optimizer: Any, scheduler: Any, steps: int) -> list[float]:
    """The learning rate that each step is taken with under a scheduler of torch."""
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def sgd(**options: Any) -> torch.optim.SGD:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5, **options)


def test_the_constant_schedule_is_a_factor() -> None:
    assert trace(UseSchedule("constant", {"factor": 0.5}), 3) == [0.25] * 3
    assert trace(UseSchedule("constant"), 2) == [0.5] * 2


def test_linear_warmup_has_its_closed_form_at_ten_points() -> None:
    rates = trace(UseSchedule("linear_warmup", {"warmup_steps": 8}), 10)
    assert rates == pytest.approx([0.5 * min(step / 8, 1) for step in range(1, 11)])
    assert trace(UseSchedule("linear_warmup", {"warmup_steps": 0}), 2) == [0.5, 0.5]
    late = trace(UseSchedule("linear_warmup", {"warmup_steps": 4, "from_zero": True}), 6)
    assert late == pytest.approx([0.0, 0.125, 0.25, 0.375, 0.5, 0.5])


def test_warmup_cosine_has_its_closed_form_and_stays_at_the_floor() -> None:
    config = {"warmup_steps": 3, "total_steps": 9, "floor": 0.1}
    rates = trace(UseSchedule("warmup_cosine", config), 14)
    expected = []
    for step in range(1, 15):
        if step < 3:
            factor = step / 3
        else:
            done = min(1.0, (step - 3) / 6)  # the full rate at step 3, the floor at step 9
            factor = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))
        expected.append(0.5 * factor)
    assert rates == pytest.approx(expected)
    assert rates[9:] == pytest.approx([0.05] * 5)
    assert max(rates) == pytest.approx(0.5)


def test_without_warmup_it_is_torchs_cosine() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=0.1)
    expected = torchs_rates(optimizer, theirs, 21)
    ours = trace(
        UseSchedule("warmup_cosine", {"warmup_steps": 0, "floor": 0.2, "total_steps": 21}), 21
    )
    assert ours == pytest.approx(expected)


def test_its_length_is_the_runs_when_not_given() -> None:
    assert trace(UseSchedule("warmup_cosine", {"warmup_steps": 2}), 12)[-1] == pytest.approx(0.0)


def test_a_run_of_unknown_length_is_refused() -> None:
    with pytest.raises(PluginError, match="total_steps"):
        trace(UseSchedule("warmup_cosine"), 3, max_steps=None, max_seconds=100)


@given(
    warmup=st.integers(0, 50),
    extra=st.integers(1, 200),
    floor=st.floats(0, 1),
    step=st.integers(1, 400),
)
@settings(max_examples=100, deadline=None)
def test_factors_stay_between_floor_and_one_after_the_warmup(
    warmup: int, extra: int, floor: float, step: int
) -> None:
    position = step - 1
    for curve in (
        lambda at: rates.cosine(at, extra, floor),
        lambda at: rates.linear(at, extra, floor),
        lambda at: rates.polynomial(at, extra, 2.0, floor),
        lambda at: rates.stable_decay(at, extra, max(1, extra // 3), floor, "root"),
    ):
        factor = curve(position)
        assert floor - 1e-12 <= factor <= 1.0 + 1e-12
        assert curve(position + 1) <= factor + 1e-12
        assert curve(0) == pytest.approx(1.0)
        assert curve(extra) == pytest.approx(floor)
    assert 0 < linear_warmup(step, warmup) <= 1


def test_linear_and_polynomial_are_torchs() -> None:
    optimizer = sgd()
    theirs: Any = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.25, total_iters=9)
    expected = torchs_rates(optimizer, theirs, 14)
    config = {"warmup_steps": 0, "total_steps": 10, "floor": 0.25}
    assert trace(UseSchedule("linear", config), 14) == pytest.approx(expected)
    optimizer = sgd()
    theirs = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=9, power=3.0)
    expected = torchs_rates(optimizer, theirs, 14)
    config = {"warmup_steps": 0, "total_steps": 10, "power": 3.0}
    assert trace(UseSchedule("polynomial", config), 14) == pytest.approx(expected, abs=1e-9)


def test_exponential_is_torchs_and_its_staircase_holds_between_steps() -> None:
    optimizer = sgd()
    theirs: Any = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    config = {"decay_rate": 0.9, "decay_steps": 1}
    expected = torchs_rates(optimizer, theirs, 12)
    assert trace(UseSchedule("exponential", config), 12) == pytest.approx(expected)
    optimizer = sgd()
    theirs = torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.5)
    config = {"decay_rate": 0.5, "decay_steps": 4, "staircase": True, "floor": 0.3}
    expected = [max(rate, 0.15) for rate in torchs_rates(optimizer, theirs, 12)]
    assert trace(UseSchedule("exponential", config), 12) == pytest.approx(expected)


@pytest.mark.parametrize("growth", [1, 2, 3])
def test_cosine_restarts_are_torchs(growth: int) -> None:
    optimizer = sgd()
    theirs = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
        optimizer, T_0=5, T_mult=growth, eta_min=0.05
    )
    config = {"first_cycle_steps": 5, "growth": growth, "floor": 0.1}
    expected = torchs_rates(optimizer, theirs, 70)
    assert trace(UseSchedule("cosine_restarts", config), 70) == pytest.approx(expected)


def test_later_cycles_are_as_much_lower_as_asked() -> None:
    config = {"first_cycle_steps": 4, "peak_decay": 0.5, "warmup_steps": 2, "floor": 0.2}
    found = trace(UseSchedule("cosine_restarts", config), 10)
    assert [found[0], found[1], found[5], found[9]] == pytest.approx([0.25, 0.5, 0.3, 0.2])


@pytest.mark.parametrize("form", ["cosine", "linear"])
def test_one_cycle_is_torchs_with_its_momentum(form: str) -> None:
    optimizer = sgd(momentum=0.95)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.5, total_steps=20, anneal_strategy={"cosine": "cos"}.get(form, form),
        base_momentum=0.76, max_momentum=0.95,
    )  # fmt: skip
    rates_found, momenta = [], []
    for _ in range(20):
        rates_found.append(optimizer.param_groups[0]["lr"])
        momenta.append(optimizer.param_groups[0]["momentum"])
        optimizer.step()
        theirs.step() if len(rates_found) < 20 else None
    batch = Batch(torch.randn(4, 4), torch.randint(3, (4,)))
    use = UseSchedule("one_cycle", {"form": form, "lowest_momentum": 0.8})
    session = make_session(
        nn.Linear(4, 3), [batch], uses={"schedule": use}, max_steps=20,
        optimizer=SgdPart(0.5, momentum=0.95),
    )  # fmt: skip
    for rate, momentum in zip(rates_found, momenta, strict=True):
        session.step(batch)
        group = session.run.optimizer.param_groups[0]
        assert group["lr"] == pytest.approx(rate)
        assert group["momentum"] == pytest.approx(momentum)


@pytest.mark.parametrize("mode", ["triangular", "triangular2", "exponential"])
def test_cyclic_is_torchs(mode: str) -> None:
    optimizer = sgd()
    theirs = torch.optim.lr_scheduler.CyclicLR(
        optimizer, base_lr=0.1, max_lr=0.5, step_size_up=3, step_size_down=5, gamma=0.95,
        mode={"exponential": "exp_range"}.get(mode, mode), cycle_momentum=False,
    )  # fmt: skip
    gamma = {"gamma": 0.95} if mode == "exponential" else {}
    config = {"rise_steps": 3, "fall_steps": 5, "floor": 0.2, "mode": mode, **gamma}
    expected = torchs_rates(optimizer, theirs, 30)
    assert trace(UseSchedule("cyclic", config), 30) == pytest.approx(expected)


def test_the_cycles_momentum_goes_against_the_rate() -> None:
    batch = Batch(torch.randn(4, 4), torch.randint(3, (4,)))
    use = UseSchedule("cyclic", {"rise_steps": 2, "lowest_momentum": 0.5})
    session = make_session(
        nn.Linear(4, 3), [batch], uses={"schedule": use}, optimizer=SgdPart(0.5, momentum=0.8)
    )
    found = []
    for _ in range(4):
        session.step(batch)
        found.append(session.run.optimizer.param_groups[0]["momentum"])
    assert found == pytest.approx([0.8, 0.6, 0.4, 0.6])


def test_a_gamma_that_no_mode_reads_is_refused() -> None:
    with pytest.raises(ConfigError, match="exponential"):
        trace(UseSchedule("cyclic", {"gamma": 0.9}), 1)


@pytest.mark.parametrize(
    ("fall", "halfway"), [("linear", 0.55), ("cosine", 0.55), ("root", 0.1 + 0.9 * (1 - 0.5**0.5))]
)
def test_warmup_stable_decay_has_its_closed_form(fall: str, halfway: float) -> None:
    config = {
        "warmup_steps": 2,
        "decay_fraction": 0.5,
        "floor": 0.1,
        "fall": fall,
        "total_steps": 10,
    }
    found = trace(UseSchedule("warmup_stable_decay", config), 12)
    factors = [rate / 0.5 for rate in found]
    assert factors[:6] == pytest.approx([0.5, 1, 1, 1, 1, 1])
    assert factors[7] == pytest.approx(halfway)
    assert factors[9:] == pytest.approx([0.1, 0.1, 0.1])


@pytest.mark.parametrize("name", ["linear", "polynomial", "warmup_cosine", "warmup_stable_decay"])
@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_a_fall_of_a_single_step_is_at_the_floor_with_it(name: str, warmup: int) -> None:
    """Planted: no fall shorter than two steps."""
    config: dict[str, Any] = {"warmup_steps": warmup, "floor": 0.2}
    if name == "warmup_stable_decay":
        config["decay_fraction"] = 1.0
    full = max(1, warmup)
    assert trace(UseSchedule(name, config), full + 2, max_steps=full + 1)[full - 1 :] == (
        pytest.approx([0.5, 0.1, 0.1])
    )


@pytest.mark.parametrize("form", ["cosine", "linear"])
def test_one_cycle_of_two_steps_ends_at_its_end(form: str) -> None:
    """Planted: no cycle shorter than three steps."""
    config = {"start": 0.4, "end": 0.02, "form": form, "rise_fraction": 0.5}
    assert trace(UseSchedule("one_cycle", config), 2)[-1] == pytest.approx(0.01)


@pytest.mark.parametrize("mode", ["relative", "absolute"])
@pytest.mark.parametrize("goal", ["min", "max"])
@pytest.mark.parametrize(("patience", "cooldown"), [(1, 2), (2, 0), (0, 0), (0, 1), (3, 1)])
def test_plateau_is_torchs(mode: str, goal: str, patience: int, cooldown: int) -> None:
    """Planted: the count goes on after a fall; a metric that is no number is the best one."""
    optimizer = sgd()
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode=goal, factor=0.9, patience=patience, threshold=0.1,
        cooldown=cooldown, min_lr=0.05,
        threshold_mode={"relative": "rel", "absolute": "abs"}[mode],
    )  # fmt: skip
    config = PlateauConfig(
        factor=0.9,
        patience=patience,
        threshold=0.1,
        threshold_mode=mode,
        cooldown=cooldown,
        floor=0.1,
        mode=goal,
    )
    ours = Plateau(config)
    generator = torch.Generator().manual_seed(3)
    metrics = [math.nan, *(torch.rand(60, generator=generator) + 0.5).tolist()]
    metrics += [math.nan, 0.01, 3.0, *[1.0] * 60]
    for number, metric in enumerate(metrics):
        ours.on_validation(None, {"loss": metric})
        theirs.step(metric)
        rate = ours.compute_schedule_factors(None, Step(number + 1)).learning_rate
        assert 0.5 * rate == pytest.approx(optimizer.param_groups[0]["lr"]), number
        copy = Plateau(config)
        copy.load_state_dict(ours.state_dict())
        ours = copy  # its state is all that it knows
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


def test_plateau_needs_a_metric_that_the_run_has() -> None:
    with pytest.raises(PlanError, match="needs the metric 'f1'"):
        trace(UseSchedule("plateau", {"metric": "f1"}), 1)


PHASES = {
    "warmup_steps": 2,
    "acceleration_steps": 3,
    "consolidation_steps": 2,
    "refinement_steps": 2,
}


def phased(schedule: UseSchedule[Any], steps: int, **lengths: Any) -> tuple[list[float], Any]:
    batch = Batch(torch.randn(4, 4), torch.randint(3, (4,)))
    events: list[Any] = []

    def on_event(self: Any, run: Any, event: Any) -> None:
        events.append(event)

    session = make_session(
        nn.Linear(4, 3), [batch], max_steps=steps, lr=0.5,
        uses={"schedule": schedule, "phases": UsePhases("grokfast", {**PHASES, **lengths})},
        plugins=[make_plugin("ear", Kind.OBSERVERS, on_event=on_event)],
    )  # fmt: skip
    found = []
    for _ in range(steps):
        session.step(batch)
        found.append(session.run.optimizer.param_groups[0]["lr"])
    return found, events


@pytest.mark.spec("E4", "E5", "E9", "G5")
def test_the_phase_schedule_has_the_clocks_boundaries() -> None:
    use = UseSchedule(
        "grokfast", {"smoothing_steps": 0, "warmup_steps": 2, "completed_multiplier": 0.05}
    )
    found, _ = phased(use, 11)
    factors = [0.5, 1, 5, 5, 5, 0.2, 0.2, 0.1, 0.1, 0.05, 0.05]
    assert found == pytest.approx([0.5 * factor for factor in factors])


def test_the_way_from_phase_to_phase_takes_as_long_as_asked() -> None:
    use = UseSchedule(
        "grokfast", {"smoothing_steps": 2, "warmup_steps": 0, "acceleration_multiplier": 4}
    )
    found, _ = phased(use, 9)
    assert found[:5] == pytest.approx([0.5, 0.5, 1.0, 2.0, 2.0])


def test_phases_longer_than_the_run_are_fitted_and_the_user_is_told() -> None:
    use = UseSchedule("grokfast", {"smoothing_steps": 0, "warmup_steps": 0})
    found, events = phased(use, 9, acceleration_steps=3000, warmup_steps=2000, consolidation_steps=2000, refinement_steps=2000)  # fmt: skip
    assert found == pytest.approx([0.5] * 2 + [2.5] * 3 + [0.1] * 2 + [0.05] * 2)
    assert [event.name for event in events] == ["phases_longer_than_run"]
    assert "acceleration 3" in events[0].message
    found, events = phased(use, 3, acceleration_steps=3000, fit=False)
    assert found == pytest.approx([0.5, 0.5, 2.5])
    assert "acceleration" in events[0].message


def test_a_phase_schedule_without_a_clock_is_refused() -> None:
    with pytest.raises(PlanError, match="needs the phase 'acceleration' of training"):
        trace(UseSchedule("grokfast"), 1)


def test_phases_without_any_length_are_refused() -> None:
    with pytest.raises(ConfigError, match="length"):
        phased(UseSchedule("constant"), 1, **dict.fromkeys(PHASES, 0))


@given(
    lengths=st.lists(st.integers(0, 5000), min_size=4, max_size=4).filter(any),
    total=st.integers(1, 5000),
)
@settings(max_examples=200, deadline=None)
def test_fitted_phases_fill_a_short_run_in_proportion(lengths: list[int], total: int) -> None:
    named = dict(zip(phase_lengths.PHASES, lengths, strict=False))
    found = phase_lengths.fitted(named, total)
    whole = sum(lengths)
    if whole <= total:
        assert found == named
        return
    assert sum(found.values()) == total
    for name, length in named.items():
        assert abs(found[name] - length * total / whole) <= 1


@pytest.mark.spec("G6")
def test_the_bitnet_schedule_is_low_while_weights_are_quantized_in() -> None:
    nested = {"use": "warmup_cosine", "with": {"warmup_steps": 2}}
    config = {"quantization_steps": 4, "low": 0.25, "smoothing_steps": 2, "schedule": nested}
    found = trace(UseSchedule("bitnet", config), 10)
    whole = trace(UseSchedule("warmup_cosine", {"warmup_steps": 2}), 10)
    ratios = [ours / theirs for ours, theirs in zip(found[:9], whole[:9], strict=True)]
    assert ratios == pytest.approx([0.25] * 4 + [0.5, 1, 1, 1, 1])


@pytest.mark.spec("G8")
def test_a_composite_switches_by_step_without_a_jump() -> None:
    parts = [{"use": "constant", "with": {"factor": 0.5}}, {"use": "exponential", "with": {"decay_rate": 0.5, "decay_steps": 1}}]  # fmt: skip
    config = {"schedules": parts, "until": [{"step": 3}], "clock": "switch"}
    assert trace(UseSchedule("composite", config), 6) == pytest.approx(
        [0.25, 0.25, 0.25, 0.25, 0.125, 0.0625]
    )
    config = {**config, "join": "jump"}
    assert trace(UseSchedule("composite", config), 5) == pytest.approx([0.25] * 3 + [0.5, 0.25])
    config = {**config, "clock": "run"}
    assert trace(UseSchedule("composite", config), 4)[-1] == pytest.approx(0.5 * 0.5**3)


def test_a_composite_switches_by_metric_and_by_phase() -> None:
    composite = Composite(
        CompositeConfig(
            schedules=(Constant(ConstantConfig(factor=1.0)), Constant(ConstantConfig(factor=0.5)), Constant(ConstantConfig(factor=0.25))),
            until=(Until(metric="accuracy", threshold=0.9, mode="max"), Until(phase="refinement")),
            join="jump",
        )
    )  # fmt: skip
    run = Run(RunConfig(), None, OneProcess())

    def factor(step: int) -> Any:
        return composite.compute_schedule_factors(run, Step(step)).learning_rate

    assert factor(1) == 1.0
    composite.on_validation(run, {"accuracy": 0.89})
    composite.on_phase_change(run, None, "refinement")  # not yet its turn
    assert factor(2) == 1.0
    composite.on_validation(run, {"accuracy": 0.9})
    assert factor(3) == 0.5
    copy = Composite(composite.config)
    copy.load_state_dict(composite.state_dict())
    composite = copy
    assert factor(4) == 0.5
    composite.on_phase_change(run, "consolidation", "refinement")
    assert factor(5) == 0.25
    assert [event.name for event in run.events] == ["schedule", "schedule"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"schedules": [{"use": "constant"}], "until": [{"step": 3}]}, "need 0 entries"),
        ({"until": [{"step": 3, "phase": "warmup"}]}, "exactly one"),
        ({"until": [{"metric": "loss"}]}, "go together"),
        (
            {"schedules": [{"use": "constant"}] * 3, "until": [{"step": 5}, {"step": 5}]},
            "must rise",
        ),
    ],
)
def test_a_composite_that_contradicts_itself_is_refused(config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trace(UseSchedule("composite", config), 1)


def test_a_composite_cannot_scale_what_begins_at_nothing() -> None:
    parts = [{"use": "constant"}, {"use": "linear", "with": {"total_steps": 2, "warmup_steps": 0}}]
    with pytest.raises(PluginError, match="join: jump"):
        trace(UseSchedule("composite", {"schedules": parts, "until": [{"step": 2}]}), 3)


@pytest.mark.spec("G9")
def test_groups_keep_their_ratio_under_every_schedule() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))

    def make(self: Any, run: Any, parameters: Any) -> Any:
        groups = [
            {"params": list(model[0].parameters()), "lr": 0.5},
            {"params": list(model[1].parameters()), "lr": 0.05},
        ]
        return torch.optim.SGD(groups)

    batch = Batch(torch.randn(4, 4), torch.randint(3, (4,)))
    for use in (UseSchedule("one_cycle"), UseSchedule("cyclic", {"rise_steps": 2}), UseSchedule("composite")):  # fmt: skip
        session = make_session(
            model, [batch], uses={"schedule": use}, max_steps=6,
            optimizer=make_plugin("two_groups", Kind.OPTIMIZER, make_optimizer=make),
        )  # fmt: skip
        for _ in range(6):
            session.step(batch)
            first, second = (group["lr"] for group in session.run.optimizer.param_groups)
            assert first == pytest.approx(10 * second)


@pytest.mark.parametrize(
    ("use", "steps", "warmup"),
    [
        (UseSchedule("linear", {"warmup_steps": 5}), 3, 5),
        (UseSchedule("linear", {"warmup_steps": 5}), 5, 5),
        (UseSchedule("linear", {"warmup_steps": 5}), 6, None),
        (UseSchedule("one_cycle"), 1, 1),
        (UseSchedule("one_cycle"), 2, None),
    ],
)
def test_a_run_that_ends_within_the_warmup_is_told(
    use: UseSchedule[Any], steps: int, warmup: int | None
) -> None:
    """Red when a run is told that is a step longer, or one is not that ends with the warm-up."""
    batch = Batch(torch.randn(4, 4), torch.randint(3, (4,)))
    events: list[Any] = []

    def on_event(self: Any, run: Any, event: Any) -> None:
        events.append((event.name, dict(event.facts)))

    make_session(
        nn.Linear(4, 3), [batch], max_steps=steps, uses={"schedule": use},
        plugins=[make_plugin("ear", Kind.OBSERVERS, on_event=on_event)],
    )  # fmt: skip
    told = ("warmup_not_over", {"warmup_steps": warmup, "total_steps": steps})
    assert events == ([] if warmup is None else [told])
