"""Metrics of classes: against scikit-learn's definitions, over uneven batches and ranks."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_parts import make_session
from ranks import Ranks, computed
from torch import Tensor, nn

from forge_kernel.config.schema import bind_config
from forge_kernel.config.use import UseValidator
from forge_kernel.contract.data import DataSpec
from forge_kernel.contract.values import Batch
from forge_kernel.errors import ConfigError
from forge_kernel.planning.pipeline_file import load_pipeline
from forge_kernel.runner import run
from forge_kernel.training.loaders.data_loaders import LoaderData
from forge_plugins.mathematics.metrics.classification import (
    BY_CLASS,
    class_counts,
    class_metrics,
    hit_counts,
)
from forge_plugins.mathematics.metrics.label_positions import answer_rows, number_pairs
from forge_plugins.validators.classification import (
    AccuracyMetric,
    ClassificationConfig,
    ClassMetric,
    TrainingAccuracy,
    metrics,
)

ZERO = torch.zeros(())


def reference(answers: list[int], targets: list[int]) -> dict[str, float]:
    """The definitions, class by class, in plain Python."""
    each = {}
    for label in sorted(set(answers) | set(targets)):
        hit = sum(a == t == label for a, t in zip(answers, targets, strict=True))
        said, there = answers.count(label), targets.count(label)
        precision, recall = hit / said if said else 0.0, hit / there if there else 0.0
        f1 = 2 * precision * recall / (precision + recall) if hit else 0.0
        each[label] = (f1, precision, recall, there)
    f1, precision, recall, there = zip(*each.values(), strict=True)
    share = sum(a == t for a, t in zip(answers, targets, strict=True)) / len(targets)
    return {
        "f1": sum(f1) / len(f1),
        "precision": sum(precision) / len(precision),
        "recall": sum(recall) / len(recall),
        "f1_micro": share,
        "precision_micro": share,
        "recall_micro": share,
        "f1_weighted": sum(f * t for f, t in zip(f1, there, strict=True)) / len(targets),
    }


def drawn(samples: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, classes, generator=generator)
    return logits, torch.randint(max(1, classes - 1), (samples,), generator=generator)


def fed(metric: Any, logits: Tensor, targets: Tensor, cuts: list[int], ignored: int = -100) -> Any:
    metric.reset()
    for begin, end in pairwise(cuts):
        batch = Batch(None, targets[begin:end], ignore_index=ignored)
        metric.update(batch, logits[begin:end], ZERO, 1.0)
    return metric


@pytest.mark.spec("H6", "H7")
@given(
    samples=st.integers(1, 40), classes=st.integers(1, 7), seed=st.integers(0, 10_000),
    share=st.floats(0, 1), data=st.data(),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_the_metrics_of_two_ranks_with_uneven_batches_are_those_of_the_whole_set(
    samples: int, classes: int, seed: int, share: float, data: st.DataObject
) -> None:
    """Red when a rank's metrics are averaged, and when a rank without a batch adds nothing up."""
    logits, targets = drawn(samples, classes, seed)
    cut = round(samples * share)
    first = sorted({0, cut, *data.draw(st.lists(st.integers(0, cut), max_size=3))})
    whole = reference(logits.argmax(1).tolist(), targets.tolist())
    metrics = [
        fed(ClassMetric(BY_CLASS), logits, targets, first if cut else []),
        fed(ClassMetric(BY_CLASS), logits, targets, [cut, samples] if cut < samples else []),
    ]
    assert computed(metrics) == pytest.approx(whole)
    shares = [
        fed(AccuracyMetric((2,)), logits, targets, first if cut else []),
        fed(AccuracyMetric((2,)), logits, targets, [cut, samples] if cut < samples else []),
    ]
    likely = logits.topk(min(2, classes)).indices
    assert computed(shares) == pytest.approx(
        {
            "accuracy": whole["f1_micro"],
            "top_2_accuracy": float((likely == targets[:, None]).any(1).double().mean()),
        }
    )


def test_without_a_target_anywhere_there_is_no_metric() -> None:
    for several in ([ClassMetric(BY_CLASS), ClassMetric(BY_CLASS)], [AccuracyMetric((2,))] * 1):
        assert computed(several) == {}
    logits, targets = torch.zeros(2, 3), torch.tensor([-1, -1])
    assert computed([fed(ClassMetric(BY_CLASS), logits, targets, [0, 2], ignored=-1)]) == {}
    assert computed([fed(AccuracyMetric(()), logits, targets, [0, 2], ignored=-1)]) == {}


def test_an_ignored_target_counts_as_nothing() -> None:
    logits, targets = drawn(20, 4, 3)
    padded = targets.clone()
    padded[::3] = -100
    kept = padded != -100
    expected = reference(logits.argmax(1)[kept].tolist(), targets[kept].tolist())
    counts = class_counts(logits, padded, kept.float())
    assert class_metrics(counts) == pytest.approx(expected)
    hits, total = hit_counts(logits, padded, (1,), kept.float()).tolist()
    assert (hits / total, total) == (pytest.approx(expected["f1_micro"]), int(kept.sum()))


