"""Adam, AdamW and SGD are torch's, told what the settings say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from forge_plugins.optimizers.adam import Adam, AdamConfig
from forge_plugins.optimizers.adamw import AdamW, AdamWConfig
from forge_plugins.optimizers.sgd import Sgd, SgdConfig

ADAM: dict[str, Any] = {
    "lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.2, "amsgrad": True, "fused": False,
}  # fmt: skip
SGD: dict[str, Any] = {
    "lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.2, "fused": False,
}  # fmt: skip


def trained(optimizer_of: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = optimizer_of(model)
    inputs, targets = torch.randn(8, 4), torch.randint(3, (8,))
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(
    ("plugin", "config", "theirs", "settings"),
    [
        (Adam, AdamConfig, torch.optim.Adam, ADAM),
        (AdamW, AdamWConfig, torch.optim.AdamW, ADAM),
        (Sgd, SgdConfig, torch.optim.SGD, SGD),
        (Sgd, SgdConfig, torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "dampening": 0.3}),
    ],
)
@pytest.mark.parametrize("fused", [False, True])
def test_steps_are_torchs(
    plugin: Any, config: Any, theirs: Any, settings: dict[str, Any], fused: bool
) -> None:
    named = {**settings, "fused": fused}
    made: list[torch.optim.Optimizer] = []

    def ours_of(model: nn.Module) -> torch.optim.Optimizer:
        made.append(plugin(config(**named)).make_optimizer(None, list(model.named_parameters())))
        return made[-1]

    ours = trained(ours_of)
    other = trained(lambda model: theirs(model.parameters(), **named))
    for one, two in zip(ours.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    assert made[0].defaults["fused"] is fused
