"""The loop: steps, windows, precision, intervals, requests, and what it costs."""

from __future__ import annotations

import copy
import math
import sys
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_parts import SgdPart, StopAfter, make_plugin, make_session
from ranks import Ranks
from torch import nn

from forge_kernel.contract.data import DataSpec
from forge_kernel.contract.hookspecs import hookimpl
from forge_kernel.contract.plugin import Kind, PluginInfo
from forge_kernel.contract.values import Batch, ScheduleFactors
from forge_kernel.errors import NonFiniteError, OwnershipError, PluginError, RunError
from forge_kernel.planning.plan import HOOKS
from forge_kernel.testing.trial import TrialLoss
from forge_kernel.training.loaders.data_loaders import LoaderData
from forge_kernel.training.loaders.in_memory import NoConfig
from forge_kernel.training.one_process import OneProcess


def batches(count: int, size: int = 6, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Batch(
            torch.randn(size, 4, generator=generator),
            torch.randint(3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


class WeightedLoss:
    """Cross-entropy with sample weights; its weight is a tensor or a number."""

    info = PluginInfo(name="weighted", kind=Kind.LOSS, config=NoConfig)
    config = NoConfig()

    def __init__(self, *, as_tensor: bool) -> None:
        self.as_tensor = as_tensor

    @hookimpl
    def compute_loss(self, run: Any, step: Any, batch: Batch, outputs: Any) -> Any:
        losses = nn.functional.cross_entropy(outputs, batch.targets, reduction="none")
        assert batch.weights is not None
        total = batch.weights.sum()
        mean = (losses * batch.weights).sum() / total.clamp_min(1e-30)
        return mean, total if self.as_tensor else float(total)


def test_one_step_equals_the_bare_loop_bit_for_bit(linear: nn.Module) -> None:
    bare = copy.deepcopy(linear)
    optimizer = torch.optim.SGD(bare.parameters(), lr=0.1)
    session = make_session(linear, batches(1))
    for batch in batches(20, seed=5):
        nn.functional.cross_entropy(bare(batch.inputs), batch.targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        session.step(batch)
    assert all(torch.equal(a, b) for a, b in zip(weights(bare), weights(linear), strict=True))


@pytest.mark.spec("C12")
@given(sizes=st.lists(st.integers(1, 7), min_size=2, max_size=5))
@settings(max_examples=25, deadline=None)
def test_a_window_of_ragged_micro_batches_equals_the_full_batch(sizes: list[int]) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    full = copy.deepcopy(model)
    inputs, targets = torch.randn(sum(sizes), 4), torch.randint(3, (sum(sizes),))
    pieces = list(zip(inputs.split(sizes), targets.split(sizes), strict=True))
    accumulated = make_session(model, batches(1)).step(*(Batch(*piece) for piece in pieces))
    whole = make_session(full, batches(1)).step(Batch(inputs, targets))
    assert torch.allclose(accumulated, whole, rtol=1e-6)
    for mine, theirs in zip(weights(model), weights(full), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("as_tensor", [True, False])
@pytest.mark.parametrize("zero_first", [True, False])
def test_a_weighted_window_equals_the_full_batch(as_tensor: bool, zero_first: bool) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    full = copy.deepcopy(model)
    inputs, targets = torch.randn(12, 4), torch.randint(3, (12,))
    sample_weights = torch.rand(12) * 3
    sample_weights[:4] = 0.0 if zero_first else 0.5
    parts = [
        Batch(inputs[i : i + 4], targets[i : i + 4], sample_weights[i : i + 4])
        for i in range(0, 12, 4)
    ]
    loss = WeightedLoss(as_tensor=as_tensor)
    make_session(model, batches(1), plugins=[loss]).step(*parts)
    loss = WeightedLoss(as_tensor=as_tensor)
    make_session(full, batches(1), plugins=[loss]).step(Batch(inputs, targets, sample_weights))
    for mine, theirs in zip(weights(model), weights(full), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("as_tensor", [True, False])
def test_a_window_of_weight_zero_is_not_a_step(linear: nn.Module, as_tensor: bool) -> None:
    session = make_session(
        linear, batches(1), plugins=[WeightedLoss(as_tensor=as_tensor)],
        optimizer=SgdPart(0.1, weight_decay=0.5),
    )  # fmt: skip
    before = weights(linear)
    batch = batches(1)[0]
    batch.weights = torch.zeros(6)
    session.step(batch)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(linear), strict=True))
    assert session.run.progress.step == 0


def test_the_last_partial_window_of_an_epoch_is_stepped(linear: nn.Module) -> None:
    session = make_session(linear, batches(5), accumulate=2, max_epochs=2, max_steps=None)
    session.train()
    assert session.run.progress.step == 6  # 2 + 2 + 1 micro-batches, twice
    assert session.run.progress.epoch == 2


def test_epochs_are_passes_over_the_data(linear: nn.Module) -> None:
    seen: list[int] = []

    def on_batch(self: Any, run: Any, step: Any, batch: Batch) -> None:
        seen.append(int(batch.inputs[0, 0] * 1e6))

    plugin = make_plugin("watch", Kind.OBSERVERS, on_batch=on_batch)
    session = make_session(linear, batches(4), plugins=[plugin], max_epochs=3, max_steps=None)
    session.train()
    assert seen == seen[:4] * 3
    assert len(set(seen)) == 4


def test_a_run_ends_by_the_clock(linear: nn.Module) -> None:
    begin = time.monotonic()
    session = make_session(linear, batches(4), max_steps=None, max_seconds=0.2)
    session.train()
    assert time.monotonic() - begin >= 0.2
    assert "max_seconds" in session.stop_reason


def test_data_without_a_batch_is_an_error_not_an_endless_loop(linear: nn.Module) -> None:
    session = make_session(linear, LoaderData([]), max_epochs=2, max_steps=None)
    with pytest.raises(RunError, match="no batch"):
        session.train()


class Poison:
    """Data whose batch number `at` holds an infinity."""

    spec = DataSpec(classes=3)
    batches_per_epoch = 30

    def __init__(self, at: int) -> None:
        self.at = at

    def batches(self, epoch: int, place: int) -> Any:
        for index, batch in enumerate(batches(30)):
            if index * len(batch.inputs) < place:
                continue
            if index == self.at:
                batch.inputs[0, 0] = math.inf
            yield batch

    def validation(self) -> list[Batch]:
        return []


def test_a_non_finite_gradient_stops_the_run_before_the_weights_change(linear: nn.Module) -> None:
    session = make_session(linear, Poison(5), non_finite="stop")
    with pytest.raises(NonFiniteError, match=r"step 6: the gradient of weight.*run.non_finite"):
        session.train()
    assert session.run.progress.step == 5
    assert all(bool(torch.isfinite(value).all()) for value in weights(linear))


def test_skipping_drops_the_window_and_counts_it(linear: nn.Module) -> None:
    session = make_session(linear, Poison(5), non_finite="skip", max_epochs=1, max_steps=None)
    session.train()
    assert session.run.progress.step == 29
    assert session.run.progress.skipped == 1
    assert all(bool(torch.isfinite(value).all()) for value in weights(linear))


def test_skipping_for_ever_ends_with_an_error(linear: nn.Module) -> None:
    bad = Batch(torch.full((2, 4), math.nan), torch.zeros(2, dtype=torch.int64))
    session = make_session(linear, [bad], non_finite="skip")
    with pytest.raises(NonFiniteError, match="100 windows in a row"):
        session.train()


def test_rolling_back_takes_the_last_checkpoint_and_goes_on(
    linear: nn.Module, tmp_path: Any
) -> None:
    session = make_session(
        linear, Poison(7), non_finite="rollback", save_every=5, max_epochs=1, max_steps=None,
        folder=tmp_path,
    )  # fmt: skip
    session.train()
    assert session.run.progress.rollbacks == 1
    assert session.run.progress.step == 29 - 2  # steps 6 and 7 are lost, batch 8 is dropped
    assert all(bool(torch.isfinite(value).all()) for value in weights(linear))


def test_with_the_check_off_no_value_is_read_by_the_host(linear: nn.Module) -> None:
    session = make_session(linear, Poison(0), non_finite="off")
    session.step(next(Poison(0).batches(0, 0)))
    assert not bool(torch.isfinite(linear.weight).all())


@pytest.mark.spec("C10", "K8")
def test_half_precision_scales_the_loss_and_filters_see_unscaled_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    reference = copy.deepcopy(model)
    seen: list[torch.Tensor] = []

    def on_gradients(self: Any, run: Any, step: Any) -> None:
        seen.append(step.gradients[0].clone())

    plugin = make_plugin("watch", Kind.GRADIENTS, on_gradients=on_gradients)
    session = make_session(model, batches(1), plugins=[plugin], precision="fp16")
    batch = batches(1)[0]
    session.step(batch)
    nn.functional.cross_entropy(reference(batch.inputs), batch.targets).backward()
    assert reference.weight.grad is not None
    assert torch.allclose(seen[0], reference.weight.grad, atol=2e-3)
    assert session.loss_scale.value == 65536.0


def test_an_overflow_halves_the_loss_scale_and_no_filter_sees_it() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    seen: list[bool] = []

    def on_gradients(self: Any, run: Any, step: Any) -> None:
        seen.append(all(bool(torch.isfinite(g).all()) for g in step.gradients))

    plugin = make_plugin("watch", Kind.GRADIENTS, on_gradients=on_gradients)
    session = make_session(model, batches(1), plugins=[plugin], precision="fp16")
    batch = batches(1)[0]
    batch.inputs *= 60.0  # the scaled gradient leaves half precision's range
    before = weights(model)
    session.step(batch)
    assert session.loss_scale.value == 32768.0
    assert session.run.progress.step == 0
    assert seen == []
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    for _ in range(20):
        session.step(batch)
    assert session.run.progress.step > 0
    assert all(seen)


@pytest.mark.spec("C10", "K8")
def test_bf16_computes_in_bf16_and_keeps_weights_in_fp32() -> None:
    dtypes: list[torch.dtype] = []

    class Watch(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            outputs = super().forward(inputs)
            dtypes.append(outputs.dtype)
            return outputs

    model = Watch(4, 3)
    make_session(model, batches(1), precision="bf16").step(batches(1)[0])
    assert dtypes == [torch.bfloat16]
    assert model.weight.dtype is torch.float32


def test_rates_are_factors_of_each_groups_own_rate(linear: nn.Module) -> None:
    class TwoGroups(SgdPart):
        @hookimpl
        def make_optimizer(self, run: Any, parameters: Any) -> torch.optim.Optimizer:
            (_, weight), (_, bias) = parameters
            return torch.optim.SGD(
                [{"params": [weight], "lr": 0.4}, {"params": [bias], "lr": 0.1}],
                lr=1.0, momentum=0.8,
            )  # fmt: skip

    def compute_schedule_factors(self: Any, run: Any, step: Any) -> ScheduleFactors:
        return ScheduleFactors(0.5, 0.25)

    schedule = make_plugin("half", Kind.SCHEDULE, compute_schedule_factors=compute_schedule_factors)
    session = make_session(linear, batches(1), plugins=[schedule], optimizer=TwoGroups())
    session.step(batches(1)[0])
    assert [group["lr"] for group in session.run.optimizer.param_groups] == [0.2, 0.05]
    assert [group["momentum"] for group in session.run.optimizer.param_groups] == [0.2, 0.2]


def test_a_regularizer_joins_the_loss_once_in_a_window(linear: nn.Module) -> None:
    calls: list[int] = []

    def regularize(self: Any, run: Any, step: Any) -> torch.Tensor:
        calls.append(step.number)
        return 0.5 * sum(p.square().sum() for _, p in run.named_parameters())  # type: ignore[return-value]

    plugin = make_plugin("ridge", Kind.REGULARIZERS, regularize=regularize)
    other = copy.deepcopy(linear)
    pieces = batches(2)
    make_session(linear, batches(1), plugins=[plugin]).step(*pieces)
    losses = [nn.functional.cross_entropy(other(b.inputs), b.targets) for b in pieces]
    total = sum(losses) / 2 + 0.5 * sum(p.square().sum() for p in other.parameters())
    total.backward()  # type: ignore[union-attr]
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert calls == [1]
    for mine, theirs in zip(weights(linear), weights(other), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


def test_validation_leaves_every_modules_mode_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    data = LoaderData(batches(2), batches(2))
    session = make_session(model, data)
    model[1].eval()  # the user froze one part
    session.validate()
    assert model.training
    assert not model[1].training
    assert torch.is_grad_enabled()


def test_the_validation_loss_is_over_the_whole_set_not_a_mean_of_means(linear: nn.Module) -> None:
    uneven = [batches(1, 9, seed=1)[0], batches(1, 1, seed=2)[0]]
    metrics = make_session(linear, LoaderData(batches(1), uneven)).validate()
    inputs = torch.cat([batch.inputs for batch in uneven])
    targets = torch.cat([batch.targets for batch in uneven])
    whole = nn.functional.cross_entropy(linear(inputs), targets)
    assert metrics["loss"] == pytest.approx(whole.item(), rel=1e-6)


def recorder(events: list[str]) -> list[Any]:
    """Plugins that listen to every hook and write down its name."""

    def note(hook: str, answer: Any = None) -> Any:
        scope: dict[str, Any] = {"events": events, "answer": answer}
        import inspect

        from forge_kernel.contract import hookspecs

        arguments = ", ".join(inspect.signature(getattr(hookspecs, hook)).parameters)
        exec(
            f"def {hook}(self, {arguments}):\n    events.append('{hook}')\n    return answer({arguments})\n",
            scope,
        )
        return scope[hook]

    def silent(*_: Any) -> None:
        return None

    policy = [
        hook for hook in HOOKS
        if hook.startswith("on_")
        or hook in ("log_metrics", "regularize", "export", "make_modules", "unfinished", "check_export")
    ]  # fmt: skip
    answers: dict[str, Any] = dict.fromkeys(policy, silent)
    answers["log_metrics"] = lambda run, step: {}
    answers["make_modules"] = lambda run: {}
    answers["export"] = lambda run, folder: {}
    answers["transform_data"] = lambda run, data: data
    answers["transform_model"] = lambda run, model: model
    answers["make_metrics"] = lambda run: []
    answers["compute_outputs"] = lambda run, step, batch: run.active_model(batch.inputs)
    answers["compute_evaluation_model"] = lambda run: run.model
    hooks = {hook: note(hook, answer) for hook, answer in answers.items()}
    answers["on_run_start"] = lambda run: run.emit_event("began", "The run began.", number=1)
    hooks["on_run_start"] = note("on_run_start", answers["on_run_start"])
    clock = {"compute_phase": note("compute_phase", lambda run, step: f"phase {step.number}")}
    rates = {
        "compute_schedule_factors": note(
            "compute_schedule_factors", lambda run, step: ScheduleFactors()
        )
    }
    return [
        make_plugin("everything", Kind.CALLBACKS, **hooks),
        make_plugin("clock", Kind.PHASES, **clock),
        make_plugin("rates", Kind.SCHEDULE, **rates),
    ]


@pytest.mark.spec("J9")
def test_every_event_comes_in_its_documented_order(linear: nn.Module, tmp_path: Any) -> None:
    events: list[str] = []
    data = LoaderData(batches(3), batches(1))
    session = make_session(
        linear, data, plugins=recorder(events), accumulate=2, max_epochs=1, max_steps=None,
        validate_every=1, log_every=1, save_every=2, folder=tmp_path,
    )  # fmt: skip
    micro = ["on_batch", "compute_outputs", "on_outputs"]
    end = [
        "regularize", "on_gradients", "compute_schedule_factors", "on_weights", "on_weights_changed",
        "on_step_end",
    ]  # fmt: skip
    validation = ["compute_evaluation_model", "compute_outputs", "unfinished", "on_validation"]
    due = [*validation, "log_metrics", "on_log"]
    phase = ["compute_phase", "on_phase_change"]
    assert events == [
        "transform_data", "make_modules", "transform_model", "make_metrics",
        "check_export", "on_run_start", "on_event",
    ]  # fmt: skip
    events.clear()
    session.train()
    assert events == [
        *phase, *micro, *micro, *end, *due,
        *phase, *micro, *end, *due, "on_checkpoint", "on_epoch_end",
    ]  # fmt: skip
    events.clear()
    session.finish()
    assert events == ["unfinished", "compute_evaluation_model", "export"]


class Weighed(TrialLoss):
    """A loss that tells the weights of its terms."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    @hookimpl
    def compute_loss_weights(self, run: Any, batch: Batch) -> list[Any]:
        self.events.append("compute_loss_weights")
        return []


def test_every_hook_is_called_in_a_run_and_described_in_the_book(tmp_path: Any) -> None:
    """A hook without a call or without a word on what it may write is a defect."""
    from forge_kernel import run
    from forge_kernel.contract import hookspecs
    from forge_kernel.testing.trial import TrialData, TrialModel, TrialOptimizer

    events: list[str] = []
    pipeline = pipeline_of(max_steps=2, save_every=1)
    parts = [TrialData(tokens=False), TrialModel(), TrialOptimizer(), TrialLoss()]
    run(pipeline, plugins=[*parts, *recorder(events)], output_dir=tmp_path / "a", quiet=True)
    several = pipeline_of(max_steps=1, accumulate=2)
    parts = [TrialData(tokens=False), TrialModel(), TrialOptimizer(), Weighed(events)]
    run(several, plugins=parts, output_dir=tmp_path / "c", quiet=True)

    def broken(self: Any, run: Any, step: Any) -> None:
        raise ArithmeticError("planned")

    bad = make_plugin("bad", Kind.CALLBACKS, on_step_end=broken)
    parts = [TrialData(tokens=False), TrialModel(), TrialOptimizer(), TrialLoss()]
    with pytest.raises(ArithmeticError, match="planned"):
        run(pipeline, plugins=[*parts, *recorder(events), bad], output_dir=tmp_path / "b")
    answered = {"make_data", "make_model", "make_optimizer", "compute_loss"}  # by the parts
    missing = set(HOOKS) - set(events) - answered - {"on_epoch_end"}  # the order test has that
    assert missing == set()
    for hook in HOOKS:
        text = getattr(hookspecs, hook).__doc__ or ""
        assert "May write:" in " ".join(text.split()), f"{hook} does not say what it may write"


def pipeline_of(**options: Any) -> Any:
    from forge_kernel.config.pipeline import PipelineConfig
    from forge_kernel.contract.run_config import RunConfig

    return PipelineConfig(run=RunConfig(**{"device": "cpu", **options}))


def counted_step(session: Any, batch: Batch) -> tuple[dict[str, int], int, set[str]]:
    """Python calls by name, reads by the host, and modules entered, in one step."""
    calls: dict[str, int] = {}
    modules: set[str] = set()
    reads = 0

    def watch(frame: Any, event: str, argument: Any) -> None:
        nonlocal reads
        if event == "call":
            name = frame.f_code.co_name
            calls[name] = calls.get(name, 0) + 1
            caller = frame.f_back.f_globals.get("__name__", "") if frame.f_back else ""
            if caller.startswith("forge_"):  # torch's own optimizer asks torch's own logger
                modules.add(frame.f_globals.get("__name__", "").partition(".")[0])
        elif event == "c_call" and argument.__name__ in ("item", "tolist", "__bool__", "__float__"):
            reads += 1

    sys.setprofile(watch)
    try:
        session.step(batch)
    finally:
        sys.setprofile(None)
    return calls, reads, modules


@pytest.mark.spec("J9")
def test_a_step_calls_each_listener_once_and_nobody_else(linear: nn.Module) -> None:
    events: list[str] = []
    quiet = make_session(copy.deepcopy(linear), batches(1))
    loud = make_session(linear, batches(1), plugins=recorder(events))
    batch = batches(1)[0]
    for session in (quiet, loud):
        session.step(batch)
        session.step(batch)
    calls, reads, modules = counted_step(quiet, batch)
    hooks_called = {name: calls[name] for name in HOOKS if name in calls}
    assert hooks_called == {"compute_loss": 1}, "an event without listeners costs a call"
    assert reads == 1, "one host read in a step: the finite flag"
    assert not modules & {"pluggy", "logging", "structlog", "json", "rich"}
    calls, reads, modules = counted_step(loud, batch)
    per_step = {
        "on_batch", "compute_outputs", "on_outputs", "compute_loss", "regularize", "on_gradients",
        "compute_schedule_factors", "on_weights", "on_weights_changed", "on_step_end", "compute_phase",
        "on_phase_change",
    }  # fmt: skip
    assert {name: calls[name] for name in HOOKS if name in calls} == dict.fromkeys(per_step, 1)
    assert reads == 1
    assert "pluggy" not in modules


def test_without_the_check_nothing_is_read(linear: nn.Module) -> None:
    session = make_session(linear, batches(1), non_finite="off")
    batch = batches(1)[0]
    session.step(batch)
    assert counted_step(session, batch)[1] == 0


def test_run_is_sealed_after_set_up(linear: nn.Module) -> None:
    session = make_session(linear, batches(1))
    with pytest.raises(AttributeError, match="sealed"):
        session.run.model = linear


def test_an_unknown_request_is_refused(linear: nn.Module) -> None:
    session = make_session(linear, batches(1))
    with pytest.raises(ValueError, match="stop, save, restore or validate"):
        session.run.request("explode")  # type: ignore[arg-type]


def test_a_request_to_stop_is_served_after_all_listeners(linear: nn.Module) -> None:
    told: list[int] = []

    def ask(self: Any, run: Any, step: Any) -> None:
        if step.number == 3:
            run.request("stop", reason="enough")

    def late(self: Any, run: Any, step: Any) -> None:
        told.append(step.number)

    plugins = [
        make_plugin("ask", Kind.CALLBACKS, on_step_end=ask),
        make_plugin("late", Kind.OBSERVERS, on_step_end=late),
    ]
    session = make_session(linear, batches(4), plugins=plugins)
    session.train()
    assert told == [1, 2, 3]
    assert session.stop_reason == "enough"


def test_a_cancel_stops_at_the_next_steps_edge(linear: nn.Module) -> None:
    stop = StopAfter(4)
    session = make_session(linear, batches(10), plugins=[stop], cancel=stop)
    session.train()
    assert session.run.progress.step == 4
    assert session.cancelled


@pytest.mark.parametrize("what", ["weights", "gradients", "rates"])
def test_checked_mode_names_the_plugin_that_wrote_what_it_does_not_own(
    linear: nn.Module, what: str
) -> None:
    def write(self: Any, run: Any, step: Any) -> None:
        if what == "weights":
            next(iter(run.parameters.values())).data.add_(1.0)
        elif what == "gradients":
            step.gradients[0].zero_()
        else:
            run.optimizer.param_groups[0]["lr"] = 7.0

    culprit = make_plugin("culprit", Kind.CALLBACKS, on_step_end=write)
    session = make_session(linear, batches(1), plugins=[culprit], checked=True)
    with pytest.raises(OwnershipError, match=r"culprit wrote .* in on_step_end"):
        session.step(batches(1)[0])


def test_a_transform_that_returns_nothing_is_named(linear: nn.Module) -> None:
    def transform_model(self: Any, run: Any, model: Any) -> None:
        return None

    plugin = make_plugin("forgetful", Kind.WRAPPERS, transform_model=transform_model)
    with pytest.raises(PluginError, match=r"forgetful .* in transform_model .* returned None"):
        make_session(linear, batches(1), plugins=[plugin])


def test_an_error_in_a_hook_keeps_its_type_and_names_plugin_hook_and_step(tmp_path: Any) -> None:
    from forge_kernel import run
    from forge_kernel.testing.trial import TrialData, TrialLoss, TrialModel, TrialOptimizer

    def broken(self: Any, run: Any, step: Any) -> None:
        if step.number == 3:
            {}["missing"]

    bad = make_plugin("bad", Kind.CALLBACKS, on_step_end=broken)
    parts = [TrialData(tokens=False), TrialModel(), TrialOptimizer(), TrialLoss(), bad]
    with pytest.raises(KeyError) as caught:
        run(pipeline_of(max_steps=5), plugins=parts, output_dir=tmp_path / "run")
    notes = "\n".join(caught.value.__notes__)
    assert "bad" in notes
    assert "on_step_end" in notes
    import json

    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["outcome"] == "failed"
    assert "KeyError" in result["error"]
    log = [json.loads(line) for line in (tmp_path / "run" / "forge.log").read_text().splitlines()]
    assert any("Traceback" in line.get("exception", "") for line in log)


def test_update_without_a_micro_batch_is_an_error(linear: nn.Module) -> None:
    with pytest.raises(RunError, match="accumulate"):
        make_session(linear, batches(1)).update()


def test_a_parameter_unfrozen_later_is_trained(linear: nn.Module) -> None:
    linear.bias.requires_grad_(False)
    session = make_session(linear, batches(1))
    before = linear.bias.clone()
    session.step(batches(1)[0])
    assert torch.equal(before, linear.bias)
    linear.bias.requires_grad_(True)
    session.step(batches(1)[0])
    assert not torch.equal(before, linear.bias)


def test_validation_metrics_are_over_all_ranks_also_where_a_share_is_empty(
    linear: nn.Module,
) -> None:
    """Red when a rank without a batch does not add up: the other one waits for ever."""
    whole = batches(3)
    models = [copy.deepcopy(linear) for _ in range(2)]

    def rank_with(model: nn.Module, share: list[Batch]) -> Any:
        def call(add: Any) -> dict[str, float]:
            strategy = OneProcess()
            strategy.world_size = 2
            strategy.reduce = add  # type: ignore[method-assign]
            data = LoaderData(batches(1), share)
            session = make_session(model, data, optimizer=SgdPart(), strategy=strategy)
            return session.validate()

        return call

    alone = make_session(linear, LoaderData(batches(1), whole)).validate()
    for shares in ([whole[:1], whole[1:]], [[], whole], [whole, []]):
        calls = [rank_with(model, share) for model, share in zip(models, shares, strict=True)]
        for found in Ranks(2).run(calls):
            assert found["loss"] == pytest.approx(alone["loss"])
    assert Ranks(2).run([rank_with(model, []) for model in models]) == [{}, {}]
