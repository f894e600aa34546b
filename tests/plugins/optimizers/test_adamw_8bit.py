"""AdamW with 8-bit averages: near AdamW, a quarter of its memory, exact after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_parts import StopAfter
from torch import nn

from forge_kernel import run
from forge_kernel.config.pipeline import PipelineConfig
from forge_kernel.config.use import UseLoss, UseOptimizer
from forge_kernel.contract.data import DataSpec
from forge_kernel.contract.run_config import RunConfig
from forge_kernel.contract.tensor_data import TensorData
from forge_kernel.errors import PluginError
from forge_kernel.runner import resume
from forge_kernel.storage.checkpoint_store import CheckpointStore
from forge_kernel.testing.compare import differences
from forge_plugins.optimizers import adamw_8bit
from forge_plugins.optimizers.adamw_8bit import AdamW8Bit, AdamW8BitConfig


class _Run:
    device = torch.device("cpu")


def optimizer_of(model: nn.Module, **config: Any) -> torch.optim.Optimizer:
    plugin = AdamW8Bit(AdamW8BitConfig(**config))
    return plugin.make_optimizer(_Run(), list(model.named_parameters()))  # type: ignore[arg-type]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))


def data() -> TensorData:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(40, 64, generator=generator)
    return TensorData(
        inputs, (inputs[:, 0] > 0).long(), batch_size=8, seed=3,
        spec=DataSpec(features=64, classes=3),
    )  # fmt: skip


def train(optimizer: torch.optim.Optimizer, model: nn.Module, steps: int = 20) -> None:
    batch = next(iter(data().batches(0, 0)))
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch.inputs), batch.targets).backward()
        optimizer.step()


def test_it_goes_where_adamw_goes_with_averages_of_a_byte() -> None:
    """Planted fault: the block size of a whole tensor."""
    ours, theirs = network(), network()
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.98), "weight_decay": 0.1}
    optimizer = optimizer_of(ours, **settings)
    before = network()[0].weight.detach()
    train(optimizer, ours)
    train(torch.optim.AdamW(theirs.parameters(), **settings), theirs)
    moved = (theirs[0].weight.detach() - before).norm()
    apart = (ours[0].weight.detach() - theirs[0].weight.detach()).norm()
    assert float(apart / moved) < 0.1
    state: Any = optimizer.state[ours[0].weight]
    assert state["exp_avg"].codes.dtype == torch.uint8
    assert state["exp_avg"].scale.numel() == 64 * 64 // 256


def pipeline(**settings: Any) -> PipelineConfig:
    return PipelineConfig(
        run=RunConfig(max_steps=8, device="cpu", **settings),
        optimizer=UseOptimizer("adamw_8bit", {"lr": 1e-2}),
        loss=UseLoss("cross_entropy"),
    )


def test_a_resumed_run_is_the_straight_one_bit_for_bit(tmp_path: Path) -> None:
    """Planted fault: scales are not taken up."""
    parts: dict[str, Any] = {"quiet": True}
    run(pipeline(), model=network(), data=data(), output_dir=tmp_path / "straight", **parts)
    stop = StopAfter(5)
    run(
        pipeline(), model=network(), data=data(), output_dir=tmp_path / "cut", plugins=[stop],
        cancel=stop, **parts,
    )  # fmt: skip
    resume(tmp_path / "cut", model=network(), data=data(), plugins=[StopAfter(99)], **parts)
    left, right = (
        CheckpointStore(tmp_path / name / "checkpoints").path(8) for name in ("straight", "cut")
    )
    assert differences(left, right) == []
    assert CheckpointStore(tmp_path / "cut" / "checkpoints").load(right).trees["optimizer"]


@pytest.mark.parametrize(
    "changed",
    [
        {"lr": 0.1}, {"betas": (0.5, 0.999)}, {"eps": 1.0}, {"weight_decay": 0.9},
        {"decay": "matrices", "weight_decay": 0.9}, {"block_size": 4096},
    ],
    ids=lambda changed: next(iter(changed)),
)  # fmt: skip
def test_every_setting_changes_the_weights(changed: dict[str, Any]) -> None:
    plain, other = network(), network()
    base = {"weight_decay": 0.9} if "decay" in changed else {}
    train(optimizer_of(plain, **base), plain, 4)
    train(optimizer_of(other, **changed), other, 4)
    pairs = zip(plain.parameters(), other.parameters(), strict=True)
    assert any(not torch.equal(one, two) for one, two in pairs)


def test_without_a_compiler_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw_8bit.torch_compile, "compiler_fault", lambda _: "no compiler here")
    with pytest.raises(PluginError, match="no compiler here"):
        optimizer_of(network())
