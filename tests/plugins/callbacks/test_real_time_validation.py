"""Validation by the step and by the clock, within a share of the time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_parts import make_plugin, make_session
from torch import nn

from forge_kernel.api import Kind
from forge_kernel.config.use import UseCallback
from forge_kernel.contract.data import DataSpec
from forge_kernel.contract.values import Batch
from forge_kernel.errors import ConfigError
from forge_kernel.planning.pipeline_file import load_pipeline
from forge_kernel.runner import run
from forge_kernel.training.loaders.data_loaders import LoaderData
from forge_kernel.training.one_process import OneProcess
from forge_plugins.callbacks import real_time_validation
from forge_plugins.mathematics.optimizers.time_budget import affordable


class Clock:
    """A clock that goes on when it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def batch() -> Batch:
    return Batch(torch.randn(4, 4), torch.randint(3, (4,)))


def validated(
    monkeypatch: Any, settings: dict[str, Any], *, steps: int, cost: float, **options: Any
) -> tuple[list[int], list[str], Any]:
    """After which steps it was validated, a step taking a second and a validation `cost`."""
    clock = Clock()
    monkeypatch.setattr(real_time_validation, "monotonic", clock)
    found: list[int] = []
    told: list[str] = []

    def on_weights(self: Any, run: Any, step: Any) -> None:
        clock.now += 1.0

    class Slow:
        goals: ClassVar[dict[str, Any]] = {}

        def reset(self) -> None:
            clock.now += cost

        def update(self, *_: Any) -> None: ...

        def compute(self, add: Any) -> dict[str, float]:
            return {}

    watch = make_plugin(
        "watch", Kind.CALLBACKS, on_weights=on_weights,
        on_validation=lambda self, run, metrics: found.append(run.progress.step),
        on_event=lambda self, run, event: told.append(event.name),
        make_metrics=lambda self, run: [Slow()],
    )  # fmt: skip
    torch.manual_seed(0)
    data = LoaderData([batch() for _ in range(steps)], [batch()], DataSpec(classes=3))
    uses = {"callbacks": (UseCallback("real_time_validation", settings),)}
    session = make_session(
        nn.Linear(4, 3), data, plugins=[watch], uses=uses, max_steps=steps, **options
    )
    session.train()
    return found, told, session


def test_it_is_validated_each_so_many_steps(monkeypatch: Any) -> None:
    settings = {"every_steps": 3, "every_seconds": None, "time_fraction": 1.0}
    assert validated(monkeypatch, settings, steps=10, cost=9.0)[:2] == ([3, 6, 9], [])


def test_it_is_validated_each_so_many_seconds(monkeypatch: Any) -> None:
    settings = {"every_seconds": 4.0, "time_fraction": 1.0}
    assert validated(monkeypatch, settings, steps=10, cost=0.0)[0] == [4, 8]
    faster = {"every_seconds": 2.0, "time_fraction": 1.0}
    assert validated(monkeypatch, faster, steps=6, cost=0.0)[0] == [2, 4, 6]


def test_what_the_time_does_not_allow_waits_and_is_told_once(monkeypatch: Any) -> None:
    """A validation of 2 s at a quarter of the time: one each 8 s. Red when the budget is not kept."""
    settings = {"every_steps": 1, "every_seconds": None, "time_fraction": 0.25}
    found, told, session = validated(monkeypatch, settings, steps=30, cost=2.0)
    # the first is free; then it is affordable when 2 + 2 <= (elapsed + 2) / 4, ...
    assert found == [1, 12, 18, 24, 30]
    assert told == ["validation_waits"] * 4
    elapsed, spent = 30 + 2.0 * len(found), 2.0 * len(found)
    assert spent / elapsed <= 0.25
    share = session.bus.calls("log_metrics")[0](session.run, session.step_state)
    assert share == {"validation_time_share": pytest.approx(spent / elapsed)}
    larger = {**settings, "time_fraction": 0.5}
    assert len(validated(monkeypatch, larger, steps=30, cost=2.0)[0]) > len(found)


def test_validations_that_others_ask_for_are_in_the_time_too(monkeypatch: Any) -> None:
    settings = {"every_steps": 5, "every_seconds": None, "time_fraction": 0.25}
    found, told, _ = validated(monkeypatch, settings, steps=10, cost=3.0, validate_every=2)
    assert found == [2, 4, 6, 8, 10]
    assert told == ["validation_waits"]


def test_all_ranks_validate_when_one_must(monkeypatch: Any) -> None:
    """Red when a rank decides by its own clock."""
    monkeypatch.setattr(OneProcess, "decide", lambda self, code: 1)
    settings = {"every_seconds": 1e9}
    asked: list[Any] = []
    policy = real_time_validation.RealTimeValidation(
        real_time_validation.RealTimeValidationConfig(**settings)
    )
    request = {"request": lambda self, what: asked.append(what)}
    running: Any = type("R", (), {"strategy": OneProcess(), **request})()
    policy.on_run_start(running)
    policy.on_step_end(running, type("S", (), {"number": 1})())  # type: ignore[arg-type]
    assert asked == ["validate"]


@given(
    steps=st.lists(st.floats(0.01, 5.0), min_size=1, max_size=60), share=st.floats(0.05, 1.0),
    cost=st.floats(0.01, 5.0),
)  # fmt: skip
def test_after_the_first_the_share_is_never_exceeded(
    steps: list[float], share: float, cost: float
) -> None:
    elapsed = spent = known = 0.0
    count = 0
    for seconds in steps:
        elapsed += seconds
        if affordable(spent, known, elapsed, share):
            elapsed, spent, known, count = elapsed + cost, spent + cost, cost, count + 1
            assert count == 1 or spent <= share * elapsed * (1 + 1e-9)
    assert count >= 1


def test_nothing_that_is_ever_due_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing is ever due"):
        load_pipeline(
            "smoke", ["callbacks=[{use: real_time_validation, with: {every_seconds: null}}]"]
        )


@pytest.mark.spec("H10", "K13")
def test_interval_budget_and_patience_stand_together_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"extends: {Path.cwd()}/pipelines/smoke.yaml\n"
        "run: {max_steps: 500, validate_every: null}\n"
        "callbacks:\n"
        "  - {use: real_time_validation, with: {every_steps: 2, time_fraction: 1.0}}\n"
        "  - {use: early_stopping, with: {metric: loss, patience: 3, min_delta: 100.0,"
        " restore_best: true}}\n"
    )
    result = run(load_pipeline(file), output_dir=tmp_path / "run", quiet=True)
    assert (result.steps, result.stop_reason) == (8, "loss not better for 3 validations")
    lines = [json.loads(one) for one in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], line["loss"]) for line in lines if line["kind"] == "validation"]
    assert [step for step, _ in found] == [2, 4, 6, 8, 8]
    assert found[-1][1] == found[0][1]  # of the restored weights
