"""Capabilities that come and go; weights drawn toward the best ones, kept or put back."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_parts import make_plugin, make_session
from torch import nn

from forge_kernel.api import Kind
from forge_kernel.config.use import UseCallback
from forge_kernel.contract.values import Batch
from forge_kernel.errors import PlanError, PluginError
from forge_kernel.planning.catalog import Catalog
from forge_kernel.planning.pipeline_file import load_pipeline
from forge_kernel.planning.plan import plan
from forge_kernel.runner import run
from forge_kernel.storage.checkpoint_store import CheckpointStore
from forge_kernel.testing.compare import differences
from forge_kernel.testing.trial import Trial
from forge_kernel.training.loaders.data_loaders import LoaderData


class Script:
    """A metric whose metric follows a script."""

    def __init__(self, values: list[float]) -> None:
        self.goals = {"score": "max"}
        self.values = list(values)

    def reset(self) -> None:
        pass

    def update(self, *_: Any) -> None:
        pass

    def compute(self, add: Any) -> dict[str, float]:
        return {"score": self.values.pop(0)}


def scripted(values: list[float]) -> Any:
    metric = Script(values)
    validator = make_plugin("script", Kind.VALIDATORS, make_metrics=lambda self, run: [metric])
    type(validator).info = replace(type(validator).info, provides=("metric:score",))
    return validator


def listener(told: list[Any]) -> Any:
    def on_event(self: Any, run: Any, event: Any) -> None:
        told.append((event.step, event.name, dict(event.facts)))

    return make_plugin("listener", Kind.OBSERVERS, on_event=on_event)


def weight_cache() -> Any:
    """A plugin that keeps the weight matrix as each step left it."""
    left: dict[int, Any] = {}

    def on_step_end(self: Any, run: Any, step: Any) -> None:
        left[step.number] = run.model.weight.detach().clone()

    plugin = make_plugin("weight_cache", Kind.OBSERVERS, on_step_end=on_step_end)
    plugin.left = left
    return plugin


def session(
    values: list[float], use: UseCallback[Any], told: list[Any], folder: Path | None, **options: Any
) -> Any:
    torch.manual_seed(0)
    batches = [Batch(torch.randn(4, 4), torch.randint(3, (4,))) for _ in range(40)]
    return make_session(
        nn.Linear(4, 3), LoaderData(batches, batches[:1]), folder=folder,
        plugins=[scripted(values), listener(told), weight_cache()], uses={"callbacks": (use,)},
        **{"validate_every": 1, "max_steps": len(values), **options},
    )  # fmt: skip


def watching(**capability: Any) -> UseCallback[Any]:
    return UseCallback(
        "capabilities", {"capabilities": {"skill": {"metric": "score", **capability}}}
    )


@pytest.mark.spec("E11")
@pytest.mark.parametrize(
    ("capability", "values", "expected"),
    [
        ({"threshold": 0.5}, [0.4, 0.5, 0.6], [(2, "acquired")]),
        ({"threshold": 0.5, "duration": 3}, [0.6, 0.6, 0.1, 0.6, 0.6, 0.6, 0.7], [(6, "acquired")]),
        ({"threshold": 0.5, "duration": 2}, [0.6, 0.6, 0.4, 0.6, 0.6],
         [(2, "acquired"), (3, "lost"), (5, "acquired")]),
        ({"threshold": 0.5, "mode": "min"}, [0.9, 0.5, 0.6], [(2, "acquired"), (3, "lost")]),
        ({"threshold": 0.5}, [0.9, math.nan, 0.4], [(1, "acquired"), (3, "lost")]),
        ({"threshold": 2.0}, [0.9, 1.0], []),
    ],
)  # fmt: skip
def test_a_capability_is_acquired_after_its_duration_and_lost_when_it_falls_back(
    capability: dict[str, Any], values: list[float], expected: list[Any]
) -> None:
    told: list[Any] = []
    session(values, watching(**capability), told, None).train()
    assert [(step, name.removeprefix("capability_")) for step, name, _ in told] == expected
    assert all(facts["capability"] == "skill" for _, _, facts in told)


@pytest.mark.spec("H18")
@pytest.mark.parametrize(
    ("mode", "values", "retention"),
    [
        ("max", [0.4, 0.8, 0.6], 0.75),
        ("max", [0.4, 0.8], 1.0),
        ("min", [0.5, 0.25, 1.0], 0.25),
        ("max", [-1.0, -2.0], None),
        ("max", [0.8, math.nan], None),
    ],
)
def test_retention_is_the_latest_metric_against_the_best(
    mode: str, values: list[float], retention: float | None
) -> None:
    running = session(values, watching(threshold=0.5, mode=mode), [], None)
    running.train()
    assert running.log().metrics["retention/skill"] == (
        None if retention is None else pytest.approx(retention)
    )


def test_before_any_validation_nothing_is_retained() -> None:
    running = session([0.5], watching(threshold=0.5), [], None)
    assert running.log().metrics["retention/skill"] is None


def test_what_a_capability_has_held_survives_a_resume() -> None:
    use = watching(threshold=0.5, duration=3)
    first = session([0.6, 0.9], use, [], None)
    first.train()
    told: list[Any] = []
    second = session([0.6], use, told, None, max_steps=3)
    second.take_up(first.snapshot())
    second.train()
    assert [(step, name) for step, name, _ in told] == [(3, "capability_acquired")]
    assert told[0][2]["retention"] == pytest.approx(0.6 / 0.9)


def test_a_capability_of_a_metric_that_nobody_measures_is_refused() -> None:
    capability = "{skill: {metric: acuracy, threshold: 1}}"
    settings = [f"callbacks=[{{use: capabilities, with: {{capabilities: {capability}}}}}]"]
    with pytest.raises(PlanError, match=r"metric 'acuracy'(.|\n)*did you mean 'accuracy'"):
        plan(load_pipeline("smoke", settings))


# -- consolidation ------------------------------------------------------------------------------


def consolidating(**settings: Any) -> UseCallback[Any]:
    chosen = {"every": 2, "phase": None, "metric": "score", "mode": "max", **settings}
    return UseCallback("consolidation", chosen)


def traced(running: Any) -> tuple[dict[int, Any], dict[int, Any]]:
    """The weight matrix by step: as the optimizer left it, and as the step left it."""
    parameter = running.run.model.weight
    stepped: dict[int, Any] = {}
    left = next(part.left for part in running.bus.instances.values() if hasattr(part, "left"))
    running.run.optimizer.register_step_post_hook(
        lambda *_: stepped.update({running.run.progress.step + 1: parameter.detach().clone()})
    )
    return stepped, left


@pytest.mark.spec("E10", "K12")
@pytest.mark.spec("E10")
@pytest.mark.parametrize("share", [0.25, 1.0])
@pytest.mark.parametrize("after", [0.5, 0.7])
def test_a_draw_that_does_not_harm_is_kept(tmp_path: Path, share: float, after: float) -> None:
    """Step 1 has the best weights, step 2 the metric to hold, step 3 the draw."""
    told: list[Any] = []
    running = session([0.9, 0.5, after], consolidating(fraction=share), told, tmp_path)
    stepped, left = traced(running)
    running.train()
    expected = torch.lerp(stepped[3], left[1], share)
    assert torch.allclose(running.run.model.weight, expected, atol=1e-7)
    assert torch.equal(running.run.model.weight, left[3])
    facts = {"metric": "score", "before": 0.5, "after": after, "best_step": 1}
    assert told == [(3, "consolidation_accepted", facts)]


@pytest.mark.spec("E10", "K12")
@pytest.mark.spec("E10")
@pytest.mark.parametrize("after", [0.4999, math.nan])
def test_a_draw_that_harms_is_taken_back_to_the_bit(tmp_path: Path, after: float) -> None:
    told: list[Any] = []
    running = session([0.9, 0.5, after], consolidating(), told, tmp_path)
    _, left = traced(running)
    running.train()
    assert not torch.equal(left[3], left[2])
    assert torch.equal(running.run.model.weight, left[2])
    assert [(step, name) for step, name, _ in told] == [(3, "consolidation_rejected")]


def test_the_metric_may_be_one_that_is_to_fall(tmp_path: Path) -> None:
    told: list[Any] = []
    session([0.1, 0.5, 0.6], consolidating(mode="min"), told, tmp_path).train()
    assert [name for _, name, _ in told] == ["consolidation_rejected"]


def test_the_best_weights_are_not_drawn_toward_themselves(tmp_path: Path) -> None:
    told: list[Any] = []
    session([0.1, 0.5, 0.6, 0.7, 0.8], consolidating(), told, tmp_path).train()
    assert told == []


def test_without_other_validations_it_asks_for_its_own(tmp_path: Path) -> None:
    """At steps 2, 4, 6 for the metric to hold, at 5 and 7 for those of the draws."""
    told: list[Any] = []
    values = [0.9, 0.5, 0.6, 0.5, 0.4]
    running = session(values, consolidating(), told, tmp_path, validate_every=None, max_steps=7)
    running.train()
    assert [(step, name) for step, name, _ in told] == [
        (5, "consolidation_accepted"), (7, "consolidation_rejected"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("phase", "steps"), [("consolidation", [9]), ("warmup", [5]), (None, [5, 7, 9])]
)
def test_attempts_are_made_in_the_phase_named(
    tmp_path: Path, phase: str | None, steps: list[int]
) -> None:
    lengths = (
        "{warmup_steps: 5, acceleration_steps: 0, consolidation_steps: 5, refinement_steps: 0}"
    )
    told: list[Any] = []
    settings = [
        "run.max_steps=10", "run.validate_every=null", f"phases={{use: grokfast, with: {lengths}}}",
        "callbacks=[{use: consolidation, with: {every: 2, metric: score, mode: max, phase: "
        f"{json.dumps(phase)}}}}}]",
    ]  # fmt: skip
    pipeline = load_pipeline("smoke", settings, live={Kind.VALIDATORS})
    plugins = [scripted([0.9, *[0.5] * 20]), listener(told)]
    run(pipeline, plugins=plugins, output_dir=tmp_path / "run", quiet=True)
    attempts = [step for step, name, _ in told if name.startswith("consolidation_")]
    assert attempts == steps  # the phase's first validation gives the best weights


def learning(folder: Path, callbacks: tuple[Any, ...], told: list[Any]) -> tuple[float, float]:
    """Last and best loss of a run whose weights are wrecked in step 41; too late to learn it again."""
    torch.manual_seed(0)
    inputs = torch.randn(64, 4)
    batches = [Batch(inputs, inputs[:, :3].argmax(1))] * 200

    def on_weights(self: Any, run: Any, step: Any) -> None:
        if step.number == 41:
            for _, parameter in run.named_parameters():
                parameter.detach().mul_(-3)

    bad = make_plugin("bad", Kind.CALLBACKS, on_weights=on_weights)
    running = make_session(
        nn.Linear(4, 3), LoaderData(batches, batches[:1]), plugins=[bad, listener(told)],
        uses={"callbacks": callbacks}, folder=folder, max_steps=60, validate_every=5, lr=0.02,
    )  # fmt: skip
    running.train()
    return running.validate()["loss"], running.run.metrics.best["loss"]


@pytest.mark.spec("E10")
def test_a_run_recovers_from_a_forced_bad_step(tmp_path: Path) -> None:
    told: list[Any] = []
    use = UseCallback("consolidation", {"every": 4, "phase": None, "fraction": 0.7})
    lost, _ = learning(tmp_path / "without", (), [])
    last, best = learning(tmp_path / "with", (use,), told)
    accepted = [facts for _, name, facts in told if name == "consolidation_accepted"]
    assert accepted
    assert all(facts["after"] <= facts["before"] for facts in accepted)
    assert lost > 1.5 * best
    assert last < 1.05 * best


@pytest.mark.parametrize("stop_after", [2, 3, 4, 5, 6, 7])
def test_an_attempt_survives_a_new_start_wherever_it_was(tmp_path: Path, stop_after: int) -> None:
    trial = Trial(
        Catalog.installed(), Kind.CALLBACKS, "consolidation",
        {"every": 2, "phase": None, "metric": "accuracy", "mode": "max", "fraction": 0.9},
    )  # fmt: skip
    trial.run(tmp_path / "straight", validate_every=1)
    trial.run(tmp_path / "cut", stop_after=stop_after, validate_every=1)
    trial.resume(tmp_path / "cut")
    left, right = (
        CheckpointStore(tmp_path / x / "checkpoints").path(10) for x in ("straight", "cut")
    )
    log = (tmp_path / "straight/forge.log").read_text()
    assert "consolidation_" in log
    assert differences(left, right) == []


def test_it_writes_only_what_it_owns(tmp_path: Path) -> None:
    told: list[Any] = []
    session([0.9, 0.5, 0.4], consolidating(), told, tmp_path, checked=True).train()
    assert len(told) == 1


def test_consolidation_without_a_run_folder_is_refused() -> None:
    with pytest.raises(PluginError, match="needs a run folder"):
        session([0.9], consolidating(), [], None)


def test_consolidation_without_its_phase_or_beside_an_average_is_refused() -> None:
    with pytest.raises(PlanError, match="the phase 'consolidation' of training"):
        plan(load_pipeline("smoke", ["callbacks=[{use: consolidation}]"]))
    both = "callbacks=[{use: weight_average}, {use: consolidation, with: {phase: null}}]"
    with pytest.raises(PlanError, match="cannot run beside"):
        plan(load_pipeline("smoke", [both]))
