"""A validation of the first batches only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_parts import make_session
from torch import nn

from forge_kernel.config.use import UseCallback
from forge_kernel.contract.data import DataSpec
from forge_kernel.contract.tensor_data import TensorData
from forge_kernel.contract.values import Batch
from forge_kernel.training.loaders.data_loaders import LoaderData


def batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [
        Batch(torch.randn(4, 4, generator=generator), torch.randint(3, (4,), generator=generator))
        for _ in range(count)
    ]


def session(data: Any, count: int) -> Any:
    uses = {"callbacks": (UseCallback("short_validation", {"batches": count}),)}
    torch.manual_seed(0)
    return make_session(nn.Linear(4, 3), data, uses=uses)


@pytest.mark.parametrize("count", [1, 3, 5, 99])
def test_the_metrics_are_of_the_first_batches_each_time(count: int) -> None:
    """Planted: one iterator for all validations, so that the second has none left."""
    validation = batches(5)
    spec = DataSpec(classes=3)
    running = session(LoaderData([], validation, spec=spec), count)
    torch.manual_seed(0)
    by_hand = make_session(nn.Linear(4, 3), LoaderData([], validation[:count], spec=spec))
    expected = by_hand.validate()
    assert running.validate() == expected
    assert running.validate() == expected


def test_the_data_stay_what_they_are_otherwise() -> None:
    inputs, targets = torch.randn(10, 4), torch.randint(3, (10,))
    data = TensorData(
        inputs, targets, batch_size=4, seed=1, spec=DataSpec(classes=3),
        validation=(inputs, targets),
    )  # fmt: skip
    running = session(data, 2)
    found = running.run.data
    assert isinstance(found, TensorData)
    assert (found.spec, found.batches_per_epoch) == (data.spec, data.batches_per_epoch)
    ours, theirs = (torch.cat([one.inputs for one in of.batches(3, 4)]) for of in (found, data))
    assert torch.equal(ours, theirs)
    assert len(list(found.validation())) == 2
    assert len(list(data.validation())) == 3  # the caller's own is left alone
