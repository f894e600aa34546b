"""A dropped window leaves no trace in what the forward pass writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_parts import make_plugin, make_session
from torch import Tensor, nn

from forge_kernel.config.use import UseLoss, UseValidator
from forge_kernel.contract.data import DataSpec
from forge_kernel.contract.plugin import Kind
from forge_kernel.contract.values import Batch
from forge_kernel.errors import NonFiniteError
from forge_kernel.training.loaders.data_loaders import LoaderData

GENERATOR = torch.Generator().manual_seed(1)
X = torch.randn(40, 4, generator=GENERATOR)
Y = torch.randint(3, (40,), generator=GENERATOR)
GOOD = [Batch(X[i : i + 10], Y[i : i + 10]) for i in range(0, 40, 10)]
BAD = Batch(torch.full((10, 4), torch.nan), Y[:10])


class Counts(nn.Module):
    """Everything that a forward pass may write: in place, by `.data`, by a new tensor, elsewhere."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("in_place", torch.zeros(width))
        self.register_buffer("by_data", torch.zeros(width))
        self.register_buffer("anew", torch.zeros(width), persistent=False)
        self.register_buffer("late", None)
        self.register_buffer("large", torch.zeros(600, 600))
        self.calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            mean = inputs.detach().mean(0)
            self.in_place.mul_(0.9).add_(mean)
            self.by_data.data = self.by_data.data * 0.5 + mean
            self.anew = self.anew + mean
            self.late = mean if self.late is None else self.late + mean
            self.large += mean.sum()
            self.calls += 1
        return inputs

    def get_extra_state(self) -> Any:
        return {"calls": self.calls, "history": [self.calls]}

    def set_extra_state(self, state: Any) -> None:
        self.calls = state["calls"]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), Counts(6), nn.SyncBatchNorm(6).eval(), nn.Linear(6, 3)
    )


def written(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: None if value is None else value.clone()
        for module_name, module in model.named_modules()
        for key, value in module._buffers.items()
        for name in [f"{module_name}.{key}"]
    }
    return {**found, "calls": model[2].calls}  # type: ignore[index]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[key], other[key]) if isinstance(one[key], Tensor) and isinstance(other[key], Tensor)
        else one[key] is other[key] or one[key] == other[key]
        for key in one
    )  # fmt: skip