@pytest.mark.parametrize("weights", [None, [0.0, 1.0], [0.5, 2.0]])
def test_a_target_that_counts_and_is_no_class_is_refused(weights: list[float] | None) -> None:
    """Red when it is counted as an ignored one."""
    counts = None if weights is None else torch.tensor(weights)
    with pytest.raises(ValueError, match="a target is 3, and the classes are 0 to 2"):
        class_counts(torch.zeros(2, 3), torch.tensor([0, 3]), counts)
    with pytest.raises(ValueError, match="a target is below 0"):
        class_counts(torch.zeros(2, 3), torch.tensor([0, -1]), counts)


@pytest.mark.parametrize(
    ("row", "spoilt"),
    [
        ([math.nan, 0.0, 1.0], True),
        ([math.inf, 0.0, 1.0], True),
        ([-math.inf] * 3, True),
        ([-math.inf, 0.0, 1.0], False),  # a class that is ruled out
    ],
)
@pytest.mark.parametrize("weight", [1.0, 0.25, 3.0, 0.0])
def test_an_answer_that_is_no_number_makes_no_metric_where_it_counts(
    row: list[float], spoilt: bool, weight: float
) -> None:
    """Planted: only weights above 1 looked at; weights not looked at; one metric of the two."""
    logits = torch.cat([drawn(5, 3, 1)[0], torch.tensor([row])])
    targets, weights = torch.tensor([0, 1, 2, 0, 1, 2]), torch.ones(6)
    weights[5] = weight
    hits, total = hit_counts(logits, targets, (1,), weights).tolist()
    metrics = class_metrics(class_counts(logits, targets, weights))
    found = [hits / total, *metrics.values()]
    assert len(found) > 3
    assert [math.isnan(one) for one in found] == [spoilt and weight > 0] * len(found)
    if weight == 1.0:
        bare = class_metrics(class_counts(logits, targets))
        assert bare == pytest.approx(metrics, nan_ok=True)


def test_rows_stand_beside_their_targets_wherever_the_model_answers() -> None:
    outputs = torch.arange(24.0).view(2, 4, 3)
    targets = torch.tensor([[1], [2]])
    rows, wanted = answer_rows(outputs, targets, slice(-1, None))
    assert torch.equal(rows, outputs[:, -1])
    assert wanted.tolist() == [1, 2]
    everywhere = torch.zeros(2, 4, dtype=torch.int64)
    assert answer_rows(outputs, everywhere)[0].shape == (8, 3)
    with pytest.raises(ValueError, match="8 answers for 2 targets"):
        answer_rows(outputs, targets)


