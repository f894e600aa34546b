"""Grokfast against its published formulas; every trap that users fell into is a test here."""

from __future__ import annotations

import copy
import math
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_parts import make_plugin, make_session
from torch import nn

from forge_kernel.api import Kind
from forge_kernel.config.use import UseGradients
from forge_kernel.contract.values import Batch
from forge_kernel.errors import ConfigError
from forge_kernel.planning.pipeline_file import load_pipeline
from forge_plugins.gradients.grokfast import GrokfastConfig
from forge_plugins.mathematics.grokfast.filters import (
    PIECE,
    SlowGradient,
    Window,
    filter_ema,
    filter_ma,
)


def ema_oracle(gradients: list[torch.Tensor], alpha: float, lamb: float) -> list[torch.Tensor]:
    """The paper's algorithm 2 in float64, started at the first gradient as its code does."""
    mean: torch.Tensor | None = None
    found = []
    for gradient in gradients:
        g = gradient.double()
        mean = g if mean is None else mean * alpha + g * (1 - alpha)
        found.append(g + mean * lamb)
    return found


def ma_oracle(gradients: list[torch.Tensor], window: int, lamb: float) -> list[torch.Tensor]:
    """The paper's algorithm 1 in float64: the mean of a full window, this gradient among it."""
    queue: deque[torch.Tensor] = deque(maxlen=window)
    found = []
    for gradient in gradients:
        queue.append(gradient.double())
        full = len(queue) == window
        found.append(queue[-1] + (sum(queue) / window * lamb if full else 0.0))  # type: ignore[arg-type]
    return found


@pytest.mark.spec("E13", "E3")
@pytest.mark.parametrize("size", [7, PIECE + 3])
def test_ema_equals_the_published_filter_over_200_steps(size: int) -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(size) for _ in range(200 if size < 100 else 20)]
    memory = SlowGradient(torch.zeros(size))
    for gradient, expected in zip(gradients, ema_oracle(gradients, 0.98, 2.0), strict=True):
        filtered = gradient.clone()
        filter_ema([filtered], [memory], alpha=0.98, lambda_reg=2.0)
        assert torch.allclose(filtered.double(), expected, atol=1e-6)


@pytest.mark.parametrize("window", [1, 3, 10])
def test_ma_equals_the_published_filter_over_200_steps(window: int) -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(5, 3) * 10 ** ((i % 7) - 3) for i in range(200)]
    memory = Window(gradients[0], window)
    for gradient, expected in zip(gradients, ma_oracle(gradients, window, 5.0), strict=True):
        filtered = gradient.clone()
        filter_ma([filtered], [memory], lambda_reg=5.0)
        assert torch.allclose(filtered.double(), expected, rtol=1e-5, atol=1e-3)


def test_the_running_sum_does_not_drift() -> None:
    """What was added is subtracted later with other rounding: the sum is taken anew each turn."""
    torch.manual_seed(0)
    memory = Window(torch.zeros(4), 8)
    for step in range(4000):
        memory.push(torch.randn(4) * (1e6 if step < 2000 else 1e-3))
    assert torch.allclose(memory.sum, memory.ring.sum(0), rtol=1e-4, atol=1e-9)