@pytest.mark.spec("C9")
@pytest.mark.parametrize("before", [0, 3], ids=["the first window", "a later one"])
@pytest.mark.parametrize(
    "bad", [[BAD], [GOOD[0], BAD], [BAD, GOOD[1]], [GOOD[0], BAD, GOOD[1]]], ids=len
)
def test_buffers_and_extra_state_are_as_before_the_window(bad: list[Batch], before: int) -> None:
    """Red when only BatchNorm is thought of, or only the last micro-batch."""
    model = network()
    session = make_session(model, GOOD, non_finite="skip", accumulate=len(bad))
    for number in range(before):
        session.step(*[GOOD[number]] * len(bad))
    kept, weights = written(model), [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        session.step(*bad)
        assert same(kept, written(model))
    assert session.run.progress.skipped == 2
    assert all(map(torch.equal, weights, model.parameters()))
    session.step(*[GOOD[3]] * len(bad))
    assert session.run.progress.step == before + 1
    assert not same(kept, written(model)), "a good window writes again"


@pytest.mark.parametrize("policy", ["stop", "rollback"])
def test_the_other_settings_leave_no_trace_either(policy: str, tmp_path: Path) -> None:
    model = network()
    session = make_session(model, GOOD, non_finite=policy, folder=tmp_path)
    session.step(GOOD[0])
    session.save()
    kept = written(model)
    if policy == "stop":
        with pytest.raises(NonFiniteError):
            session.step(BAD)
    else:
        session.step(BAD)
    assert same(kept, written(model))


def test_a_window_in_which_nothing_counts_leaves_no_trace() -> None:
    model = network()
    session = make_session(model, GOOD)
    session.step(GOOD[0])
    kept = written(model)
    session.step(Batch(X[:10], torch.full((10,), -100)))
    assert same(kept, written(model))


def test_companion_modules_are_put_back_too() -> None:
    companion = Counts(3)

    def make_modules(self: Any, run: Any) -> dict[str, nn.Module]:
        return {"companion": companion}

    def on_outputs(self: Any, run: Any, step: Any, batch: Any, outputs: Tensor) -> None:
        companion(outputs)

    helper = make_plugin("helper", Kind.CALLBACKS, make_modules=make_modules, on_outputs=on_outputs)
    session = make_session(nn.Linear(4, 3), GOOD, plugins=[helper], non_finite="skip")
    session.step(GOOD[0])
    kept = companion.in_place.clone(), companion.calls
    session.step(BAD)
    assert torch.equal(companion.in_place, kept[0])
    assert companion.calls == kept[1]


def test_a_run_goes_on_as_if_the_bad_batch_had_not_been_there() -> None:
    """Bit for bit, with the averages of an adaptive loss and of batch normalisation."""

    def weights_after(batches: list[Batch]) -> list[Tensor]:
        model = network()
        tasks = {
            "tasks": {
                "one": {"use": "cross_entropy"},
                "two": {"use": "cross_entropy", "with": {"label_smoothing": 0.3}},
            }
        }
        session = make_session(
            model, LoaderData(batches, spec=DataSpec(classes=3)), non_finite="skip", own_loss=True,
            uses={"loss": UseLoss("multi_task", {**tasks, "weighting": "adaptive"})}, max_epochs=2,
        )  # fmt: skip
        session.train()
        return [value.clone() for value in model.state_dict().values() if isinstance(value, Tensor)]

    with_bad = [*GOOD[:2], BAD, *GOOD[2:]]
    assert all(map(torch.equal, weights_after(with_bad), weights_after(GOOD)))


def test_no_metric_of_answers_that_are_no_numbers_is_one_and_nobody_acts_on_it() -> None:
    model = network()
    with torch.no_grad():
        model[4].weight.fill_(torch.nan)  # type: ignore[index, union-attr]
    heard: list[dict[str, float]] = []

    def on_validation(self: Any, run: Any, metrics: Any) -> None:
        heard.append(dict(metrics))

    watcher = make_plugin("watcher", Kind.OBSERVERS, on_validation=on_validation)
    from forge_kernel.config.use import UseCallback

    callbacks = (
        UseCallback("stop_at", {"metric": "accuracy", "threshold": 0.0}),
        UseCallback("early_stopping", {"patience": 1}),
        UseCallback("best_checkpoint"),
        UseCallback("capabilities"),
    )
    session = make_session(
        model, LoaderData(GOOD, GOOD, DataSpec(classes=3)), plugins=[watcher],
        uses={"validators": (UseValidator("classification", {"top_k": [2], "by_class": ["f1"]}),), "callbacks": callbacks},
    )  # fmt: skip
    for _ in range(3):
        session.validate()
    assert heard
    assert all(value != value for value in heard[0].values()), heard[0]
    assert session.run.requests == []
    assert session.run.metrics.best == {}
    assert set(session.run.metrics.validation.values()) == {None}


@pytest.mark.parametrize("where", ["compute_loss", "on_gradients", "on_batch"])
def test_who_goes_on_after_an_error_finds_nothing_of_the_window_left(where: str) -> None:
    """Red when the gradients of the micro-batches before the error stay in the next step."""
    broken: list[int] = []

    def fails(self: Any, *_: Any) -> None:
        if broken:
            raise ArithmeticError("planned")

    if where == "on_gradients":

        def hook(self: Any, run: Any, step: Any) -> None:
            fails(self)
    else:

        def hook(self: Any, run: Any, step: Any, batch: Any) -> None:  # type: ignore[misc]
            fails(self)

    name = "on_gradients" if where == "on_gradients" else "on_batch"
    kind = Kind.GRADIENTS if where == "on_gradients" else Kind.CALLBACKS
    model, other = network(), network()
    session = make_session(
        model, GOOD, plugins=[make_plugin("breaks", kind, **{name: hook})], accumulate=2
    )
    plain = make_session(other, GOOD, accumulate=2)
    session.step(*GOOD[:2])
    plain.step(*GOOD[:2])
    if where == "compute_loss":
        wrong = Batch(X[:10], torch.full((10,), 77))
        with pytest.raises(IndexError):
            session.step(GOOD[2], wrong)
    else:
        broken.append(1)
        with pytest.raises(ArithmeticError):
            session.step(*GOOD[2:])
        broken.clear()
    session.step(*GOOD[2:])
    plain.step(*GOOD[2:])
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
