"""Frozen is frozen: whatever writes weights leaves those alone that are not trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_parts import make_plugin
from torch import Tensor, nn

from agent_forge.phases.phase5_training.pipeline.grokfast_trainer import (
    GrokfastConfig,
    KnowledgeConsolidation,
)
from forge_kernel import run
from forge_kernel.config.pipeline import PipelineConfig
from forge_kernel.config.use import (
    UseCallback,
    UseGradients,
    UseLoss,
    UseOptimizer,
    UseQuantizer,
    UseRegularizer,
)
from forge_kernel.contract.plugin import Kind
from forge_kernel.contract.run_config import RunConfig
from forge_kernel.planning.catalog import Catalog

OPTIMIZERS = sorted(
    offer.name for offer in Catalog.installed().offers() if offer.kind is Kind.OPTIMIZER
)
DECAY: dict[str, dict[str, Any]] = {
    "muon": {"weight_decay": 0.5, "adamw_weight_decay": 0.5}, "schedule_free": {"lr": 0.05},
}  # fmt: skip


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def data() -> Any:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(40, 4, generator=generator)
    targets = torch.randint(3, (40,), generator=generator)
    batches = [(inputs[i : i + 10], targets[i : i + 10]) for i in range(0, 40, 10)]
    return batches, [(inputs, targets)]


def frozen_network() -> nn.Sequential:
    model = network()
    model[0].requires_grad_(False)
    return model


def layer_of(model: nn.Sequential) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model[0].parameters()]


def train(model: nn.Module, folder: Path, *, plugins: Any = (), **parts: Any) -> None:
    settings = PipelineConfig(
        run=RunConfig(max_steps=12, device="cpu", seed=0, validate_every=1),
        **{
            "loss": UseLoss("cross_entropy"),
            "optimizer": UseOptimizer("sgd", {"lr": 0.1}),
            **parts,
        },
    )
    run(settings, model=model, data=data(), plugins=plugins, output_dir=folder, quiet=True)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_moves_or_decays_them(name: str, tmp_path: Path) -> None:
    model = frozen_network()
    before = layer_of(model)
    with_decay = DECAY.get(name, {"weight_decay": 0.5})
    train(model, tmp_path / "run", optimizer=UseOptimizer(name, with_decay))
    assert all(torch.equal(one, two) for one, two in zip(before, layer_of(model), strict=True))


@pytest.mark.parametrize(
    "parts",
    [
        {"callbacks": (UseCallback("row_norm", {"max_norm": 0.1, "scale_first": True}),)},
        {"callbacks": (UseCallback("consolidation", {"every": 2, "phase": None}),)},
        {"callbacks": (UseCallback("weight_average", {"decay": 0.9}),)},
        {"regularizers": (UseRegularizer("weight_size", {"strength": 1.0}),)},
        {"gradients": (UseGradients("grokfast", {}), UseGradients("clip_norm", {"max_norm": 1.0}))},
        {"quantizer": UseQuantizer("bitnet", {"target_sparsity": 0.8, "skip": []})},
    ],
    ids=["row_norm", "consolidation", "weight_average", "weight_size", "gradients", "bitnet"],
)
def test_no_other_part_moves_them(parts: dict[str, Any], tmp_path: Path) -> None:
    model = frozen_network()
    before = layer_of(model)
    train(model, tmp_path / "run", **parts)
    assert all(torch.equal(one, two) for one, two in zip(before, layer_of(model), strict=True))


@pytest.mark.parametrize("name", ["sgd", "adamw", "lion"])
def test_a_gradient_that_someone_left_there_moves_nothing(name: str, tmp_path: Path) -> None:
    """Neither frozen weights nor trained ones. Planted fault: the first step takes it."""
    model, clean = frozen_network(), frozen_network()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    train(model, tmp_path / "left", optimizer=UseOptimizer(name, {"lr": 0.01}))
    train(clean, tmp_path / "clean", optimizer=UseOptimizer(name, {"lr": 0.01}))
    pairs = zip(model.parameters(), clean.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)


@pytest.mark.parametrize(
    "policy",
    [
        UseCallback("row_norm", {"max_norm": 0.05}),
        UseCallback("consolidation", {"every": 2, "phase": None, "fraction": 0.9}),
    ],
    ids=["row_norm", "consolidation"],
)
def test_weights_that_are_frozen_during_the_run_stay_from_then_on(
    policy: UseCallback, tmp_path: Path
) -> None:
    """Planted fault: what is trained is looked up once, at the start."""
    model = network()
    kept: list[list[Tensor]] = []

    def on_step_end(self: Any, run: Any, step: Any) -> None:
        if step.number == 4:
            model[0].requires_grad_(False)
            with torch.no_grad():
                model[0].weight.mul_(3.0)
        if step.number >= 4:
            kept.append(layer_of(model))

    freezer = make_plugin("freezer", Kind.OBSERVERS, on_step_end=on_step_end)
    train(model, tmp_path / "run", plugins=[freezer], callbacks=(policy,))
    first, *later = kept
    for layer in later:
        assert all(torch.equal(one, two) for one, two in zip(first, layer, strict=True))


def test_the_faces_consolidation_leaves_them_alone() -> None:
    model = network()
    consolidation = KnowledgeConsolidation(GrokfastConfig(knowledge_retention_weight=0.5))
    consolidation.capture_knowledge_state(model)
    model[0].requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    before, trained = layer_of(model), model[2].weight.detach().clone()
    assert consolidation.consolidate_knowledge(model, lambda _: 1.0)
    assert all(torch.equal(one, two) for one, two in zip(before, layer_of(model), strict=True))
    assert not torch.equal(trained, model[2].weight)
