"""Schedules against their closed forms, and torch's own where torch has them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_parts import make_session
from torch import nn

from forge_kernel.config.use import UseSchedule
from forge_kernel.errors import PluginError
from forge_kernel.state import Batch
from forge_plugins.mathematics.rates import linear_warmup, warmup_cosine


def trace(use: UseSchedule[Any], steps: int, **options: Any) -> list[float]:
    """The learning rate that each step is taken with."""
    batch = Batch(torch.randn(4, 4), torch.randint(3, (4,)))
    session = make_session(
        nn.Linear(4, 3), [batch], uses={"schedule": use}, lr=0.5, **{"max_steps": steps, **options}
    )
    rates = []
    for _ in range(steps):
        session.step(batch)
        rates.append(session.run.optimizer.param_groups[0]["lr"])
    return rates


def test_the_constant_schedule_is_a_factor() -> None:
    assert trace(UseSchedule("constant", {"factor": 0.5}), 3) == [0.25] * 3
    assert trace(UseSchedule("constant"), 2) == [0.5] * 2


def test_linear_warmup_has_its_closed_form_at_ten_points() -> None:
    rates = trace(UseSchedule("linear_warmup", {"warmup_steps": 8}), 10)
    assert rates == pytest.approx([0.5 * min(step / 8, 1) for step in range(1, 11)])
    assert trace(UseSchedule("linear_warmup", {"warmup_steps": 0}), 2) == [0.5, 0.5]


def test_warmup_cosine_has_its_closed_form_and_stays_at_the_floor() -> None:
    config = {"warmup_steps": 3, "total_steps": 9, "floor": 0.1}
    rates = trace(UseSchedule("warmup_cosine", config), 14)
    expected = []
    for step in range(1, 15):
        if step < 3:
            factor = step / 3
        else:
            done = min(1.0, (step - 3) / 6)
            factor = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))
        expected.append(0.5 * factor)
    assert rates == pytest.approx(expected)
    assert rates[9:] == pytest.approx([0.05] * 5)
    assert max(rates) == pytest.approx(0.5)


def test_without_warmup_it_is_torchs_cosine() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=0.2)
    for step in range(1, 21):
        optimizer.step()
        theirs.step()
        assert warmup_cosine(step, 0, 20, 0.2) == pytest.approx(theirs.get_last_lr()[0])


def test_its_length_is_the_runs_when_not_given() -> None:
    assert trace(UseSchedule("warmup_cosine", {"warmup_steps": 2}), 12)[-1] == pytest.approx(0.0)


def test_a_run_of_unknown_length_is_refused() -> None:
    with pytest.raises(PluginError, match="total_steps"):
        trace(UseSchedule("warmup_cosine"), 3, max_steps=None, max_seconds=100)


@given(
    warmup=st.integers(0, 50),
    extra=st.integers(1, 200),
    floor=st.floats(0, 1),
    step=st.integers(1, 400),
)
@settings(max_examples=100, deadline=None)
def test_factors_stay_between_floor_and_one_after_the_warmup(
    warmup: int, extra: int, floor: float, step: int
) -> None:
    factor = warmup_cosine(step, warmup, warmup + extra, floor)
    assert factor <= 1.0 + 1e-12
    if step >= warmup:
        assert factor >= floor - 1e-12
        assert factor >= warmup_cosine(step + 1, warmup, warmup + extra, floor) - 1e-12
    assert 0 < linear_warmup(step, warmup) <= 1