@pytest.mark.parametrize(
    ("outputs", "shown"),
    [
        ({"size": torch.zeros(2), "kind": torch.zeros(2)}, "a mapping with the keys ['kind', 'size']"),
        ([1.0, 2.0], "a list"),
        (torch.tensor(1.0), "a tensor of shape ()"),
    ],
    ids=["mapping", "list", "number"],
)  # fmt: skip
def test_outputs_that_are_no_rows_of_logits_are_named_for_what_they_are(
    outputs: Any, shown: str
) -> None:
    """Red when the message does not say what the model gave."""
    with pytest.raises(ValueError, match=f"the model gives {re.escape(shown)}, where a tensor"):
        answer_rows(outputs, torch.tensor([0, 1]))
    if not isinstance(outputs, torch.Tensor):
        with pytest.raises(ValueError, match=f"the model gives {re.escape(shown)}, where a tensor"):
            number_pairs(outputs, torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("name", ["top_k", "by_class"])
def test_a_metric_that_is_named_twice_is_refused(name: str) -> None:
    twice = {"top_k": "[3, 3]", "by_class": "[f1, f1]"}[name]
    with pytest.raises(ConfigError, match="names one twice"):
        load_pipeline("smoke", [f"validators=[{{use: classification, with: {{{name}: {twice}}}}}]"])


@pytest.mark.parametrize("name", ["f1", *BY_CLASS[1:]])
def test_each_metric_can_be_asked_for_and_watched(tmp_path: Path, name: str) -> None:
    settings_ = [
        "run.max_steps=2", "run.validate_every=1", "observers=[{use: metrics_jsonl}]",
        f"validators=[{{use: classification, with: {{by_class: [{name}], top_k: [2, 5]}}}}]",
        f"callbacks=[{{use: best_checkpoint, with: {{metric: {name}, mode: max}}}}]",
    ]  # fmt: skip
    result = run(load_pipeline("smoke", settings_), output_dir=tmp_path / "run", quiet=True)
    assert set(result.best) == {"loss", "accuracy", "top_2_accuracy", "top_5_accuracy", name}
    found = [result.best["accuracy"], result.best["top_2_accuracy"], result.best["top_5_accuracy"]]
    assert found == sorted(found)


# -- in training --------------------------------------------------------------------------------


class Fixed(nn.Module):
    """Answers with logits that stand in the inputs; one weight, so that there is a step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.weight


def window(hits: list[bool]) -> Batch:
    """A batch whose answers are right where told."""
    logits = torch.zeros(len(hits), 3)
    logits[:, 0] = 1.0
    return Batch(logits, torch.tensor([0 if hit else 2 for hit in hits]))


def logged(batches: list[Batch], use: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    data = LoaderData(batches, [batches[0]], DataSpec(classes=3))
    session = make_session(
        Fixed(), data, uses={"validators": (UseValidator("classification", use),)}, lr=1e-9,
        max_steps=len(batches) // options.get("accumulate", 1), **options,
    )  # fmt: skip
    original = session.log

    def log() -> Any:
        record = original()
        lines.append({"step": record.step, **record.metrics})
        return record

    session.log = log  # type: ignore[method-assign]
    session.train()
    session.finish()
    return lines


@pytest.mark.spec("H15")
def test_the_log_has_the_accuracy_of_the_training_batch_that_ended_the_interval() -> None:
    """Red when it is of all batches, of the last micro-batch, or of a step that is not due."""
    batches = [window([True] * 4), window([True, False]), window([False] * 3), window([True])]
    every_two = logged(batches, {}, log_every=2)
    assert [(line["step"], line["accuracy"]) for line in every_two] == [(2, 0.5), (4, 1.0)]
    windows = logged(batches, {}, log_every=1, accumulate=2)
    assert [line["accuracy"] for line in windows] == pytest.approx([5 / 6, 1 / 4])


def test_the_last_line_of_a_run_that_ends_between_intervals_has_no_metric_of_an_earlier_step() -> (
    None
):
    lines = logged([window([True, False])] * 3, {}, log_every=2)
    assert [line["step"] for line in lines] == [2, 3]
    assert {"accuracy", "grad_norm"} <= lines[1].keys()  # its end is known, so it is due
    data = LoaderData([window([True])] * 3, (), DataSpec(classes=3))
    use = {"validators": (UseValidator("classification"),)}
    session = make_session(Fixed(), data, uses=use, lr=1e-9, max_steps=9, log_every=2)
    for batch in data.batches(0, 0):
        session.step(batch)
        session.run_due_actions()
    record = session.log()
    assert record.step == 3
    assert record.metrics["accuracy"] is None
    assert "grad_norm" not in record.metrics


def test_training_accuracy_can_be_left_out(linear: nn.Module) -> None:
    lines = logged([window([True])] * 2, {"in_training": False}, log_every=1)
    assert "accuracy" not in lines[0]
    lines = logged([window([True, False])] * 2, {}, log_every=1, ignore_index=2)
    assert lines[0]["accuracy"] == 1.0


def test_a_step_that_ends_no_interval_reads_no_answers(monkeypatch: Any) -> None:
    counted: list[int] = []
    original = AccuracyMetric.update

    def update(self: Any, *arguments: Any) -> None:
        counted.append(1)
        original(self, *arguments)

    monkeypatch.setattr(AccuracyMetric, "update", update)
    lines = logged([window([True])] * 10, {}, log_every=5)
    assert [line["step"] for line in lines] == [5, 10]
    assert len(counted) == 2 + 1  # two lines, and the validation at the end


def test_the_accuracy_of_training_is_over_all_ranks() -> None:
    """Red without `reduce`."""

    def fraction_of(batch: Batch) -> Any:
        def call(add: Any) -> float:
            strategy = type("S", (), {"reduce": staticmethod(add)})
            progress = type("P", (), {"step": 1})
            pretended: Any = type("R", (), {"strategy": strategy, "progress": progress})
            training = TrainingAccuracy(AccuracyMetric())
            step: Any = type("T", (), {"number": 1})
            training.take(step, batch, batch.inputs)
            return float(training.metrics(pretended)["accuracy"])  # type: ignore[arg-type]

        return call

    parts = [window([True] * 5), window([False])]
    assert Ranks(2).run([fraction_of(part) for part in parts]) == pytest.approx([5 / 6, 5 / 6])


@pytest.mark.spec("H15")
def test_a_run_from_a_file_logs_loss_accuracy_rate_and_norm_at_each_interval(
    tmp_path: Path,
) -> None:
    """Red without the hook `on_outputs`."""
    pipeline = load_pipeline("smoke", ["run.max_steps=30", "run.log_every=5"])
    run(pipeline, output_dir=tmp_path / "run", quiet=True)
    text = (tmp_path / "run/metrics.jsonl").read_text()
    lines = [line for line in map(json.loads, text.splitlines()) if line["kind"] == "log"]
    assert [line["step"] for line in lines] == list(range(5, 31, 5))
    for name in ("loss", "accuracy", "learning_rate", "grad_norm"):
        values = [line[name] for line in lines]
        assert all(isinstance(value, float) for value in values), name
        assert len(set(values)) > 1, f"{name} never changes"
    assert all(0 <= line["accuracy"] <= 1 for line in lines)


def test_the_names_that_the_planner_hears_are_those_that_are_measured() -> None:
    config = bind_config(ClassificationConfig, {"top_k": [4], "by_class": ["recall"]})
    assert metrics(config) == ("accuracy", "top_4_accuracy", "recall")
