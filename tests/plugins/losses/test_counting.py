"""What counts is counted once: every loss, alone and nested, by whole batches and micro-batches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_parts import SgdPart, make_plugin, make_session
from torch import Tensor, nn
from torch.nn import functional

from forge_kernel.config.use import UseLoss, UseQuantizer, UseValidator
from forge_kernel.contract.data import DataSpec
from forge_kernel.contract.plugin import Kind
from forge_kernel.contract.values import Batch
from forge_kernel.errors import PluginError, RunError
from forge_kernel.training.loaders.data_loaders import LoaderData

CLASSES, FEATURES, SAMPLES, LENGTH = 4, 5, 9, 3


class Network(nn.Module):
    """Samples that do not see each other: logits, numbers, or both by name; or of each token."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.embedding = nn.Embedding(7, FEATURES)
        self.trunk = nn.Linear(FEATURES, 6)
        self.kind = nn.Linear(6, CLASSES)
        self.size = nn.Linear(6, 2)

    def forward(self, inputs: Tensor) -> Any:
        hidden = self.embedding(inputs) if self.form == "tokens" else inputs
        hidden = self.trunk(hidden).tanh()
        if self.form == "numbers":
            return self.size(hidden)
        if self.form == "tasks":
            return {
                "kind": self.kind(hidden),
                "size": self.size(hidden),
                "again": self.kind(hidden),
            }
        return self.kind(hidden)


CE: dict[str, Any] = {"use": "cross_entropy"}
WEIGHED = {"use": "cross_entropy", "with": {"class_weights": [1.0, 5.0, 0.5, 2.0]}}
TASKS = {"kind": WEIGHED, "size": {"use": "regression"}, "again": CE}
LOSSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "cross_entropy": ("classes", "cross_entropy", {}),
    "smoothed": ("classes", "cross_entropy", {"label_smoothing": 0.1}),
    "class weights": ("classes", "cross_entropy", WEIGHED["with"]),
    "focal": ("classes", "cross_entropy", {"focal_gamma": 2.0, **WEIGHED["with"]}),
    "stablemax": ("classes", "cross_entropy", {"activation": "stablemax"}),
    "tokens": ("tokens", "cross_entropy", {}),
    "tokens, class weights": ("tokens", "cross_entropy", WEIGHED["with"]),
    "tokens in pieces": ("tokens", "language_model", {"head": "kind", "piece": 4}),
    "numbers": ("numbers", "regression", {}),
    "huber": ("numbers", "regression", {"distance": "huber", "delta": 0.3}),
    "teacher": ("classes", "distillation", {"hidden": ["trunk"], "loss": CE}),
    "teacher, class weights": ("classes", "distillation", {"loss": WEIGHED}),
    "teacher of tokens": ("tokens", "distillation", {"hidden": ["trunk"], "loss": CE}),
    "tasks": ("tasks", "multi_task", {"tasks": TASKS, "weights": {"size": 0.3}}),
    "uncertain tasks": ("tasks", "multi_task", {"tasks": TASKS, "weighting": "uncertainty"}),
    "adaptive tasks": ("tasks", "multi_task", {"tasks": TASKS, "weighting": "adaptive"}),
    "its own teacher": ("classes", "consistency", {"weight": 0.7, "loss": WEIGHED}),
    "its own teacher of tokens": ("tokens", "consistency", {"weight": 0.7, "loss": CE}),
    "its own teacher of a task": (
        "classes", "multi_task", {"tasks": {"main": {"use": "consistency", "with": {"loss": WEIGHED}}}}
    ),
    "margin": ("classes", "margin", {}),
    "margin of tasks": (
        "classes", "multi_task", {"tasks": {"main": {"use": "margin"}, "other": CE}}
    ),
    "teacher of a task": (
        "classes", "multi_task", {"tasks": {"main": {"use": "distillation", "with": {"loss": WEIGHED}}}}
    ),
}  # fmt: skip


