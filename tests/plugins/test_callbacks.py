"""Callbacks: stop at a metric, stop when nothing gets better, keep the best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_parts import make_plugin, make_session
from torch import nn

from forge_kernel.api import Kind
from forge_kernel.config.use import UseCallback
from forge_kernel.contract.values import Batch
from forge_kernel.errors import PlanError
from forge_kernel.planning.pipeline_file import load_pipeline
from forge_kernel.planning.plan import plan
from forge_kernel.training.loaders.data_loaders import LoaderData


def batch() -> Batch:
    return Batch(torch.randn(4, 4), torch.randint(3, (4,)))


class Script:
    """A validator whose metric follows a script."""

    def __init__(self, values: list[float]) -> None:
        self.values = list(values)
        self.goals = {"score": "max"}

    def reset(self) -> None:
        pass

    def update(self, *_: Any) -> None:
        pass

    def compute(self, add: Any) -> dict[str, float]:
        return {"score": self.values.pop(0)}


def session(values: list[float], policy: UseCallback[Any], folder: Path | None = None) -> Any:
    metric = Script(values)

    def make_metrics(self: Any, run: Any) -> Any:
        return [metric]

    validator = make_plugin("script", Kind.VALIDATORS, make_metrics=make_metrics)
    object.__setattr__(validator, "x", None)
    type(validator).info = _provides(type(validator).info)
    torch.manual_seed(0)
    return make_session(
        nn.Linear(4, 3), LoaderData([batch() for _ in range(50)], [batch()]), plugins=[validator],
        uses={"callbacks": (policy,)}, validate_every=1, max_steps=len(values), folder=folder,
    )  # fmt: skip


def _provides(info: Any) -> Any:
    from dataclasses import replace

    return replace(info, provides=("metric:score",))


@pytest.mark.parametrize(
    ("mode", "threshold", "values", "steps"),
    [
        ("max", 0.5, [0.1, 0.5, 0.9], 2),
        ("min", 0.2, [0.5, 0.3, 0.1], 3),
        ("max", 2.0, [0.1, 0.2], 2),
    ],
)
def test_a_run_stops_when_the_metric_is_there(
    mode: str, threshold: float, values: list[float], steps: int
) -> None:
    config = {"metric": "score", "threshold": threshold, "mode": mode}
    running = session(values, UseCallback("stop_at", config))
    running.train()
    assert running.run.progress.step == steps
    reached = any(v >= threshold if mode == "max" else v <= threshold for v in values)
    assert ("score" in running.stop_reason) == reached


@pytest.mark.parametrize(
    ("config", "values", "steps"),
    [
        ({"mode": "max", "patience": 2}, [0.1, 0.3, 0.2, 0.3, 0.9], 4),
        ({"mode": "min", "patience": 1}, [0.5, 0.4, 0.4, 0.1], 3),
        ({"mode": "max", "patience": 2, "min_delta": 0.1}, [0.1, 0.15, 0.19, 0.9], 3),
        ({"mode": "max", "patience": 2}, [0.1, float("nan"), 0.0, float("nan"), 0.1, 0.9], 5),
        ({"mode": "max", "patience": 3}, [0.1, 0.0, 0.2, 0.1], 4),
        ({"mode": "max", "patience": 1, "not_before": 3}, [0.9, 0.1, 0.2, 0.1, 0.9], 4),
    ],
)
def test_patience_counts_validations_without_a_better_metric(
    config: Any, values: list[float], steps: int
) -> None:
    running = session(values, UseCallback("early_stopping", {"metric": "score", **config}))
    running.train()
    assert running.run.progress.step == steps


@pytest.mark.spec("C15", "H10", "K13")
def test_early_stopping_ends_with_the_best_weights_when_asked(tmp_path: Path) -> None:
    seen: dict[int, torch.Tensor] = {}
    config = {"metric": "score", "mode": "max", "patience": 2, "restore_best": True}
    running = session([0.1, 0.8, 0.3, 0.2, 0.9], UseCallback("early_stopping", config), tmp_path)
    parameter = next(iter(running.run.parameters.values()))
    running.run.optimizer.register_step_post_hook(
        lambda *_: seen.update({running.run.progress.step + 1: parameter.detach().clone()})
    )
    running.train()
    assert running.run.progress.step == 4
    assert torch.equal(parameter, seen[2])
    assert not torch.equal(parameter, seen[4])


def test_the_best_checkpoint_is_pinned_and_survives_rotation(tmp_path: Path) -> None:
    config = {"metric": "score", "mode": "max"}
    values = [0.1, 0.9, 0.3, 0.2, 0.5, 0.4]
    running = session(values, UseCallback("best_checkpoint", config), tmp_path)
    running.train()
    running.finish()
    assert running.store.pinned("best").name == "step-2"
    assert running.store.load(running.store.pinned("best")).step == 2


@pytest.mark.parametrize("name", ["stop_at", "early_stopping", "best_checkpoint"])
def test_a_metric_that_nobody_measures_is_refused_at_plan_time(name: str) -> None:
    settings = [f"callbacks=[{{use: {name}, with: {{metric: acuracy}}}}]"]
    with pytest.raises(PlanError, match=r"metric 'acuracy'(.|\n)*did you mean 'accuracy'"):
        plan(load_pipeline("smoke", settings))
