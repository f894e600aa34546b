"""Filter and AdamW in one passage: the numbers of the two apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from forge_kernel.errors import PlanError
from forge_kernel.planning.pipeline_file import load_pipeline
from forge_kernel.planning.plan import plan
from forge_plugins.mathematics.grokfast.filters import SlowGradient, filter_ema
from forge_plugins.mathematics.optimizers.grokfast_adamw import PIECE, GrokfastAdamW
from forge_plugins.mathematics.optimizers.torch_compile import compiler_fault
from forge_plugins.optimizers import grokfast_adamw as plugin_module

SETTINGS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.98), "weight_decay": 0.1}
SHAPES = ((5, 3), (7,), (2, PIECE + 9), (PIECE,))


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def apart(steps: int, alpha: float = 0.9, lambda_reg: float = 2.0) -> list[nn.Parameter]:
    found = parameters()
    optimizer = torch.optim.AdamW(found, fused=True, **SETTINGS)
    memories = [SlowGradient(torch.zeros_like(p)) for p in found]
    for step in range(steps):
        for parameter, gradient in zip(found, gradients(step), strict=True):
            parameter.grad = gradient
        mine = [parameter.grad for parameter in found if parameter.grad is not None]
        filter_ema(mine, memories, alpha=alpha, lambda_reg=lambda_reg)
        optimizer.step()
    return found


def together(steps: int, optimizer_of: Any = None, **options: Any) -> list[nn.Parameter]:
    found = parameters()
    settings = {**SETTINGS, "alpha": 0.9, "lambda_reg": 2.0, **options}
    optimizer = GrokfastAdamW(found, **settings)
    for step in range(steps):
        for parameter, gradient in zip(found, gradients(step), strict=True):
            parameter.grad = gradient
        optimizer.step()
        if optimizer_of is not None:
            optimizer = optimizer_of(found, optimizer, settings)
    return found


def resumed(found: list[nn.Parameter], old: GrokfastAdamW, settings: Any) -> GrokfastAdamW:
    new = GrokfastAdamW(found, **settings)
    new.load_state_dict(old.state_dict())
    return new


def test_it_is_the_filter_and_then_adamw_bit_for_bit() -> None:
    """Planted faults: the average from zero; the pieces' last one left out."""
    for one, two in zip(apart(5), together(5), strict=True):
        assert torch.equal(one, two)


def test_a_new_optimizer_goes_on_from_the_state_of_the_old_one() -> None:
    for one, two in zip(together(5), together(5, resumed), strict=True):
        assert torch.equal(one, two)


def test_compiled_it_agrees_up_to_rounding() -> None:
    """Planted fault: the bias correction of the step before."""
    assert compiler_fault("cpu") is None, "this machine has no compiler: the loop cannot be tested"
    for one, two in zip(apart(5), together(5, compiled=True), strict=True):
        torch.testing.assert_close(one, two, atol=2e-6, rtol=1e-5)
    for one, two in zip(
        together(5, compiled=True), together(5, resumed, compiled=True), strict=True
    ):
        assert torch.equal(one, two)


def test_what_has_no_gradient_stays_and_may_join_later() -> None:
    late, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = GrokfastAdamW([late, other], lr=0.1)
    other.grad = torch.ones(3)
    optimizer.step()
    assert late.tolist() == [1.0, 1.0, 1.0]
    late.grad = torch.ones(3)
    optimizer.step()
    assert float(optimizer.state[late]["step"]) == 1
    assert float(optimizer.state[other]["step"]) == 2


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("size", [3, 2**18], ids=["small", "in pieces"])
def test_one_that_joins_late_has_the_bias_correction_of_its_own_steps(
    compiled: bool, size: int
) -> None:
    """Planted: that of the parameter before it in the list."""
    first, late, alone = (nn.Parameter(torch.ones(size)) for _ in range(3))
    together_ = GrokfastAdamW([first, late], lr=0.1, compiled=compiled)
    apart_ = GrokfastAdamW([alone], lr=0.1, compiled=compiled)
    for step in range(5):
        first.grad = torch.full((size,), 0.5)
        if step >= 3:
            late.grad, alone.grad = torch.full((size,), 2.0), torch.full((size,), 2.0)
            apart_.step()
        together_.step()
    torch.testing.assert_close(late, alone, rtol=0, atol=0)


@pytest.mark.parametrize(
    "changed",
    [
        {"lr": 0.1}, {"betas": (0.5, 0.98)}, {"eps": 1.0}, {"weight_decay": 0.9}, {"alpha": 0.1},
        {"lambda_reg": 0.5}, {"decay": "matrices", "weight_decay": 0.9},
    ],
    ids=lambda changed: next(iter(changed)),
)  # fmt: skip
def test_every_setting_changes_the_weights(changed: dict[str, Any]) -> None:
    def trained(**config: Any) -> list[torch.Tensor]:
        model = nn.LayerNorm(4)
        nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(0))
        settings = plugin_module.GrokfastAdamWConfig(**config)
        optimizer = plugin_module.GrokfastAdamW(settings).make_optimizer(
            None, list(model.named_parameters())  # type: ignore[arg-type]
        )  # fmt: skip
        for step in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.randn(4, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        return [parameter.detach() for parameter in model.parameters()]

    base = {"weight_decay": 0.9} if "decay" in changed else {}
    pairs = zip(trained(**base), trained(**changed), strict=True)
    assert any(not torch.equal(one, two) for one, two in pairs)


class _Recorder:
    def __init__(self) -> None:
        self.told: list[str] = []

    def emit_event(self, name: str, message: str, **_: Any) -> None:
        self.told.append(f"{name}: {message}")


def test_without_a_compiler_it_says_so_and_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin_module.torch_compile, "compiler_fault", lambda _: "no compiler here")
    large, recorder = nn.Linear(PIECE, 2), _Recorder()
    plugin = plugin_module.GrokfastAdamW(plugin_module.GrokfastAdamWConfig())
    optimizer = plugin.make_optimizer(recorder, list(large.named_parameters()))  # type: ignore[arg-type]
    assert recorder.told == [
        "not_compiled: Filter and AdamW are not compiled into one loop: no compiler here"
    ]
    large.weight.grad, before = torch.ones_like(large.weight), large.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(large.weight, before)
    never = plugin_module.GrokfastAdamWConfig(compile="never")
    quiet = _Recorder()
    plugin_module.GrokfastAdamW(never).make_optimizer(quiet, list(large.named_parameters()))  # type: ignore[arg-type]
    assert quiet.told == []


def test_beside_the_filter_it_is_refused() -> None:
    named = load_pipeline("bitnet_grokfast", ["optimizer={use: grokfast_adamw}"])
    with pytest.raises(PlanError, match=r"grokfast_adamw cannot run beside gradients.grokfast"):
        plan(named)


def test_swapped_settings_are_told_as_swapped() -> None:
    advice = plugin_module.GrokfastAdamWConfig.advice({"alpha": 2.0, "lambda_reg": 0.98})
    assert advice is not None
    assert "swapped" in advice
