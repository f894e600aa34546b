"""Which targets count, whatever their number, type and place in memory."""

from __future__ import annotations

import pytest
import torch

from forge_kernel.contract.values import Batch

TYPES = (torch.int64, torch.int32, torch.int16, torch.uint8)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [1, 3, 64, 65, 500, 4096, 4097, 9000])
@pytest.mark.parametrize("step", [1, 2])
def test_the_ignored_target_is_found_at_any_size(size: int, step: int, dtype: torch.dtype) -> None:
    """Planted fault: more than 64 targets are never looked at."""
    targets = torch.randint(1, 9, (size * step,), dtype=dtype)[::step]
    inputs = torch.zeros(size, 2)
    assert Batch(inputs, targets, ignore_index=9).counted.total == size
    targets[size // 2] = 9
    batch = Batch(inputs, targets, ignore_index=9)
    assert batch.counted.total == size - 1
    assert batch.counted.weights is not None
    assert batch.counted.weights[size // 2] == 0


@pytest.mark.parametrize("size", [64, 65, 4000, 5000])
def test_what_lies_across_two_targets_is_not_the_ignored_one(size: int) -> None:
    """The bytes of 256 and 0, one after the other, hold those of 1. Planted: trusting them."""
    targets = torch.zeros(size, dtype=torch.int64)
    targets[::2] = 256
    assert Batch(torch.zeros(size, 2), targets, ignore_index=1).counted.total == size


def test_targets_that_are_written_to_are_counted_anew() -> None:
    targets = torch.zeros(5, dtype=torch.int64)
    batch = Batch(torch.zeros(5, 2), targets)
    assert batch.counted.total == 5
    targets[2] = -100
    assert batch.counted.total == 4
    batch.ignore_index = 0
    assert batch.counted.total == 1


@pytest.mark.parametrize("targets", [torch.full((6,), -100.0), torch.ones(6, dtype=torch.bool)])
def test_numbers_and_truth_values_always_count(targets: torch.Tensor) -> None:
    assert Batch(torch.zeros(6, 2), targets).counted.total == 6
    assert Batch(torch.zeros(6, 2), targets, ignore_index=1).counted.total == 6