def made(form: str, seed: int, *, weights: str, ignored: int) -> Batch:
    """A batch; some targets are the ignored one, some samples weigh nothing."""
    generator = torch.Generator().manual_seed(seed)
    shape = (SAMPLES, LENGTH) if form == "tokens" else (SAMPLES,)
    inputs = torch.randn(SAMPLES, FEATURES, generator=generator)
    if form == "tokens":
        inputs = torch.randint(7, shape, generator=generator)

    def labels() -> Tensor:
        found = torch.randint(CLASSES, shape, generator=generator)
        return found.masked_fill(torch.rand(shape, generator=generator) < 0.4, ignored)

    numbers = torch.randn(SAMPLES, 2, generator=generator)
    targets: Any = {
        "classes": labels, "tokens": labels, "numbers": lambda: numbers,
        "tasks": lambda: {"kind": labels(), "size": numbers, "again": labels()},
    }[form]()  # fmt: skip
    own = torch.rand(SAMPLES, generator=generator).round(decimals=2)
    chosen = {"none": None, "some": own.masked_fill(own < 0.4, 0.0), "zeros": torch.zeros(SAMPLES)}
    return Batch(inputs, targets, chosen[weights])


def rows(value: Any, chosen: slice) -> Any:
    if isinstance(value, dict):
        return {name: part[chosen] for name, part in value.items()}
    return None if value is None else value[chosen]


def cut(batch: Batch, sizes: list[int]) -> list[Batch]:
    found, begin = [], 0
    for size in sizes:
        chosen = slice(begin, begin + size)
        parts = (rows(part, chosen) for part in (batch.inputs, batch.targets, batch.weights))
        found.append(Batch(*parts))
        begin += size
    return found


def counts(batch: Batch) -> Tensor:
    """Which samples count in any way, shape (samples,)."""
    weights = torch.ones(SAMPLES) if batch.weights is None else batch.weights
    targets = batch.targets
    if isinstance(targets, Tensor) and not targets.is_floating_point():
        real = (targets != -100).reshape(SAMPLES, -1).any(1)
        return (weights > 0) & real
    return weights > 0


def step(
    name: str, *batches: Batch, steps: int = 1, **options: Any
) -> tuple[dict[str, Tensor], list[float]]:
    """All weights after optimizer steps on the same micro-batches, and the losses."""
    form, use, config = LOSSES[name]
    torch.manual_seed(0)
    model = Network(form)
    quantizer = (
        {"quantizer": UseQuantizer("bitnet", {"skip": ["kind"]})} if "teacher" in name else {}
    )
    session = make_session(
        model, LoaderData([], spec=DataSpec(classes=CLASSES)), optimizer=SgdPart(0.1), own_loss=True,
        uses={"loss": UseLoss(use, config), **quantizer}, accumulate=len(batches), **options,
    )  # fmt: skip
    losses = [float(session.step(*copy.deepcopy(batches))) for _ in range(steps)]
    return {key: value.detach().clone() for key, value in session.run.parameters.items()}, losses


def same(one: tuple[Any, Any], other: tuple[Any, Any], tolerance: float = 1e-6) -> None:
    for name, value in one[0].items():
        torch.testing.assert_close(other[0][name], value, atol=tolerance, rtol=0, msg=name)
    assert other[1] == pytest.approx(one[1], rel=1e-5, abs=1e-6)


@pytest.mark.spec("C3", "F9")
@pytest.mark.parametrize("name", LOSSES)
@given(seed=st.integers(0, 10**6), weights=st.sampled_from(["none", "some"]), data=st.data())
@settings(max_examples=6, deadline=None)
def test_any_split_into_micro_batches_is_the_whole_batchs_step(
    name: str, seed: int, weights: str, data: st.DataObject
) -> None:
    batch = made(LOSSES[name][0], seed, weights=weights, ignored=-100)
    first = data.draw(st.integers(1, SAMPLES - 2))
    second = data.draw(st.integers(1, SAMPLES - first - 1))
    sizes = [first, second, SAMPLES - first - second]
    same(step(name, batch, steps=3), step(name, *cut(batch, sizes), steps=3))


