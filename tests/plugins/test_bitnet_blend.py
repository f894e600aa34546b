"""Full precision first, levels later: when the blend begins, in which order, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_parts import StopAfter, make_session
from torch import Tensor, nn

from forge_kernel import load_pipeline, resume, run
from forge_kernel.config.use import UseQuantizer
from forge_kernel.contract.values import Batch
from forge_kernel.errors import ConfigError
from forge_kernel.training.session import Session
from forge_plugins.mathematics.quantization import quantizers
from forge_plugins.mathematics.quantization.bit_layer import BitLayer
from forge_plugins.mathematics.quantization.warmup import fitting_window, layer_lambda


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )


def batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [
        Batch(torch.randn(6, 4, generator=generator), torch.randint(3, (6,), generator=generator))
        for _ in range(count)
    ]


def session_of(*, max_steps: int | None = 100, **options: Any) -> Session:
    settings = {key: options.pop(key) for key in ("accumulate", "precision") if key in options}
    uses = {"quantizer": UseQuantizer("bitnet", options)}
    return make_session(net(), batches(1), uses=uses, max_steps=max_steps, **settings)


def shares_of(session: Session) -> list[float]:
    layers = [one for one in session.run.model.modules() if isinstance(one, BitLayer)]
    return [layer.warmup_lambda for layer in layers]


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({}, {}), ({"ste": "clipped"}, {}), ({"ste": "none"}, {}), ({"rounding": "stochastic"}, {}),
        ({"rounding": "learned_threshold"}, {}), ({"arithmetic": "int8"}, {}),
        ({}, {"precision": "bf16", "accumulate": 2}), ({"target_sparsity": 0.5}, {}),
    ],
)  # fmt: skip
def test_before_its_start_the_network_learns_as_without_a_quantizer(
    options: dict[str, Any], settings: dict[str, Any]
) -> None:
    """To the bit. Planted: the share before the start is that of a curve at a negative time."""
    session = session_of(warmup_start=4, warmup_steps=3, **options, **settings)
    model = net()
    plain = make_session(model, batches(1), **settings)
    micro = settings.get("accumulate", 1)
    for step in range(4):
        assert shares_of(session) == [0.0] * 3
        window = batches(8)[step * micro : (step + 1) * micro]
        session.step(*window)
        plain.step(*window)
    mine = [p for name, p in session.run.parameters.items() if "threshold" not in name]
    assert all(torch.equal(a, b) for a, b in zip(mine, weights(model), strict=True))
    seen = []
    for _ in range(4):
        seen.append(shares_of(session)[0])
        session.step(*batches(micro))
    assert seen == [0.0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0]


def test_before_its_start_nothing_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not computed costs nothing; the ratio of times is in benchmarks/bitnet_speed.py."""
    session = session_of(warmup_start=2, max_steps=10)
    calls: list[str] = []
    for name in ("weight_scale", "activation_grid", "activation_values", "in_levels"):
        whole = getattr(quantizers, name)

        def counted(*given: Any, _name: str = name, _whole: Any = whole, **named: Any) -> Any:
            calls.append(_name)
            return _whole(*given, **named)

        monkeypatch.setattr(quantizers, name, counted)
    session.step(*batches(1))
    session.step(*batches(1))
    assert not calls
    session.step(*batches(1))
    assert calls


@pytest.mark.parametrize("order", ["first_to_last", "last_to_first"])
@pytest.mark.parametrize("curve", ["linear", "sigmoid"])
def test_layers_follow_one_another(order: str, curve: str) -> None:
    """Planted: each layer's part was the whole warm-up; the order was that of the names."""
    session = session_of(warmup_start=1, warmup_steps=6, warmup_order=order, warmup_curve=curve)
    seen = []
    for _ in range(8):
        seen.append(shares_of(session)[:: 1 if order == "first_to_last" else -1])
        session.step(*batches(1))
    half = pytest.approx(0.5)
    assert seen == [
        [0, 0, 0], [0, 0, 0], [half, 0, 0], [1, 0, 0], [1, half, 0], [1, 1, 0], [1, 1, half],
        [1, 1, 1],
    ]  # fmt: skip


def test_more_layers_than_steps_are_each_on_their_levels_at_the_end() -> None:
    at = [[layer_lambda(step, 2, place, 5) for place in range(5)] for step in (-1, 0, 1, 2)]
    assert at == [[0] * 5, [0] * 5, [1, 1, 0.5, 0, 0], [1] * 5]


@pytest.mark.parametrize("options", [{}, {"warmup_order": "last_to_first"}])
def test_a_blend_that_is_resumed_goes_on_where_it_was(
    tmp_path: Path, options: dict[str, str]
) -> None:
    """Stopped before the start and within the blend; to the bit. Planted: steps of a session."""
    chosen = {"warmup_start": 3, "warmup_steps": 4, "warmup_curve": "sigmoid", **options}
    settings = [f"quantizer.with.{name}={value}" for name, value in chosen.items()]
    settings += ["run.max_steps=9", "callbacks=null", "quantizer.with.rounding=stochastic"]
    whole = run(load_pipeline("smoke", settings), output_dir=tmp_path / "a", quiet=True)
    for step in (2, 5):
        folder = tmp_path / f"b{step}"
        stop = StopAfter(step)
        pipeline = load_pipeline("smoke", settings)
        run(pipeline, output_dir=folder, quiet=True, plugins=[stop], cancel=stop.event)
        again = resume(folder, quiet=True, plugins=[StopAfter(100)])
        assert again.steps == 9
        assert whole.model is not None
        assert again.model is not None
        pairs = zip(weights(whole.model), weights(again.model), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("asked", "total", "result"),
    [
        ((170, 70), 360, (170, 70)), ((170, 70), None, (170, 70)), ((170, 70), 241, (170, 70)),
        ((170, 70), 240, (85, 35)), ((170, 70), 10, (4, 1)), ((0, 70), 100, (0, 50)),
        ((8, 0), 8, (4, 0)), ((8, 0), 9, (8, 0)), ((5, 5), 1, (0, 0)),
    ],
)  # fmt: skip
def test_a_short_run_ends_on_levels(
    asked: tuple[int, int], total: int | None, result: tuple[int, int]
) -> None:
    assert fitting_window(*asked, total, 0.5) == result


def test_what_was_shortened_is_told(caplog: pytest.LogCaptureFixture) -> None:
    session_of(max_steps=8, warmup_start=20, warmup_steps=20)
    assert "warmup_start 20 is too long for 0.5 of the run's 8 steps: shortened to 2" in caplog.text
    assert "warmup_steps 20 is too long for 0.5 of the run's 8 steps: shortened to 2" in caplog.text
    late = session_of(max_steps=10, warmup_start=6, target_sparsity=0.9, sparsity_warmup_steps=5)
    for _ in range(9):
        late.step(*batches(1))
    layer = next(one for one in late.run.model.modules() if isinstance(one, BitLayer))
    assert layer.quantization.sparsity == 0.9
    assert "sparsity_warmup_steps 5 is too long" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["warmup_start=-1"], "at least 0"),
        (["warmup_start=3", "weight_bits=16", "activation_bits=16"], "warmup_start without"),
        (["warmup_order=first_to_last", "warmup_steps=0"], "without warmup_steps does nothing"),
        (["warmup_order=backwards", "warmup_steps=3"], "last_to_first"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_pipeline("smoke", [f"quantizer.with.{one}" for one in settings])
