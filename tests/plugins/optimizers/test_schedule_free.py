"""Schedule-free steps are the library's; validation and restores use its average."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch
from torch import nn

from forge_kernel import run
from forge_kernel.config.pipeline import PipelineConfig
from forge_kernel.config.use import UseCallback, UseLoss, UseOptimizer, UseValidator
from forge_kernel.contract.data import DataSpec
from forge_kernel.contract.run_config import RunConfig
from forge_kernel.contract.tensor_data import TensorData
from forge_kernel.errors import PlanError
from forge_kernel.planning.pipeline_file import load_pipeline
from forge_kernel.planning.plan import plan


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def data(validation: bool = True) -> TensorData:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(24, 4, generator=generator)
    targets = inputs[:, :3].argmax(1)
    return TensorData(
        inputs, targets, batch_size=8, seed=3, spec=DataSpec(features=4, classes=3),
        validation=(inputs, targets) if validation else None,
    )  # fmt: skip


def trained(steps: int = 7, folder: Path | None = None, callbacks: Any = (), **config: Any) -> Any:
    """A run and its network; the network holds the points y."""
    model = network()
    pipeline = PipelineConfig(
        run=RunConfig(max_steps=steps, device="cpu", validate_every=1, log_every=1),
        optimizer=UseOptimizer("schedule_free", {"lr": 0.1, **config}),
        loss=UseLoss("cross_entropy"),
        validators=(UseValidator("classification"),),
        callbacks=callbacks,
    )
    with tempfile.TemporaryDirectory() as elsewhere:
        place = folder or Path(elsewhere)
        found = run(pipeline, model=model, data=data(), quiet=True, output_dir=place)
    return found, model


def by_hand(steps: int, optimizer_of: Any) -> tuple[nn.Module, float]:
    """The library in a loop of its own: the points y, and the loss of the averaged weights."""
    model, source = network(), data()
    optimizer = optimizer_of(model.parameters())
    optimizer.train()
    done = 0
    for epoch in range(steps):
        for batch in source.batches(epoch, 0):
            if done == steps:
                break
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch.inputs), batch.targets).backward()
            optimizer.step()
            done += 1
    points = network()
    points.load_state_dict(model.state_dict())
    optimizer.eval()
    inputs, targets = (torch.cat([getattr(b, name) for b in source.validation()]) for name in
                       ("inputs", "targets"))  # fmt: skip
    return points, float(nn.functional.cross_entropy(model(inputs), targets).detach())


@pytest.mark.parametrize(
    ("config", "theirs"),
    [
        ({}, lambda p: schedulefree.AdamWScheduleFree(p, lr=0.1)),
        (
            {"momentum": 0.8, "beta2": 0.9, "eps": 1e-3, "weight_decay": 0.1, "warmup_steps": 3,
             "average_power": 1.0, "rate_power": 1.0},
            lambda p: schedulefree.AdamWScheduleFree(
                p, lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1, warmup_steps=3, r=1.0,
                weight_lr_power=1.0),
        ),
        (
            {"base": "sgd", "momentum": 0.7, "weight_decay": 0.1},
            lambda p: schedulefree.SGDScheduleFree(p, lr=0.1, momentum=0.7, weight_decay=0.1),
        ),
    ],
    ids=["default", "all", "sgd"],
)  # fmt: skip
def test_steps_are_the_librarys_and_the_average_is_validated(config: Any, theirs: Any) -> None:
    """Planted faults: the points validated; the average of one step before."""
    points, loss = by_hand(7, theirs)
    result, model = trained(7, **config)
    assert result.training_model is not None
    for one, two in zip(result.training_model.parameters(), points.parameters(), strict=True):
        assert torch.equal(one, two)
    assert result.model is model
    assert result.final["validation_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    "changed",
    [
        {"base": "sgd"}, {"momentum": 0.5}, {"beta2": 0.5}, {"eps": 1.0}, {"weight_decay": 0.5},
        {"warmup_steps": 5}, {"average_power": 2.0}, {"decay": "matrices", "weight_decay": 0.5},
        {"lr": 0.01}, {"rate_power": 0.0, "warmup_steps": 5},
    ],
    ids=str,
)  # fmt: skip
def test_every_setting_changes_what_is_validated(changed: dict[str, Any]) -> None:
    base: dict[str, Any] = {}
    if "decay" in changed:
        base = {"weight_decay": 0.5}
    if "rate_power" in changed:
        base = {"warmup_steps": 5}
    plain, other = trained(**base)[0], trained(**changed)[0]
    assert plain.final["validation_loss"] != other.final["validation_loss"]


def test_the_best_validation_comes_back_with_its_average(tmp_path: Path) -> None:
    """Planted fault: only the points are restored, so the average is one that never was."""
    policy = UseCallback("early_stopping", {"patience": 2, "restore_best": True, "metric": "loss"})
    result, _ = trained(60, tmp_path / "run", (policy,), lr=1.5)
    assert result.steps < 60, "the example must stop early"
    assert result.final["validation_loss"] == pytest.approx(result.best["loss"], rel=1e-6)


def test_beside_an_average_of_the_weights_it_is_refused() -> None:
    named = load_pipeline(
        "smoke", ["optimizer={use: schedule_free}", "callbacks=[{use: weight_average}]"]
    )
    with pytest.raises(PlanError, match="compute_evaluation_model"):
        plan(named)