@pytest.mark.spec("E2", "E3")
@given(
    alpha=st.floats(0, 0.999), lamb=st.floats(0, 10), value=st.floats(-1e3, 1e3),
    steps=st.integers(1, 50),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_constant_gradient_becomes_one_plus_lambda_times_itself(
    alpha: float, lamb: float, value: float, steps: int
) -> None:
    """Also the sign: the slow part is added, never subtracted."""
    memory = SlowGradient(torch.zeros(1, dtype=torch.float64))
    for _ in range(steps):
        gradient = torch.full((1,), value, dtype=torch.float64)
        filter_ema([gradient], [memory], alpha=alpha, lambda_reg=lamb)
        assert gradient.item() == pytest.approx(value * (1 + lamb), rel=1e-9, abs=1e-9)


@given(alpha=st.floats(0.01, 0.99), lamb=st.floats(0, 5), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_from_zero_the_average_has_its_closed_form(alpha: float, lamb: float, seed: int) -> None:
    """`mu_t = (1 - a) sum a^(t-i) g_i`; divided by `1 - a^t` when debiased."""
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    zero, debiased = (SlowGradient(torch.zeros(3, dtype=torch.float64)) for _ in range(2))
    for t in range(1, 13):
        powers = torch.tensor([alpha ** (t - i) for i in range(1, t + 1)], dtype=torch.float64)
        mean = (1 - alpha) * (powers.unsqueeze(1) * gradients[:t]).sum(0)
        a, b = gradients[t - 1].clone(), gradients[t - 1].clone()
        filter_ema([a], [zero], alpha=alpha, lambda_reg=lamb, beginning="zero")
        filter_ema([b], [debiased], alpha=alpha, lambda_reg=lamb, beginning="debiased")
        assert torch.allclose(a, gradients[t - 1] + lamb * mean, atol=1e-10)
        unbiased = mean / (1 - alpha**t)
        assert torch.allclose(b, gradients[t - 1] + lamb * unbiased, atol=1e-8)


def test_normalised_a_steady_gradient_keeps_its_size() -> None:
    memory, window = SlowGradient(torch.zeros(2)), Window(torch.zeros(2), 2)
    for _ in range(5):
        a, b = torch.ones(2), torch.ones(2)
        filter_ema([a], [memory], alpha=0.9, lambda_reg=3.0, normalize=True)
        filter_ma([b], [window], lambda_reg=3.0, normalize=True)
    assert torch.allclose(a, torch.ones(2))
    assert torch.allclose(b, torch.ones(2))


def test_the_filter_works_in_place_so_that_views_of_the_gradient_see_it() -> None:
    flat = torch.randn(10)
    before = flat.clone()
    view = flat[2:7]
    filter_ema([view], [SlowGradient(torch.zeros(5))], alpha=0.5, lambda_reg=1.0)
    assert torch.allclose(flat[2:7], before[2:7] * 2)
    assert torch.equal(flat[:2], before[:2])


def test_the_ring_holds_copies_not_the_live_gradient() -> None:
    """With zero_grad(set_to_none=False) the gradient's memory is written again each step."""
    live = torch.tensor([1.0])
    window = Window(live, 3)
    for value in (1.0, 2.0, 3.0):
        live.fill_(value)
        filter_ma([live], [window], lambda_reg=1.0)
    assert live.item() == pytest.approx(3.0 + (1 + 2 + 3) / 3)


def batch(seed: int = 0, size: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        torch.randn(size, 4, generator=generator), torch.randint(3, (size,), generator=generator)
    )


def grokfast(**config: Any) -> dict[str, Any]:
    return {"gradients": (UseGradients("grokfast", config),)}


@pytest.mark.parametrize("config", [{"alpha": 0.9}, {"filter": "ma", "window": 3}])
def test_an_infinite_gradient_does_not_poison_the_average(config: Any, linear: nn.Module) -> None:
    clean = copy.deepcopy(linear)
    sessions = [
        make_session(model, [batch()], uses=grokfast(**config), non_finite="skip")
        for model in (linear, clean)
    ]
    for step in range(6):
        if step == 3:
            bad = batch(9)
            bad.inputs[0, 0] = math.inf
            sessions[0].step(bad)
        for session in sessions:
            session.step(batch(step))
    assert torch.equal(linear.weight, clean.weight)
    assert bool(torch.isfinite(linear.weight).all())


def test_the_filter_acts_once_in_a_window_not_on_micro_batches(linear: nn.Module) -> None:
    whole = copy.deepcopy(linear)
    pieces = make_session(linear, [batch()], uses=grokfast(alpha=0.9, lambda_reg=2.0))
    full = make_session(whole, [batch()], uses=grokfast(alpha=0.9, lambda_reg=2.0))
    for step in range(10):
        parts = [batch(10 * step + index) for index in range(4)]
        pieces.step(*parts)
        full.step(
            Batch(torch.cat([p.inputs for p in parts]), torch.cat([p.targets for p in parts]))
        )
    assert torch.allclose(linear.weight, whole.weight, atol=1e-6)


def test_it_sees_gradients_before_clipping_and_after_unscaling(linear: nn.Module) -> None:
    norms: list[float] = []

    def on_gradients(self: Any, run: Any, step: Any) -> None:
        norms.append(float(torch.nn.utils.get_total_norm(step.gradients)))

    watch = make_plugin("watch", Kind.GRADIENTS, on_gradients=on_gradients)
    uses = {
        "gradients": (
            UseGradients("clip_norm", {"max_norm": 0.01}),  # written first, runs after the filter
            UseGradients("grokfast", {"lambda_reg": 100.0}),
        )
    }
    session = make_session(linear, [batch()], uses=uses, plugins=[watch], precision="fp16")
    for step in range(3):
        session.step(batch(step))
    assert norms[-1] == pytest.approx(0.01, rel=1e-3)


def test_a_parameter_unfrozen_later_starts_its_own_average(linear: nn.Module) -> None:
    linear.bias.requires_grad_(False)
    session = make_session(linear, [batch()], uses=grokfast(alpha=0.5, lambda_reg=1.0), lr=1.0)
    session.step(batch(0))
    linear.bias.requires_grad_(True)
    reference = copy.deepcopy(linear)
    reference.zero_grad()
    nn.functional.cross_entropy(reference(batch(1).inputs), batch(1).targets).backward()
    session.step(batch(1))
    assert reference.bias.grad is not None
    moved = reference.bias - linear.bias
    assert torch.allclose(moved, 2.0 * reference.bias.grad, atol=1e-6)  # first: (1 + lambda) g


def test_swapped_alpha_and_lambda_are_refused_with_a_message_that_names_the_swap(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match="look swapped"):
        load_pipeline(
            "smoke",
            ["gradients[0].with.alpha=2.0", "gradients[0].with.lambda_reg=0.98"],
        )
    with pytest.raises(ValueError, match="look swapped"):
        GrokfastConfig(alpha=2.0, lambda_reg=0.98)


@pytest.mark.parametrize(
    "setting", ["gradients[0].with.alpha=1.0", "gradients[0].with.lambda_reg=-1"]
)
def test_settings_out_of_bounds_are_refused(setting: str) -> None:
    with pytest.raises(ConfigError):
        load_pipeline("smoke", [setting])


def test_every_setting_changes_the_filter(linear: nn.Module) -> None:
    """Law 7: a setting that is read by nothing is a defect."""
    base = {"alpha": 0.9, "lambda_reg": 2.0}
    ma = {"filter": "ma", "window": 3, "lambda_reg": 2.0}
    variants: list[dict[str, Any]] = [
        base, {**base, "alpha": 0.5}, {**base, "lambda_reg": 1.0}, {**base, "beginning": "zero"},
        {**base, "beginning": "debiased"}, {**base, "normalize": True},
        ma, {**ma, "window": 2}, {**ma, "wait_until_full": False}, {**ma, "normalize": True},
    ]  # fmt: skip
    results = []
    for config in variants:
        model = copy.deepcopy(linear)
        session = make_session(model, [batch()], uses=grokfast(**config))
        for step in range(4):
            session.step(batch(step))
        results.append(model.weight.detach())
    for index, one in enumerate(results):
        for other in results[index + 1 :]:
            assert not torch.equal(one, other)


def slopes(model: nn.Module, given: Batch) -> tuple[torch.Tensor, ...]:
    """The gradients of the cross-entropy."""
    loss = nn.functional.cross_entropy(model(given.inputs), given.targets)
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize(
    ("config", "of_three"),
    [
        ({"alpha": 0.5}, [0.25, 0.25, 0.5]),
        ({"filter": "ma", "window": 2}, [0.0, 0.5, 0.5]),
        ({"filter": "ma", "window": 5}, [1 / 3, 1 / 3, 1 / 3]),  # not full yet
    ],
    ids=str,
)
def test_the_metric_is_the_norm_of_the_slow_gradients_of_all_parameters(
    config: dict[str, Any], of_three: list[float], linear: nn.Module
) -> None:
    """Planted: the first parameter's alone; the sum of a window in place of its mean."""
    session = make_session(
        linear, [batch()], uses=grokfast(lambda_reg=0.0, **config), lr=0.0, log_every=1
    )
    gradients = []
    for seed in range(3):
        session.step(batch(seed))
        gradients.append(slopes(linear, batch(seed)))
    slow = [
        sum(share * one for share, one in zip(of_three, each, strict=True))
        for each in zip(*gradients, strict=True)
    ]
    expected = float(torch.cat([one.flatten() for one in slow]).norm())  # type: ignore[union-attr]
    assert session.log().metrics["slow_gradient_norm"] == pytest.approx(expected, rel=1e-5)