@pytest.mark.parametrize("name", [*LOSSES])
@given(seed=st.integers(0, 10**6), weights=st.sampled_from(["none", "some"]))
@settings(max_examples=6, deadline=None)
def test_a_sample_that_counts_for_nothing_changes_no_weight(
    name: str, seed: int, weights: str
) -> None:
    """Red when a teacher is asked about padding, or a loss takes its own mean."""
    form = LOSSES[name][0]
    batch = made(form, seed, weights=weights, ignored=-100)
    nothing = ~counts(batch)
    other = copy.deepcopy(batch)
    other.inputs[nothing] = (other.inputs[nothing] + 3) % 7 if form == "tokens" else 9.0
    same(step(name, batch), step(name, other))


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_in_which_nothing_counts_teaches_nothing(name: str) -> None:
    batch = made(LOSSES[name][0], 1, weights="zeros", ignored=-100)
    weights, losses = step(name, batch)
    torch.manual_seed(0)
    for key, value in Network(LOSSES[name][0]).named_parameters():
        assert torch.equal(weights[key], value)
    assert losses == [0.0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_weights_of_samples_are_those_of_so_many_copies(precision: str) -> None:
    batch = made("classes", 3, weights="none", ignored=-100)
    copies = torch.arange(SAMPLES) % 3
    weighed = Batch(batch.inputs, batch.targets, copies.float())
    repeated = Batch(
        batch.inputs.repeat_interleave(copies, 0), batch.targets.repeat_interleave(copies, 0)
    )
    tolerance = 1e-6 if precision == "fp32" else 1e-3
    same(
        step("smoothed", weighed, precision=precision),
        step("smoothed", repeated, precision=precision), tolerance,
    )  # fmt: skip


def test_another_target_may_be_the_one_that_counts_for_nothing() -> None:
    """`run.ignore_index`; then -100 is a wrong label again."""
    batch = made("classes", 5, weights="none", ignored=2)
    kept = batch.targets != 2
    alone = Batch(batch.inputs[kept], batch.targets[kept])
    same(step("smoothed", alone), step("smoothed", batch, ignore_index=2))
    wrong = Batch(batch.inputs, batch.targets.masked_fill(~kept, -100))
    with pytest.raises(IndexError):
        step("smoothed", wrong, ignore_index=2)


@pytest.mark.parametrize("whole", [False, True], ids=["float", "int64"])
def test_minus_100_among_numbers_is_a_number(whole: bool) -> None:
    inputs = torch.randn(4, FEATURES, generator=torch.Generator().manual_seed(1))
    targets = torch.tensor([[-100.0, 1.0], [2.0, -100.0], [3.0, 4.0], [-100.0, -100.0]])
    torch.manual_seed(0)
    model = Network("numbers")
    expected = functional.mse_loss(model(inputs), targets)
    _, losses = step("numbers", Batch(inputs, targets.long() if whole else targets))
    assert losses == pytest.approx([float(expected.detach())], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "outputs", "targets"),
    [
        ("regression", (5, 3), (3, 5)), ("regression", (4, 6), (4, 3, 2)), ("regression", (6,), (2, 3)),
        ("cross_entropy", (2, 3, CLASSES), (3, 2)), ("cross_entropy", (5, CLASSES), (4,)),
    ],
)  # fmt: skip
def test_answers_and_targets_that_lie_otherwise_are_refused(
    name: str, outputs: tuple[int, ...], targets: tuple[int, ...]
) -> None:
    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.answers = nn.Parameter(torch.zeros(outputs))

        def forward(self, inputs: Tensor) -> Tensor:
            return self.answers * inputs.sum()

    wanted = (
        torch.zeros(targets) if name == "regression" else torch.zeros(targets, dtype=torch.int64)
    )
    batch = Batch(torch.ones(len(wanted)), wanted)
    session = make_session(
        Given(), LoaderData([], spec=DataSpec(classes=CLASSES)), own_loss=True,
        uses={"loss": UseLoss(name)},
    )  # fmt: skip
    with pytest.raises(PluginError, match="targets"):
        session.step(batch)


