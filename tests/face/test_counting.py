"""The caller's losses count with the targets that count, in every class of the face."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import agent_forge.phases.phase5_training as phase5
from agent_forge.phases.phase5_training.pipeline.loss_functions import GenerationLoss

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(12, 4, generator=GENERATOR)
Y = torch.randint(5, (12,), generator=GENERATOR)
PADDED = Y.clone()
PADDED[:5] = -100
CPU = torch.device("cpu")


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(4, 5)


def weights(model: Any) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def loop(model: nn.Module, folder: Path, accumulate: int = 1) -> Any:
    config = phase5.TrainingConfig(
        epochs=1, learning_rate=0.1, use_amp=False, gradient_accumulation_steps=accumulate
    )
    trainer = phase5.TrainingLoop(model, config, CPU, str(folder))
    trainer.setup_optimizer()
    return trainer


def trained(folder: Path, batches: list[Any], loss_fn: Any, accumulate: int = 1) -> Tensor:
    model = network()
    loop(model, folder, accumulate).train(batches, loss_fn)
    return weights(model)


def closure(loss_fn: Any) -> Any:
    """A loss that runs the model itself."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return loss_fn(model(batch[0]), batch[1])  # type: ignore[no-any-return]

    return loss


LOSSES = {
    "torch": lambda: nn.CrossEntropyLoss(),
    "torch, another index": lambda: nn.CrossEntropyLoss(ignore_index=0),
    "torch, nll": lambda: (
        lambda outputs, targets: functional.nll_loss(outputs.log_softmax(-1), targets)
    ),
    "a function": lambda: lambda outputs, targets: functional.cross_entropy(outputs, targets),
    "classification": lambda: phase5.ClassificationLoss(),
    "a closure": lambda: closure(nn.CrossEntropyLoss()),
}


@pytest.mark.parametrize("sizes", [(6, 6), (3, 9), (1, 4, 7)], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_with_padding_are_the_whole_batchs_step(
    tmp_path: Path, name: str, sizes: tuple[int, ...]
) -> None:
    targets = Y if name == "torch, another index" else PADDED
    begins = [sum(sizes[:place]) for place in range(len(sizes))]
    parts = [
        (X[begin : begin + size], targets[begin : begin + size])
        for begin, size in zip(begins, sizes, strict=True)
    ]
    whole = trained(tmp_path / "whole", [(X, targets)], LOSSES[name]())
    split = trained(tmp_path / "split", parts, LOSSES[name](), len(sizes))
    torch.testing.assert_close(split, whole, atol=1e-6, rtol=0)


def test_a_generation_loss_is_validated_with_its_padding(tmp_path: Path) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.table = nn.Embedding(7, 7)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.table(tokens)

    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(7, (6, 5), generator=generator)
    follows = torch.randint(7, (6, 5), generator=generator)
    follows[:, 3:] = -100
    model, loss = Tokens(), GenerationLoss()
    trainer = loop(model, tmp_path)
    found = trainer.validate([(tokens, follows)], loss)
    kept = follows != -100
    logits = model(tokens)
    expected = functional.cross_entropy(logits[kept], follows[kept])
    assert found["loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
    hits = (logits.argmax(-1) == follows)[kept].float().mean()
    assert found["accuracy"] == pytest.approx(float(hits), rel=1e-6)
    assert found["f1_score"] is not None
    validator = phase5.RealTimeValidator(model, phase5.ValidationConfig(), CPU)
    again = validator.run_validation([(tokens, follows)], loss)
    assert again["accuracy"] == pytest.approx(float(hits), rel=1e-6)


@pytest.mark.parametrize("index", [-100, 0])
def test_metrics_of_the_face_leave_out_what_the_loss_passes_over(
    tmp_path: Path, index: int
) -> None:
    targets = Y if index == 0 else PADDED
    kept = targets != index
    model = network()
    found = loop(model, tmp_path).validate(
        [(X[:7], targets[:7]), (X[7:], targets[7:])], nn.CrossEntropyLoss(ignore_index=index)
    )
    hits = (model(X).argmax(-1) == targets)[kept].float().mean()
    assert found["accuracy"] == pytest.approx(float(hits), rel=1e-6)
    expected = functional.cross_entropy(model(X)[kept], targets[kept])
    assert found["loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
