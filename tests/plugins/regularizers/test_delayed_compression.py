"""Compression begins when its metric is reached, and then presses on the weights named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_parts import make_session
from torch import nn

from forge_kernel.config.use import UseRegularizer
from forge_kernel.contract.values import Batch
from forge_kernel.errors import PluginError

BATCH = Batch(
    torch.randn(5, 4, generator=torch.Generator().manual_seed(3)), torch.tensor([0, 1, 2, 0, 1])
)


def session(folder: Path | None = None, **config: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    uses = {"regularizers": (UseRegularizer("delayed_compression", config),)} if config else {}
    return model, make_session(model, [BATCH], uses=uses, lr=0.1, log_every=2, folder=folder)


def steps(running: Any, count: int) -> None:
    for _ in range(count):
        running.step(BATCH)
        running.run_due_actions()


def test_the_gradient_is_that_of_the_squared_weights_from_the_log_line_on() -> None:
    """Planted faults: compression from the start; half the factor."""
    plain, without = session()
    pressed, running = session(strength=0.03, threshold=100.0)
    steps(without, 2)
    steps(running, 2)  # the log line of step 2 says that it is time
    assert torch.equal(plain[0].weight, pressed[0].weight)
    before = pressed[0].weight.detach().clone()
    steps(without, 1)
    steps(running, 1)
    expected = plain[0].weight.detach() - 0.1 * 0.03 * 2 * before
    torch.testing.assert_close(pressed[0].weight.detach(), expected)
    torch.testing.assert_close(pressed[0].bias, plain[0].bias)


@pytest.mark.parametrize(
    ("config", "begins"),
    [
        ({"threshold": 1e-9}, False),
        ({"threshold": 1e-9, "mode": "max"}, True),
        ({"threshold": 100.0, "mode": "max"}, False),
        ({"threshold": 0.05, "metric": "learning_rate", "mode": "max"}, True),
    ],
)
def test_the_metric_and_the_side_of_its_threshold_count(
    config: dict[str, Any], begins: bool
) -> None:
    plain, without = session()
    pressed, running = session(**config)
    steps(without, 3)
    steps(running, 3)
    assert torch.equal(plain[0].weight, pressed[0].weight) is not begins


def test_only_the_weights_named_are_pressed() -> None:
    plain, without = session()
    pressed, running = session(threshold=100.0, names=["2.*"])
    steps(without, 3)
    steps(running, 3)
    assert torch.equal(plain[0].weight, pressed[0].weight)
    assert not torch.equal(plain[2].bias, pressed[2].bias)


def test_a_metric_that_nobody_logs_and_names_of_nothing_are_refused() -> None:
    _, running = session(metric="happiness")
    with pytest.raises(PluginError, match="no metric 'happiness'; it has .*loss"):
        steps(running, 2)
    with pytest.raises(PluginError, match="no trainable parameter"):
        session(names=["nothing*"])


def test_what_has_begun_goes_on_after_a_resume(tmp_path: Path) -> None:
    _, running = session(threshold=100.0)
    steps(running, 2)
    plugin = running.bus.instances[("regularizers", 0)]
    assert plugin.state_dict() == {"active": True}
    _, other = session(threshold=1e-9)
    other.bus.instances[("regularizers", 0)].load_state_dict(plugin.state_dict())
    weights = other.run.model[0].weight.detach().clone()
    norms = [float(weights.norm())]
    for _ in range(3):
        steps(other, 1)
        norms.append(float(other.run.model[0].weight.detach().norm()))
    plain, without = session()
    steps(without, 3)
    assert norms[-1] < float(plain[0].weight.detach().norm())
