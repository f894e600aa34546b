"""How much of the slow gradient is added, and how slow it is, from step to step."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_parts import make_plugin, make_session
from torch import nn

from forge_kernel.api import Kind
from forge_kernel.config.use import UseGradients, UsePhases
from forge_kernel.contract.data import DataSpec
from forge_kernel.contract.values import Batch
from forge_kernel.errors import ConfigError, PlanError, PluginError
from forge_kernel.planning.pipeline_file import load_pipeline
from forge_kernel.planning.plan import plan
from forge_kernel.testing.trial import TrialValidator
from forge_kernel.training.loaders.data_loaders import LoaderData
from forge_plugins.mathematics.grokfast.adaptation import AdaptationRule, FilterAdaptation

BATCHES = [
    Batch(torch.randn(5, 4, generator=torch.Generator().manual_seed(i)), torch.arange(5) % 3)
    for i in range(8)
]


def filtered(model: nn.Module, uses: dict[str, Any] | None = None, **config: Any) -> list[Any]:
    """The filtered weight gradient of each step; the rate is 0, so that only the filter differs."""
    seen: list[torch.Tensor] = []

    def on_gradients(self: Any, run: Any, step: Any) -> None:
        seen.append(step.gradients[0].clone())

    named = {"gradients": (UseGradients("grokfast", {"alpha": 0.9, **config}),)}
    watcher = make_plugin("watcher", Kind.GRADIENTS, on_gradients=on_gradients)
    session = make_session(
        copy.deepcopy(model), BATCHES, lr=0.0, max_steps=len(BATCHES), plugins=[watcher],
        uses={**named, **(uses or {})},
    )  # fmt: skip
    for batch in BATCHES:
        session.step(batch)
    return seen


def expected(model: nn.Module, alphas: list[float], lambdas: list[float]) -> list[torch.Tensor]:
    """The filter written out, with the two numbers of each step."""
    found, mean = [], None
    for batch, alpha, amount in zip(BATCHES, alphas, lambdas, strict=True):
        model.zero_grad()
        nn.functional.cross_entropy(model(batch.inputs), batch.targets).backward()
        gradient = model.weight.grad.double()  # type: ignore[union-attr]
        mean = gradient if mean is None else alpha * mean + (1 - alpha) * gradient
        found.append((gradient + amount * mean).float())
    return found


def check(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert len(found) == len(wanted)
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)


def test_before_the_start_step_gradients_are_averaged_and_not_amplified(linear: nn.Module) -> None:
    """Planted fault: the average begins at the start step too."""
    check(
        filtered(linear, start_step=4, lambda_reg=2.0),
        expected(linear, [0.9] * 8, [0.0] * 3 + [2.0] * 5),
    )


def test_a_schedule_leads_lambda_and_another_one_alpha(linear: nn.Module) -> None:
    factors = [0.25, 0.5, 0.75] + [1.0] * 5
    schedule = {"use": "linear_warmup", "with": {"warmup_steps": 4}}
    check(
        filtered(linear, lambda_reg=3.0, lambda_schedule=schedule),
        expected(linear, [0.9] * 8, [3.0 * factor for factor in factors]),
    )
    check(
        filtered(linear, lambda_reg=3.0, alpha_schedule=schedule),
        expected(linear, [0.9 * factor for factor in factors], [3.0] * 8),
    )


def test_phases_of_the_clock_have_their_own_lambda(linear: nn.Module) -> None:
    clock = UsePhases(
        "grokfast",
        {
            "warmup_steps": 2,
            "acceleration_steps": 3,
            "consolidation_steps": 2,
            "refinement_steps": 1,
        },
    )
    check(
        filtered(
            linear, {"phases": clock}, lambda_reg=2.0,
            phase_lambda={"warmup": 0.0, "consolidation": 0.25},
        ),
        expected(linear, [0.9] * 8, [0.0] * 2 + [2.0] * 3 + [0.5] * 2 + [2.0]),
    )  # fmt: skip


def test_a_phase_that_no_clock_has_is_refused_when_planned() -> None:
    named = load_pipeline("smoke", ["gradients[0].with.phase_lambda={warmup: 0}"])
    with pytest.raises(PlanError, match="needs the phase 'warmup' of training"):
        plan(named)


def test_alpha_may_not_be_led_out_of_its_range(linear: nn.Module) -> None:
    with pytest.raises(PluginError, match=r"alpha_schedule makes alpha 1.8 in step 1"):
        filtered(linear, alpha_schedule={"use": "constant", "with": {"factor": 2.0}})


RULE: dict[str, Any] = {
    "window": 2, "tolerance": 0.1, "lambda_factor": 2.0, "alpha_factor": 4.0,
    "lambda_bounds": (0.5, 4.0), "alpha_bounds": (0.5, 0.99), "mode": "min",
}  # fmt: skip


def adaptation(**changes: Any) -> FilterAdaptation:
    return FilterAdaptation(AdaptationRule(**{**RULE, **changes}), alpha=0.9, lambda_reg=1.0)


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("level", [-10.0, 10.0])
def test_the_margin_of_a_verdict_is_a_share_of_the_metrics_size_whatever_its_sign(
    mode: str, level: float
) -> None:
    """Planted: `before` in the place of `abs(before)`: below 0 every change is a gain or a loss."""
    rule = AdaptationRule(**{**RULE, "tolerance": 0.1, "mode": mode})
    toward = 1.0 if mode == "max" else -1.0
    for change, verdict in ((0.5, "stalled"), (-0.5, "stalled"), (2.0, "better"), (-2.0, "worse")):
        assert rule.judge(level, level + toward * change) == verdict


@pytest.mark.spec("E12")
def test_better_changes_nothing_stalled_amplifies_and_worse_backs_off() -> None:
    """Planted faults: the sign of the verdict; a judgement before the second window."""
    rule = adaptation()
    assert [rule.take(value) for value in (2.0, 2.0)] == [None, None]
    assert [rule.take(value) for value in (1.0, 1.0)] == [None, "better"]
    assert (rule.alpha, rule.lambda_reg) == (0.9, 1.0)
    assert [rule.take(value) for value in (1.02, 1.02)] == [None, "stalled"]
    assert (rule.alpha, rule.lambda_reg) == (pytest.approx(0.975), 2.0)
    assert [rule.take(value) for value in (3.0, 3.0)] == [None, "worse"]
    assert (rule.alpha, rule.lambda_reg) == (pytest.approx(0.9), 1.0)
    rising = adaptation(mode="max")
    for value in (1.0, 1.0, 3.0):
        rising.take(value)
    assert rising.take(3.0) == "better"


@pytest.mark.spec("E12")
@given(values=st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=60))
@settings(max_examples=60, deadline=None)
def test_whatever_the_metrics_are_the_numbers_stay_within_their_bounds(values: list[float]) -> None:
    rule = adaptation(window=1)
    for place, value in enumerate(values):
        _ = rule.take(value)
        assert 0.5 <= rule.lambda_reg <= 4.0
        assert 0.5 <= rule.alpha <= 0.99
        if place == len(values) // 2:  # a resumed run goes on the same way
            copied = adaptation(window=1)
            copied.load_state_dict(rule.state_dict())
            rule = copied


def test_a_factor_of_one_leaves_its_number_alone() -> None:
    rule = adaptation(window=1, lambda_factor=1.0, lambda_bounds=(3.0, 4.0))
    for _ in range(3):
        _ = rule.take(1.0)
    assert rule.lambda_reg == 1.0
    assert rule.alpha > 0.9


@pytest.mark.spec("E12")
@pytest.mark.parametrize("source", ["validation", "log"])
def test_the_run_adapts_tells_it_and_filters_with_the_new_numbers(
    linear: nn.Module, source: str
) -> None:
    told: list[Any] = []

    def on_event(self: Any, run: Any, event: Any) -> None:
        told.append(event)

    metric = "accuracy" if source == "validation" else "loss"
    adapt = {
        "source": source, "metric": metric, "window": 1, "tolerance": 1e9, "lambda_factor": 1.5,
        "mode": "max",
    }  # fmt: skip
    seen: list[float] = []

    def on_log(self: Any, run: Any, record: Any) -> None:
        seen.append(record.metrics["grokfast_lambda"])

    watcher = make_plugin("watcher", Kind.OBSERVERS, on_event=on_event, on_log=on_log)
    data = LoaderData(BATCHES, BATCHES[:1], DataSpec(classes=3))
    session = make_session(
        linear, data, lr=0.1, log_every=1, plugins=[watcher, TrialValidator()],
        uses={"gradients": (UseGradients("grokfast", {"lambda_reg": 1.0, "adapt": adapt}),)},
    )  # fmt: skip
    for batch in BATCHES[:4]:
        session.step(batch)
        if source == "validation":
            session.bus.calls("on_validation")[0](session.run, {"accuracy": 0.5})
        session.run_due_actions()
    assert seen[0] == 1.0
    assert seen[-1] > 1.5
    assert told
    assert {event.name for event in told} == {"filter_adapted"}
    assert told[0].facts == {"verdict": "stalled", "alpha": 0.98, "lambda_reg": 1.5}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"filter": "ma", "adapt": {"alpha_factor": 2.0}}, "the filter ma has no alpha"),
        ({"filter": "ma", "alpha_schedule": {"use": "constant"}}, "the filter ma has no alpha"),
        ({"adapt": {"lambda_factor": 1.0}}, "nothing would be adapted"),
        ({"adapt": {"lambda_bounds": [2.0, 1.0]}}, "the least, 2, is above the greatest, 1"),
        ({"adapt": {"alpha_bounds": [0.9, 0.5]}}, "the least, 0.9, is above the greatest, 0.5"),
    ],
)
def test_what_contradicts_itself_is_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_pipeline("smoke", [f"gradients[0].with={json.dumps(config)}"])


def test_a_metric_of_the_log_that_is_not_there_is_named() -> None:
    torch.manual_seed(0)
    adapt = {"source": "log", "metric": "happiness"}
    session = make_session(
        nn.Linear(4, 3), BATCHES, log_every=1,
        uses={"gradients": (UseGradients("grokfast", {"adapt": adapt}),)},
    )  # fmt: skip
    session.step(BATCHES[0])
    with pytest.raises(PluginError, match="no metric 'happiness'"):
        session.run_due_actions()
