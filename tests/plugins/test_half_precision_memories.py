"""Memories of slow averages in a half-precision model follow those of fp32 arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_parts import StopAfter
from safetensors.torch import load_file
from torch import Tensor, nn

from agent_forge.phases.phase5_training.pipeline.grokfast_trainer import GrokfastOptimizer
from forge_kernel import run
from forge_kernel.config.pipeline import PipelineConfig
from forge_kernel.config.use import UseCallback, UseExporter, UseGradients, UseLoss, UseOptimizer
from forge_kernel.contract.run_config import RunConfig
from forge_kernel.runner import resume
from forge_kernel.storage.checkpoint_store import CheckpointStore
from forge_kernel.testing.compare import differences
from forge_plugins.mathematics.grokfast.filters import SlowGradient, Window, filter_ema, filter_ma
from forge_plugins.mathematics.losses.loss_weights import RateOfFall
from forge_plugins.mathematics.optimizers.averaged_model import ShadowModel

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
SLOW = {"decay": 0.999, "warm": False}


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3).to(dtype)


def data(dtype: torch.dtype) -> Any:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(40, 4, generator=generator).to(dtype)
    targets = torch.randint(3, (40,), generator=generator)
    batches = [(inputs[i : i + 10], targets[i : i + 10]) for i in range(0, 40, 10)]
    return batches, [(inputs, targets)]


def pipeline(steps: int, **parts: Any) -> PipelineConfig:
    parts.setdefault("optimizer", UseOptimizer("sgd", {"lr": 0.5}))
    return PipelineConfig(
        run=RunConfig(max_steps=steps, device="cpu", seed=0), loss=UseLoss("cross_entropy"), **parts
    )


def exported_move(dtype: torch.dtype, folder: Path, steps: int, **parts: Any) -> float:
    before = network(dtype).weight.detach().float()
    _ = run(
        pipeline(steps, exporters=(UseExporter("state_dict", {}),), **parts),
        model=network(dtype), data=data(dtype), output_dir=folder, quiet=True,
    )  # fmt: skip
    (file,) = (folder / "exports" / "state_dict").glob("*.safetensors")
    weight = load_file(file)["weight"]
    assert weight.dtype is dtype
    return float((weight.float() - before).abs().mean())


@HALVES
@pytest.mark.parametrize(
    "parts",
    [
        {"callbacks": (UseCallback("weight_average", SLOW),)},
        {"optimizer": UseOptimizer("schedule_free", {"lr": 2e-3})},
        {"optimizer": UseOptimizer("schedule_free", {"base": "sgd", "lr": 0.05})},
    ],
    ids=["weight_average", "schedule_free", "schedule_free sgd"],
)
def test_an_average_of_the_weights_moves_as_far_as_in_fp32(
    parts: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    """Planted faults: averages in the model's dtype; the points y rounded after each step."""
    whole = exported_move(torch.float32, tmp_path / "whole", 400, **parts)
    half = exported_move(dtype, tmp_path / "half", 400, **parts)
    assert half == pytest.approx(whole, rel=0.05)