def test_a_function_that_gives_one_number_counts_with_its_targets() -> None:
    """As torch's own losses, which pass over -100: two micro-batches are the whole batch."""

    def compute_loss(self: Any, run: Any, step: Any, batch: Batch, outputs: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, batch.targets)

    def weights_after(*batches: Batch) -> Tensor:
        torch.manual_seed(0)
        model = nn.Linear(FEATURES, CLASSES)
        plugins = [make_plugin("mine", Kind.LOSS, compute_loss=compute_loss)]
        session = make_session(
            model, [Batch(torch.zeros(1), torch.zeros(1))], plugins=plugins, accumulate=len(batches)
        )
        session.step(*batches)
        return model.weight.detach()

    batch = made("classes", 9, weights="none", ignored=-100)
    whole, parts = weights_after(batch), weights_after(*cut(batch, [2, 7]))
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)
    bare = nn.Linear(FEATURES, CLASSES)
    torch.manual_seed(0)
    bare.reset_parameters()
    functional.cross_entropy(bare(batch.inputs), batch.targets).backward()
    expected = torch.add(bare.weight.detach(), bare.weight.grad, alpha=-0.1)
    assert torch.equal(whole, expected), "one micro-batch is the bare loop's step, to the bit"


def test_a_run_of_targets_that_all_count_for_nothing_ends_with_a_word(tmp_path: Any) -> None:
    """Red when it waits for a step that never comes."""
    empty = Batch(torch.ones(3, FEATURES), torch.full((3,), -100))
    for batches in ([empty] * 3, [empty] * 400):
        session = make_session(
            nn.Linear(FEATURES, CLASSES), LoaderData(batches, spec=DataSpec(classes=CLASSES)),
            uses={"loss": UseLoss("cross_entropy")}, own_loss=True, max_steps=5,
        )  # fmt: skip
        with pytest.raises(RunError, match=r"cross_entropy has nothing to learn.*\(-100\)"):
            session.train()


VALIDATORS: dict[str, tuple[str, dict[str, Any]]] = {
    "classification": (
        "classes", {"top_k": [2], "by_class": ["f1", "precision", "recall", "f1_weighted", "f1_micro"]}
    ),
    "language_model": ("tokens", {}),
    "regression": ("numbers", {}),
}  # fmt: skip


def validated(name: str, batches: list[Batch], spoil: Any = None) -> dict[str, float]:
    form, config = VALIDATORS[name]
    torch.manual_seed(0)
    model = Network(form)
    loss = "regression" if form == "numbers" else "cross_entropy"
    session = make_session(
        model, LoaderData([], batches, DataSpec(classes=CLASSES)), own_loss=True,
        uses={"loss": UseLoss(loss), "validators": (UseValidator(name, config),)},
    )  # fmt: skip
    if spoil is not None:
        model.register_forward_hook(lambda module, inputs, outputs: outputs * spoil)
    return session.validate()


@pytest.mark.parametrize("name", VALIDATORS)
@given(
    seed=st.integers(0, 10**6), weights=st.sampled_from(["none", "some"]), first=st.integers(1, 8)
)
@settings(max_examples=10, deadline=None)
def test_metrics_are_of_what_counts_however_batches_are_cut(
    name: str, seed: int, weights: str, first: int
) -> None:
    form = VALIDATORS[name][0]
    batch = made(form, seed, weights=weights, ignored=-100)
    whole = validated(name, [batch])
    assert validated(name, cut(batch, [first, SAMPLES - first])) == pytest.approx(whole, rel=1e-5)
    other = copy.deepcopy(batch)
    nothing = ~counts(batch)
    other.inputs[nothing] = (other.inputs[nothing] + 3) % 7 if form == "tokens" else 9.0
    assert validated(name, [other]) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("name", VALIDATORS)
def test_the_metrics_of_answers_that_are_no_numbers_are_none(name: str) -> None:
    """Red when the accuracy of NaN is the share of the first class."""
    batch = made(VALIDATORS[name][0], 1, weights="none", ignored=-100)
    found = validated(name, [batch], spoil=torch.nan)
    assert found, "metrics are there"
    assert all(value != value or value == torch.inf for value in found.values()), found
