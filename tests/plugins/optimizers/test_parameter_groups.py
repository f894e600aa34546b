"""Rates and decays by name, what is frozen by name, and schedules of the weight decay."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_parts import StopAfter, make_session
from torch import nn

from forge_kernel import load_pipeline, resume, run
from forge_kernel.config.schema import bind_config
from forge_kernel.config.use import Use, UseSchedule
from forge_kernel.contract.plugin import Kind
from forge_kernel.contract.values import Batch
from forge_kernel.errors import ConfigError, PluginError
from forge_kernel.planning.catalog import Catalog
from forge_kernel.training.session import Session

OPTIMIZERS = [
    pytest.param(name, marks=pytest.mark.deep if name == "adamw_8bit" else ())  # it is compiled
    for name in sorted(
        offer.name for offer in Catalog.installed().offers() if offer.kind is Kind.OPTIMIZER
    )
]
CONSTANT = {"use": "constant", "with": {"factor": 0.5}}


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(torch.randn(6, 4, generator=generator), torch.arange(6) % 3)


def session_of(
    optimizer: str = "adamw", settings: dict[str, Any] | None = None, **more: Any
) -> Session:
    model = more.pop("model", None) or net()
    uses = {key: more.pop(key) for key in ("schedule", "wrappers", "quantizer") if key in more}
    plugin = Catalog.installed().load(Kind.OPTIMIZER, optimizer)
    config = bind_config(plugin.info.config, settings or {})
    return make_session(model, [batch()], uses=uses, optimizer=plugin(config), **more)


def groups_of(session: Session) -> list[tuple[list[str], float, float]]:
    names = {id(p): name for name, p in session.run.named_parameters()}
    return [
        ([names[id(p)] for p in group["params"]], float(group["lr"]), group["weight_decay"])
        for group in session.run.optimizer.param_groups
    ]


def test_each_name_has_the_rate_and_decay_of_its_first_entry() -> None:
    """Planted: the last entry counts; the base rate in place of the entry's."""
    entries = [
        {"parameters": ["0.*"], "lr": 0.5},
        {"parameters": ["*.weight"], "weight_decay": 0.25},
        {"parameters": ["4.bias"], "lr": 0.0, "weight_decay": 0.125},
    ]
    session = session_of(
        settings={"lr": 0.1, "weight_decay": 0.5, "decay": "matrices", "groups": entries}
    )
    assert groups_of(session) == [
        (["2.bias"], 0.1, 0.0), (["0.weight"], 0.5, 0.5), (["0.bias"], 0.5, 0.0),
        (["2.weight", "4.weight"], 0.1, 0.25), (["4.bias"], 0.0, 0.125),
    ]  # fmt: skip
    before = {name: p.detach().clone() for name, p in session.run.named_parameters()}
    session.step(batch())
    after = dict(session.run.named_parameters())
    assert torch.equal(before["4.bias"], after["4.bias"])
    for name, rate in (("0.bias", 0.5), ("2.bias", 0.1)):  # the first step of AdamW is the rate
        moved = (after[name].detach() - before[name]).abs().max()
        assert float(moved) == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_leaves_alone_what_has_rate_and_decay_0(name: str) -> None:
    entries = [{"parameters": ["2.*"], "lr": 0.0, "weight_decay": 0.0}]
    session = session_of(name, {"groups": entries})
    before = {name: p.detach().clone() for name, p in session.run.named_parameters()}
    for _ in range(3):
        session.step(batch())
    moved = {n for n, p in session.run.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"0.weight", "0.bias", "4.weight", "4.bias"}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            [{"parameters": ["none.*", "0.weight", "nor.*"], "lr": 1.0}],
            "groups[0].parameters: 'none.*' names no parameter; "
            "optimizer.with.groups[0].parameters: 'nor.*' names no parameter",
        ),
        (
            [{"parameters": ["0.*"], "lr": 1.0}, {"parameters": ["0.bias"], "lr": 2.0}],
            "groups[1].parameters: what '0.bias' names is in an entry before it",
        ),
        ([{"parameters": ["2.*"], "lr": 1.0}], "'2.*' names only parameters that are frozen"),
    ],
)
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_each_pattern_that_names_nothing_is_named(
    name: str, entries: list[dict[str, Any]], message: str
) -> None:
    model = net()
    model[2].requires_grad_(False)
    with pytest.raises(PluginError, match=re.escape(message)):
        session_of(name, {"groups": entries}, model=model)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{parameters: ['*']}", "changes nothing"), ("{parameters: [], lr: 1}", "at least 1"),
        ("{lr: 1}", "parameters"), ("{parameters: ['*'], lr: -1}", "at least 0"),
        ("{parameters: ['*'], rate: 1}", "rate"),
    ],
)  # fmt: skip
def test_an_entry_that_cannot_work_is_refused_before_anything_runs(
    entry: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_pipeline("smoke", [f"optimizer={{use: adamw, with: {{groups: [{entry}]}}}}"])


# -- frozen by name --------------------------------------------------------------------------------


def frozen(*parameters: str, but: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"wrappers": (Use("freeze", {"parameters": list(parameters), "but": list(but)}),)}


def test_what_is_named_stays_and_costs_no_memory_of_the_optimizer() -> None:
    session = session_of(settings={"weight_decay": 0.5}, **frozen("0.*", "2.*", but=("2.bias",)))
    before = {name: p.detach().clone() for name, p in session.run.named_parameters()}
    session.step(batch())
    moved = {n for n, p in session.run.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"2.bias", "4.weight", "4.bias"}
    assert len(session.run.optimizer.state) == 3
    assert session.run.parameters["0.weight"].grad is None


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.head.weight = self.first.weight

    def forward(self, inputs: Any) -> Any:
        return self.head(self.first(inputs))


def test_a_shared_parameter_is_frozen_and_spared_by_any_of_its_names() -> None:
    """Planted: names of the state dict alone, in which a tie has one."""
    by_second = session_of(model=Tied(), **frozen("head.weight"))
    assert not by_second.run.parameters["first.weight"].requires_grad
    spared = session_of(model=Tied(), **frozen("first.*", but=("first.weight",)))
    assert spared.run.parameters["first.weight"].requires_grad
    assert not spared.run.parameters["first.bias"].requires_grad


@pytest.mark.parametrize(
    ("patterns", "but", "message"),
    [
        (("0.*", "no.*", "nor"), (), "no parameter is named by 'no.*', 'nor' (parameters)"),
        (("0.*",), ("4.*",), "no parameter is named by '4.*' (but)"),
        (("*",), (), "nothing is left to train"),
    ],
)
def test_what_cannot_be_frozen_is_named(
    patterns: tuple[str, ...], but: tuple[str, ...], message: str
) -> None:
    with pytest.raises(PluginError, match=re.escape(message)):
        session_of(**frozen(*patterns, but=but))


# -- schedules of the weight decay -----------------------------------------------------------------


def decays(session: Session, steps: int) -> list[tuple[float, float]]:
    result = []
    for _ in range(steps):
        session.step(batch())
        group = session.run.optimizer.param_groups[0]
        result.append((float(group["lr"]), group["weight_decay"]))
    return result


def test_two_stages_drop_the_rate_and_end_the_decay() -> None:
    """Planted: the drop at the step before."""
    options = {"warmup_steps": 0, "second_rate": 0.5, "switch": 0.5}
    session = session_of(
        settings={"lr": 1.0, "weight_decay": 0.1},
        schedule=UseSchedule("two_stage", options), max_steps=9,
    )  # fmt: skip
    rates = [1 - step / 8 for step in range(9)]
    assert decays(session, 9) == [
        (pytest.approx(rate * (0.5 if step >= 4 else 1.0)), 0.0 if step >= 4 else 0.1)
        for step, rate in enumerate(rates)
    ]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_decay_of_its_own_schedule_reaches_every_optimizer(name: str) -> None:
    """Half of it is what half the setting is, whatever the optimizer does with it."""
    key = "adamw_weight_decay" if name == "muon" else "weight_decay"
    schedule = UseSchedule(
        "weight_decay",
        {"schedule": {"use": "constant"}, "decay": CONSTANT},
    )
    first = session_of(name, {key: 0.5}, schedule=schedule)
    second = session_of(name, {key: 0.25})
    for _ in range(3):
        first.step(batch())
        second.step(batch())
    pairs = zip(first.run.model.parameters(), second.run.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_next_schedule_finds_the_configured_decay_again() -> None:
    """Planted: the last factor stays."""
    two = {"use": "two_stage", "with": {"warmup_steps": 0, "total_steps": 4}}
    options = {"schedules": [two, {"use": "constant"}], "until": [{"step": 3}], "join": "jump"}
    session = session_of(
        settings={"lr": 1.0, "weight_decay": 0.25}, schedule=UseSchedule("composite", options)
    )
    assert [decay for _, decay in decays(session, 5)] == [0.25, 0.25, 0.0, 0.25, 0.25]


def test_groups_keep_the_ratios_of_their_decays() -> None:
    entries = [{"parameters": ["0.*"], "weight_decay": 0.5}]
    schedule = {"schedule": {"use": "constant"}, "decay": CONSTANT}
    session = session_of(
        settings={"weight_decay": 0.25, "groups": entries},
        schedule=UseSchedule("weight_decay", schedule),
    )
    session.step(batch())
    assert [group["weight_decay"] for group in session.run.optimizer.param_groups] == [0.125, 0.25]


def test_a_run_with_groups_and_stages_resumes_to_the_bit(tmp_path: Path) -> None:
    settings = [
        "run.max_steps=8", "callbacks=null",
        "wrappers=[{use: freeze, with: {parameters: ['*bias']}}]",
        "optimizer={use: adamw, with: {weight_decay: 0.3, groups: [{parameters: ['*weight'], lr: 0.01}]}}",
        "schedule={use: two_stage, with: {warmup_steps: 2}}",
    ]  # fmt: skip
    whole = run(load_pipeline("smoke", settings), output_dir=tmp_path / "a", quiet=True)
    stop = StopAfter(5)
    run(load_pipeline("smoke", settings), output_dir=tmp_path / "b", quiet=True, plugins=[stop],
        cancel=stop.event)  # fmt: skip
    again = resume(tmp_path / "b", quiet=True, plugins=[StopAfter(100)])
    assert whole.model is not None
    assert again.model is not None
    one, two = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