@HALVES
@pytest.mark.parametrize(
    "parts",
    [
        {"callbacks": (UseCallback("weight_average", SLOW),)},
        {"optimizer": UseOptimizer("schedule_free", {"lr": 2e-3})},
        {"gradients": (UseGradients("grokfast", {}),)},
        {"gradients": (UseGradients("grokfast", {"filter": "ma", "window": 3}),)},
        {"gradients": (UseGradients("adaptive_scale", {}),)},
    ],
    ids=["weight_average", "schedule_free", "ema", "ma", "adaptive_scale"],
)
def test_a_resumed_half_precision_run_is_the_straight_one_bit_for_bit(
    parts: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    """Planted fault: memories rounded to the model's dtype when they are taken up."""
    live: dict[str, Any] = {"data": data(dtype), "quiet": True}
    run(pipeline(12, **parts), model=network(dtype), output_dir=tmp_path / "straight", **live)
    stop = StopAfter(7)
    run(
        pipeline(12, **parts), model=network(dtype), output_dir=tmp_path / "cut", plugins=[stop],
        cancel=stop, **live,
    )  # fmt: skip
    resume(tmp_path / "cut", model=network(dtype), plugins=[StopAfter(99)], **live)
    left, right = (
        CheckpointStore(tmp_path / name / "checkpoints").path(12) for name in ("straight", "cut")
    )
    assert differences(left, right) == []


def gradients(step: int, dtype: torch.dtype) -> Tensor:
    """A large one, then small ones that an average of half precision would not notice."""
    generator = torch.Generator().manual_seed(step)
    size = 1.0 if step == 0 else 1e-3
    return (size * (1.0 + 0.1 * torch.rand(64, generator=generator))).to(dtype)


@HALVES
@pytest.mark.parametrize("beginning", ["first", "zero", "debiased"])
@pytest.mark.parametrize("alpha", [0.98, 0.999])
def test_the_slow_gradient_is_that_of_fp32(
    beginning: Any, alpha: float, dtype: torch.dtype
) -> None:
    memories = {}
    for kind in (torch.float32, dtype):
        memory = SlowGradient.like(gradients(0, kind))
        for step in range(200):
            gradient = gradients(step, dtype).to(kind)
            filter_ema([gradient], [memory], alpha=alpha, lambda_reg=2.0, beginning=beginning)
            assert gradient.dtype is kind
        memories[kind] = memory.mean
    torch.testing.assert_close(memories[dtype], memories[torch.float32])


@HALVES
def test_a_window_of_half_precision_gradients_has_a_sum_of_fp32(dtype: torch.dtype) -> None:
    window, kept = Window(gradients(0, dtype), 8), []
    for step in range(100):
        kept.append(gradients(step, dtype).float())
        filter_ma([gradients(step, dtype)], [window], lambda_reg=1.0)
    torch.testing.assert_close(window.sum, torch.stack(kept[-8:]).sum(0))


def test_a_large_gradient_that_lies_otherwise_is_filtered() -> None:
    """Planted fault: the average cut into pieces and the gradient not."""
    plain = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    strided = plain.T.contiguous().T
    expected, memory, other = plain.clone(), SlowGradient.like(plain), SlowGradient.like(plain)
    for _ in range(2):
        filter_ema([expected], [memory], alpha=0.9, lambda_reg=2.0)
        filter_ema([strided], [other], alpha=0.9, lambda_reg=2.0)
    assert torch.equal(strided, expected)
    assert torch.equal(memory.mean, other.mean)


@HALVES
def test_the_faces_slow_gradient_comes_back_in_fp32(dtype: torch.dtype) -> None:
    model = network(dtype)
    optimizer = GrokfastOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(5):
        for parameter in model.parameters():
            parameter.grad = gradients(step, dtype)[: parameter.numel()].view_as(parameter)
        optimizer.step()
    state = optimizer.state_dict()
    again = GrokfastOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    again.load_state_dict(state)
    assert differences_of(again.state_dict(), state) == []
    assert state["slow"][0]["mean"].dtype is torch.float32


def differences_of(left: Any, right: Any) -> list[str]:
    if isinstance(left, Tensor):
        same = left.dtype is right.dtype and torch.equal(left, right)
        return [] if same else [f"{left.dtype} {right.dtype}"]
    if isinstance(left, dict):
        return [fault for key in left for fault in differences_of(left[key], right[key])]
    return []


def test_an_older_average_of_bf16_is_taken_up_in_fp32() -> None:
    shadow = ShadowModel(network(torch.bfloat16))
    shadow.put({name: value.bfloat16() for name, value in shadow.named_weights().items()})
    assert {value.dtype for value in shadow.named_weights().values()} == {torch.float32}
    assert {value.dtype for value in shadow.model.parameters()} == {torch.bfloat16}


def test_averages_of_losses_stay_fp32_when_their_module_does_not() -> None:
    weights, whole = RateOfFall(2, 0.9).bfloat16(), RateOfFall(2, 0.9)
    for step in range(300):
        losses = torch.tensor([1.0 / (step + 1), 1.0])
        weights.take(losses)
        whole.take(losses)
    torch.testing.assert_close(weights.averages, whole.averages)
