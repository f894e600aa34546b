"""Adaptive gradient scaling: tames single tensors and spikes, forgets them, costs no host read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_parts import make_session
from torch import Tensor, nn

from forge_kernel.config.use import UseGradients
from forge_kernel.contract.plugin import Kind
from forge_kernel.contract.values import Batch
from forge_kernel.planning.catalog import Catalog
from forge_plugins.mathematics.optimizers.gradient_scaling import root_mean_squares, scale_down


def gradients(*sizes: float, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(50, 20, generator=generator) * size for size in sizes]


def memory(count: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(count), torch.zeros(count)


@pytest.mark.spec("D14")
def test_a_tensor_far_larger_than_the_others_is_brought_to_the_limit() -> None:
    """Planted fault: the mean over tensors for the median (the large one moves it)."""
    found = gradients(1.0, 1e3, 0.9, 1.1)
    kept = [tensor.clone() for tensor in found]
    factors = scale_down(found, *memory(4), decay=0.9, limit=10.0)
    sizes = root_mean_squares(found)
    assert float(sizes[1]) == pytest.approx(10 * float(root_mean_squares(kept)[0]), rel=0.15)
    for index in (0, 2, 3):
        assert torch.equal(found[index], kept[index])
    assert factors.tolist()[0] == 1.0


@pytest.mark.spec("D14")
def test_the_scale_recovers_after_a_spike() -> None:
    state = memory(3)
    usual = float(root_mean_squares(gradients(1.0))[0])
    for number in range(50):
        scale_down(gradients(1, 1, 1, seed=number), *state, decay=0.9, limit=2.0)
    spike = gradients(1, 1e3, 1)
    tamed = scale_down(spike, *state, decay=0.9, limit=2.0)
    assert float(root_mean_squares(spike)[1]) == pytest.approx(2 * usual, rel=0.1)
    assert float(tamed[1]) < 0.01
    seen = []
    for number in range(200):
        seen.append(
            float(scale_down(gradients(1, 1, 1, seed=number), *state, decay=0.9, limit=2.0)[1])
        )
    assert seen[0] < 0.05
    assert seen[-1] == 1.0
    assert seen == sorted(seen)


def test_a_spike_of_a_single_tensor_model_is_measured_against_its_own_past() -> None:
    state = memory(1)
    for number in range(20):
        scale_down(gradients(1, seed=number), *state, decay=0.9, limit=3.0)
    spike = gradients(100)
    scale_down(spike, *state, decay=0.9, limit=3.0)
    assert float(root_mean_squares(spike)[0]) == pytest.approx(3.0, rel=0.1)


def test_zero_gradients_stay_zero_and_do_not_count_as_usual() -> None:
    found = [torch.zeros(5), torch.zeros(5), torch.ones(5)]
    factors = scale_down(found, *memory(3), decay=0.9, limit=2.0)
    assert factors.tolist() == [1.0, 1.0, 1.0]
    nothing = [torch.zeros(5)]
    assert scale_down(nothing, *memory(1), decay=0.9, limit=2.0).tolist() == [1.0]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), Loud(), nn.Linear(16, 3))


class Loud(nn.Module):
    """Makes the gradients of what stands before it a thousand times too big."""

    def forward(self, x: Tensor) -> Tensor:
        return _Loud.apply(x)  # type: ignore[no-any-return, no-untyped-call]


class _Loud(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 1e3


def batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 32, 4, generator=generator)
    return [Batch(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()) for x in inputs]


@pytest.mark.spec("D14")
def test_a_layer_with_gradients_a_thousand_times_too_big_trains() -> None:
    """Clipping alone gives the whole norm to the loud layer; planted fault: scaled after it."""

    def ended(*filters: Any) -> float:
        session = make_session(net(), batches(1), lr=0.1, uses={"gradients": filters})
        losses = [float(session.step(batch)) for batch in batches(150)]
        return sum(losses[-20:]) / 20

    clip = UseGradients("clip_norm", {"max_norm": 1.0})
    scale = UseGradients("adaptive_scale", {"limit": 3.0})
    assert ended(clip, scale) < 0.8 * ended(clip)


def test_it_stands_before_clipping_wherever_it_is_written_and_logs_its_smallest_scale() -> None:
    uses = {"gradients": (UseGradients("clip_norm"), UseGradients("adaptive_scale"))}
    session = make_session(net(), batches(1), uses=uses, log_every=1)
    order = [entry.info.name for entry in session.plan.answering("on_gradients")]
    assert order == ["adaptive_scale", "clip_norm"]
    session.step(*batches(1))
    assert 0 < (session.log().metrics["smallest_gradient_scale"] or 0) < 1


@pytest.mark.parametrize(("name", "value"), [("decay", 0.0), ("limit", 100.0)])
def test_each_setting_changes_the_run(name: str, value: float) -> None:
    def weights(**options: float) -> Tensor:
        uses = {"gradients": (UseGradients("adaptive_scale", options),)}
        session = make_session(net(), batches(1), lr=1e-3, uses=uses)
        for batch in batches(5):
            session.step(batch)
        return session.run.model[0].weight.detach()  # type: ignore[no-any-return]

    assert not torch.equal(weights(), weights(**{name: value}))


def test_parameters_without_a_gradient_keep_their_place() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)
            self.both = True

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x) if self.both else self.b(x)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    uses = {"gradients": (UseGradients("adaptive_scale"),)}
    session = make_session(Sometimes(), batches(1), uses=uses)
    session.step(*batches(1))
    session.run.model.both = False
    session.step(*batches(1))
    plugin = next(p for entry, p in session.bus.stateful() if entry.info.name == "adaptive_scale")
    assert plugin.state_dict()["count"].tolist() == [1, 1, 2, 2]


def test_a_state_of_another_model_is_refused() -> None:
    plugin = Catalog.installed().load(Kind.GRADIENTS, "adaptive_scale")
    uses = {"gradients": (UseGradients("adaptive_scale"),)}
    session = make_session(net(), batches(1), uses=uses)
    found = next(p for entry, p in session.bus.stateful() if isinstance(p, plugin))
    with pytest.raises(ValueError, match="averages of 2"):
        found.load_state_dict({"mean_square": torch.zeros(2), "count": torch.zeros(2)})
