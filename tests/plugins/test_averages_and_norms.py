"""Lion, row norms, averaged weights: against loops written out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_parts import make_session
from torch import nn

from forge_kernel import run
from forge_kernel.config.pipeline import PipelineConfig
from forge_kernel.config.use import UseCallback, UseLoss, UseOptimizer, UseQuantizer, UseValidator
from forge_kernel.contract.data import DataSpec
from forge_kernel.contract.run_config import RunConfig
from forge_kernel.contract.tensor_data import TensorData
from forge_kernel.contract.values import Batch
from forge_kernel.errors import PluginError
from forge_plugins.mathematics.optimizers.lion import Lion


def batches(count: int = 6) -> list[Batch]:
    generator = torch.Generator().manual_seed(4)
    return [
        Batch(torch.randn(5, 4, generator=generator), torch.randint(3, (5,), generator=generator))
        for _ in range(count)
    ]


def test_lion_is_the_papers_algorithm() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    optimizer = Lion(layer.parameters(), lr=0.01, betas=(0.9, 0.97), weight_decay=0.1)
    momenta = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for batch in batches():
        optimizer.zero_grad()
        nn.functional.cross_entropy(layer(batch.inputs), batch.targets).backward()
        for index, (value, parameter) in enumerate(
            zip((weight, bias), layer.parameters(), strict=True)
        ):
            gradient = parameter.grad.double()
            blend = 0.9 * momenta[index] + 0.1 * gradient
            value.sub_(0.01 * (blend.sign() + 0.1 * value))
            momenta[index] = 0.97 * momenta[index] + 0.03 * gradient
        optimizer.step()
        torch.testing.assert_close(layer.weight.detach().double(), weight, atol=1e-6, rtol=0)
        torch.testing.assert_close(layer.bias.detach().double(), bias, atol=1e-6, rtol=0)


def test_lion_leaves_what_has_no_gradient_alone() -> None:
    still = nn.Parameter(torch.ones(2))
    moving = nn.Parameter(torch.ones(2))
    optimizer = Lion([still, moving], lr=0.5, weight_decay=0.1)
    moving.grad = torch.tensor([1.0, -2.0])
    optimizer.step()
    assert still.tolist() == [1.0, 1.0]
    torch.testing.assert_close(moving.detach(), torch.tensor([0.45, 1.45]))


def callback_session(model: nn.Module, name: str, folder: Path | None = None, **config: Any) -> Any:
    return make_session(
        model, batches(), uses={"callbacks": (UseCallback(name, config),)}, folder=folder, lr=2.0
    )


def test_no_row_grows_beyond_the_norm_and_short_rows_are_left_alone() -> None:
    torch.manual_seed(0)
    free, held = nn.Linear(4, 3), nn.Linear(4, 3)
    held.load_state_dict(free.state_dict())
    session = callback_session(held, "row_norm", max_norm=0.6)
    free_session = make_session(free, batches(), lr=2.0)
    first = batches()[0]
    session.step(first)
    free_session.step(first)
    norms = torch.linalg.vector_norm(free.weight.detach(), dim=1)
    assert bool((norms > 0.6).any())
    assert bool((norms < 0.6).any()), "the example must have both"
    for row, (mine, theirs) in enumerate(
        zip(held.weight.detach(), free.weight.detach(), strict=True)
    ):
        wanted = theirs if norms[row] <= 0.6 else theirs * (0.6 / norms[row])
        torch.testing.assert_close(mine, wanted)
    torch.testing.assert_close(held.bias, free.bias)


def test_rows_may_be_brought_to_the_norm_at_first_and_names_choose_matrices() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    before = model[0].weight.detach().clone()
    session = make_session(
        model, batches(), lr=0.0,
        uses={"callbacks": (UseCallback("row_norm", {"names": ["1.*"], "max_norm": 3.0, "scale_first": True}),)},
    )  # fmt: skip
    session.step(batches()[0])
    torch.testing.assert_close(
        torch.linalg.vector_norm(model[1].weight.detach(), dim=1), torch.full((3,), 3.0)
    )
    assert torch.equal(model[0].weight.detach(), before)
    with pytest.raises(PluginError, match="no matrix"):
        callback_session(nn.Linear(4, 3), "row_norm", names=["head.*"])


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("start", [0, 2])
def test_the_average_is_that_of_a_loop_and_validation_uses_it(warm: bool, start: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    expected = model.weight.detach().double().clone()
    session = callback_session(model, "weight_average", decay=0.8, warm=warm, start_step=start)
    count = 0
    for number, batch in enumerate(batches(), 1):
        session.step(batch)
        weight = model.weight.detach().double()
        if number <= start:
            expected = weight.clone()
            continue
        decay = min(0.8, (1 + count) / (10 + count)) if warm else 0.8
        count += 1
        expected = decay * expected + (1 - decay) * weight
    used = session.bus.call("compute_evaluation_model")(session.run)
    assert used is not model
    torch.testing.assert_close(used.weight.detach().double(), expected, atol=1e-6, rtol=1e-6)
    assert not any(parameter.requires_grad for parameter in used.parameters())


def test_the_average_has_the_buffers_of_the_model_in_training() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    session = callback_session(model, "weight_average", decay=0.5)
    for batch in batches():
        session.step(batch)
    used = session.bus.call("compute_evaluation_model")(session.run)
    assert torch.equal(used[1].running_mean, model[1].running_mean)
    assert int(used[1].num_batches_tracked) == 6


def test_the_averaged_copy_follows_the_quantizers_warmup() -> None:
    torch.manual_seed(0)
    session = make_session(
        nn.Linear(4, 3), batches(), lr=0.1, max_steps=6,
        uses={
            "quantizer": UseQuantizer("bitnet", {"warmup_steps": 2}),
            "callbacks": (UseCallback("weight_average", {"decay": 0.5}),),
        },
    )  # fmt: skip
    for batch in batches():
        session.step(batch)
    used = session.bus.call("compute_evaluation_model")(session.run).eval()
    assert len(used.applied_weight().unique()) <= 3
    assert used.weight is not session.run.model.weight


def test_a_restore_of_the_best_brings_the_average_back_too(tmp_path: Path) -> None:
    """Planted fault: only the weights in training are restored, and the average stays."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(24, 4, generator=generator)
    targets = inputs[:, :3].argmax(1)
    data = TensorData(
        inputs, targets, batch_size=8, seed=3, spec=DataSpec(features=4, classes=3),
        validation=(inputs, targets),
    )  # fmt: skip
    best = {"metric": "loss", "patience": 2, "restore_best": True}
    pipeline = PipelineConfig(
        run=RunConfig(max_steps=80, device="cpu", validate_every=1),
        optimizer=UseOptimizer("sgd", {"lr": 9.0}),
        loss=UseLoss("cross_entropy"),
        validators=(UseValidator("classification"),),
        callbacks=(
            UseCallback("weight_average", {"decay": 0.5}),
            UseCallback("early_stopping", best),
        ),
    )
    result = run(pipeline, model=nn.Linear(4, 3), data=data, output_dir=tmp_path / "r", quiet=True)
    assert result.steps < 80, "the example must stop early"
    assert result.final["validation_loss"] == pytest.approx(result.best["loss"], rel=1e-6)
