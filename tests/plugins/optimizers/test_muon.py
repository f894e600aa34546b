"""Muon and AdamW as one optimizer: what torch's own do apart, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from forge_kernel.errors import PluginError
from forge_plugins.mathematics.optimizers.chained_optimizer import JoinedOptimizer
from forge_plugins.mathematics.optimizers.newton_schulz import polar_factor
from forge_plugins.mathematics.quantization.processor import LIMITS
from forge_plugins.optimizers.muon import Muon, MuonConfig


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(self.embedding(tokens)).relu())  # type: ignore[no-any-return]


def fresh() -> Net:
    torch.manual_seed(0)
    return Net()


def made(model: nn.Module, **config: Any) -> torch.optim.Optimizer:
    plugin = Muon(MuonConfig(**config))
    return plugin.make_optimizer(None, list(model.named_parameters()))  # type: ignore[arg-type]


def train(
    model: nn.Module, *optimizers: torch.optim.Optimizer, steps: int = 3, seed: int = 1
) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        tokens = torch.randint(7, (16,), generator=generator)
        nn.functional.cross_entropy(model(tokens), tokens % 3).backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()


def equal(left: nn.Module, right: nn.Module) -> bool:
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return all(torch.equal(one, two) for one, two in pairs)


def pretend(monkeypatch: pytest.MonkeyPatch, *instructions: str) -> None:
    """Let the processor have these instruction sets alone."""
    for limit in LIMITS:
        monkeypatch.delenv(limit, raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(instructions, True))


def test_hidden_matrices_go_to_muon_and_the_rest_to_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where bf16 is fast. Planted fault: the head among the matrices."""
    pretend(monkeypatch, "avx2", "avx512_bf16")
    ours, theirs = fresh(), fresh()
    train(ours, made(ours, lr=0.05, weight_decay=0.1, adamw_lr=0.01, adamw_weight_decay=0.2))
    muon = torch.optim.Muon(
        [theirs.hidden.weight], lr=0.05, weight_decay=0.1, adjust_lr_fn="original"
    )
    rest = [p for name, p in theirs.named_parameters() if name != "hidden.weight"]
    adamw = torch.optim.AdamW(rest, lr=0.01, betas=(0.9, 0.98), weight_decay=0.2, fused=True)
    train(theirs, muon, adamw)
    assert equal(ours, theirs)


@pytest.mark.parametrize(
    "changed",
    [
        {"lr": 0.1}, {"momentum": 0.5}, {"nesterov": False}, {"iterations": 2},
        {"adjust": "match_rms_adamw"}, {"weight_decay": 0.5}, {"adamw": ("hidden*", "head*")},
        {"adamw_lr": 0.1}, {"adamw_betas": (0.5, 0.5)}, {"adamw_weight_decay": 0.5},
    ],
    ids=lambda changed: next(iter(changed)),
)  # fmt: skip
def test_every_setting_changes_the_weights(changed: dict[str, Any]) -> None:
    plain, other = fresh(), fresh()
    train(plain, made(plain))
    train(other, made(other, **changed))
    assert not equal(plain, other)


def test_biases_are_left_out_of_the_decay_when_it_is_of_matrices() -> None:
    model = fresh()
    groups = made(model, adamw_weight_decay=0.5, decay="matrices").param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decays[id(model.head.weight)] == 0.5
    assert decays[id(model.head.bias)] == 0.0


def test_its_state_goes_into_another_one_and_training_goes_on_bit_for_bit() -> None:
    """Planted fault: the parts keep their own maps after a load."""
    straight, cut = fresh(), fresh()
    one, two = made(straight), made(cut)
    train(straight, one, steps=2)
    train(cut, two, steps=2)
    resumed = made(cut)
    resumed.load_state_dict(two.state_dict())
    resumed.param_groups[0]["lr"] *= 0.5
    one.param_groups[0]["lr"] *= 0.5
    train(straight, one, seed=2)
    train(cut, resumed, seed=2)
    assert equal(straight, cut)
    assert isinstance(resumed, JoinedOptimizer)
    assert all(part.state is resumed.state for part in resumed.parts)


def test_a_model_without_hidden_matrices_is_refused() -> None:
    with pytest.raises(PluginError, match="use adamw"):
        made(nn.Sequential(nn.LayerNorm(3)))


def test_on_a_processor_without_bf16_it_iterates_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The singular values of its first step lie where fp32 puts them. Planted: bf16 always."""
    pretend(monkeypatch, "avx2")
    model = fresh()
    before = model.hidden.weight.detach().clone()
    train(model, made(model, lr=1.0, nesterov=False), steps=1)
    other = fresh()
    tokens = torch.randint(7, (16,), generator=torch.Generator().manual_seed(1))
    nn.functional.cross_entropy(other(tokens), tokens % 3).backward()
    assert other.hidden.weight.grad is not None
    expected = polar_factor(other.hidden.weight.grad)
    torch.testing.assert_close(before - model.hidden.weight.detach(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sets", [("avx2",), ("avx512_bf16",)], ids=["fp32", "bf16"])
def test_training_goes_on_bit_for_bit_in_either_arithmetic(
    monkeypatch: pytest.MonkeyPatch, sets: tuple[str, ...]
) -> None:
    pretend(monkeypatch, *sets)
    straight, cut = fresh(), fresh()
    one, two = made(straight), made(cut)
    for model, optimizer in ((straight, one), (cut, two)):
        train(model, optimizer, steps=2)
    resumed = made(cut)
    resumed.load_state_dict(two.state_dict())
    for model, optimizer in ((straight, one), (cut, resumed)):
        train(model, optimizer, seed=2)
    assert equal(straight, cut)
