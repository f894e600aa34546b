"""Metrics of regression: exact wherever the batches are cut and whichever rank has them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import computed

from forge_kernel.contract.values import Batch
from forge_plugins.validators.regression import RegressionMetric


def fed(outputs: torch.Tensor, targets: torch.Tensor, cuts: list[int]) -> RegressionMetric:
    metric = RegressionMetric()
    metric.reset()
    for begin, end in pairwise(cuts):
        metric.update(Batch(None, targets[begin:end]), outputs[begin:end], torch.zeros(()), 1.0)
    return metric


@pytest.mark.spec("H7")
@given(
    samples=st.integers(2, 40), width=st.integers(1, 3), shift=st.sampled_from([0.0, 5.0, 1e7]),
    seed=st.integers(0, 10_000), share=st.floats(0, 1), data=st.data(),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_the_metrics_of_two_ranks_are_those_of_the_whole_set(
    samples: int, width: int, shift: float, seed: int, share: float, data: st.DataObject
) -> None:
    """Red with plain sums of squares: a shift of 1e7 takes the digits of `r2`."""
    draw = np.random.default_rng(seed)
    targets = draw.normal(size=(samples, width)) + shift
    outputs = targets + draw.normal(size=(samples, width))
    apart = outputs - targets
    whole = {
        "mse": float((apart**2).mean()),
        "mae": float(np.abs(apart).mean()),
        "r2": float(1 - (apart**2).sum() / ((targets - targets.mean()) ** 2).sum()),
    }
    cut = round(samples * share)
    first = sorted({0, cut, *data.draw(st.lists(st.integers(0, cut), max_size=3))})
    have, want = torch.from_numpy(outputs), torch.from_numpy(targets)
    metrics = [fed(have, want, first if cut else [])]
    metrics.append(fed(have, want, [cut, samples] if cut < samples else []))
    assert computed(metrics) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e9, -3e-20])
def test_equal_targets_have_no_r2(value: float) -> None:
    targets = torch.full((7,), value)
    found = computed([fed(targets + 1.0, targets, [0, 2, 7]), fed(targets, targets, [])])
    assert set(found) == {"mse", "mae"}


def test_small_targets_have_one() -> None:
    targets = torch.tensor([1e-20, 3e-20])
    assert computed([fed(targets, targets, [0, 2])])["r2"] == pytest.approx(1.0)


def test_without_a_number_there_is_no_metric() -> None:
    nothing = torch.zeros(0)
    assert computed([fed(nothing, nothing, []), fed(nothing, nothing, [0, 0])]) == {}
