"""The validator over the caller's model."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from agent_forge.phases.phase5_training import (
    MetricCalculator,
    RealTimeValidator,
    ValidationConfig,
    ValidationMode,
)
from forge_kernel.errors import ConfigError, RunError


class Table(nn.Module):
    """Gives its inputs as logits, so that each metric can be counted by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs * self.scale


def uneven() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of 5, 1 and 3 samples over three classes."""
    torch.manual_seed(6)
    return [(torch.randn(n, 3), torch.randint(3, (n,))) for n in (5, 1, 3)]


def oracle(batches: Any) -> dict[str, float]:
    """By hand, over all samples at once."""
    logits = torch.cat([one for one, _ in batches])
    targets = torch.cat([one for _, one in batches])
    answers = logits.argmax(1)
    scores: dict[str, list[float]] = {"f1_score": [], "precision": [], "recall": []}
    for label in sorted({*answers.tolist(), *targets.tolist()}):
        hits = float(((answers == label) & (targets == label)).sum())
        said, there = float((answers == label).sum()), float((targets == label).sum())
        scores["f1_score"].append(2 * hits / (said + there))
        scores["precision"].append(hits / said if said else 0.0)
        scores["recall"].append(hits / there if there else 0.0)
    found = {name: sum(values) / len(values) for name, values in scores.items()}
    found["accuracy"] = float((answers == targets).float().mean())
    found["loss"] = float(functional.cross_entropy(logits, targets))
    return found


ALL = ["accuracy", "loss", "f1_score", "precision", "recall", "top_2_accuracy"]


def test_metrics_over_uneven_batches_are_those_of_the_whole_set() -> None:
    """Spec: H4, H5, H6. Red with means of batch means."""
    batches = uneven()
    validator = RealTimeValidator(Table(), ValidationConfig(metrics_to_track=ALL), "cpu")
    found = validator.run_validation(batches, functional.cross_entropy)
    for name, value in oracle(batches).items():
        assert found[name] == pytest.approx(value, abs=1e-6), name
    assert found["top_2_accuracy"] >= found["accuracy"]
    one = validator.validate_step(batches[0], functional.cross_entropy)
    assert one["accuracy"] == pytest.approx(oracle(batches[:1])["accuracy"])
    limited = validator.run_validation(batches, functional.cross_entropy, num_steps=2)
    assert limited["loss"] == pytest.approx(oracle(batches[:2])["loss"], abs=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_the_models_modes_are_left_alone(training: bool) -> None:
    """Spec: H4"""
    model = nn.Sequential(Table(), nn.Dropout(0.5))
    model.train(training)
    model[1].train(not training)
    validator = RealTimeValidator(model, None, "cpu")
    before = validator.validate_step(uneven()[0], functional.cross_entropy)
    assert validator.validate_step(uneven()[0], functional.cross_entropy) == before  # no dropout
    assert (model.training, model[1].training) == (training, not training)
    assert all(value.grad is None for value in model.parameters())


def test_before_a_validation_nothing_is_known_and_after_it_all_is_finite() -> None:
    """Spec: H13"""
    validator = RealTimeValidator(Table())
    assert validator.get_validation_summary()["best_metric_value"] is None
    assert validator.get_validation_summary()["latest_metrics"] is None
    validator.run_validation(uneven(), functional.cross_entropy)
    summary = validator.get_validation_summary()
    assert summary["best_metric_value"] == pytest.approx(oracle(uneven())["accuracy"])
    json.dumps(summary, allow_nan=False)


def test_what_is_not_known_is_null_and_never_a_number(tmp_path: Path) -> None:
    """Spec: H7, H12, H14. A regression has no accuracy."""
    validator = RealTimeValidator(Table(), None, "cpu")
    batch = (torch.randn(4, 3), torch.randn(4, 3))
    assert set(validator.validate_step(batch, functional.mse_loss)) == {"loss"}
    found = json.loads(validator.export_results(tmp_path / "x.json").read_text())
    assert found["validation_results"][0]["metrics"]["accuracy"] is None
    assert found["summary"]["best_metric_value"] is None


def test_a_loss_that_is_not_finite_stays_out_of_the_file(tmp_path: Path) -> None:
    """Spec: H12"""
    validator = RealTimeValidator(Table(), None, "cpu")
    validator.validate_step(uneven()[0], lambda predictions, targets: predictions.sum() * torch.nan)
    text = validator.export_results(tmp_path / "x.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["validation_results"][0]["metrics"]["loss"] is None


def test_patience_counts_validations_without_a_better_one() -> None:
    """Spec: H10"""
    config = ValidationConfig(early_stopping_patience=2, primary_metric="loss")
    validator = RealTimeValidator(Table(), config)
    told = []
    for loss in (1.0, 0.5, 0.6, 0.5):
        validator.record({"loss": loss})
        told.append(validator.should_stop_early())
    assert told == [False, False, False, True]
    assert validator.get_validation_summary()["best_metric_value"] == 0.5
    off = RealTimeValidator(Table(), ValidationConfig(early_stopping_enabled=False))
    for _ in range(50):
        off.record({"accuracy": 0.1})
    assert not off.should_stop_early()


def test_the_two_names_of_the_patience_may_not_contradict_each_other() -> None:
    """Spec: H10, I8"""
    assert ValidationConfig(validation_patience=3).patience == 3
    with pytest.raises(ConfigError, match="mean the same"):
        ValidationConfig(validation_patience=3, early_stopping_patience=4).check()


def test_a_batch_of_another_mode_is_measured_and_not_remembered() -> None:
    """Spec: H4"""
    validator = RealTimeValidator(Table())
    validator.validate_step(uneven()[0], functional.cross_entropy, ValidationMode.TEST)
    assert validator.get_validation_summary()["total_validations"] == 0


def test_monitoring_is_one_thread_that_ends_when_told() -> None:
    """Spec: H3, H9, H16. Bounded history; a device that is not there is None, not 0."""
    before = set(threading.enumerate())
    validator = RealTimeValidator(Table())
    validator.start_monitoring()
    validator.start_monitoring()
    (thread,) = set(threading.enumerate()) - before
    assert thread.daemon
    for _ in range(200):
        if validator.monitor.history:
            break
        time.sleep(0.01)
    validator.stop_monitoring_thread()
    validator.stop_monitoring_thread()
    assert not thread.is_alive()
    reading = validator.monitor.history[-1]
    assert reading["memory_bytes"] > 0
    assert reading["device_memory_bytes"] is None
    for _ in range(1100):
        validator.monitor.history.append(reading)
    assert len(validator.monitor.history) == 1000


def test_throughput_is_of_all_samples_and_of_their_whole_time() -> None:
    """Spec: H11"""
    validator = RealTimeValidator(Table())
    assert validator.monitor.read()["samples_per_second"] is None
    validator.run_validation(uneven(), functional.cross_entropy)
    assert validator.monitor._samples == 9
    assert validator.monitor.read()["samples_per_second"] > 0
    quiet = ValidationConfig(throughput_monitoring=False, memory_monitoring=False)
    silent = RealTimeValidator(Table(), quiet)
    silent.run_validation(uneven(), functional.cross_entropy)
    reading = silent.monitor.read()
    assert reading["samples_per_second"] is reading["memory_bytes"] is None


def test_a_metric_that_nothing_measures_is_refused_with_those_there_are() -> None:
    """Spec: H7"""
    with pytest.raises(ConfigError, match="accuracy, loss, f1_score, precision, recall"):
        ValidationConfig(metrics_to_track=["accurate"]).check()
    with pytest.raises(ConfigError, match="bleu needs texts"):
        ValidationConfig(metrics_to_track=["bleu_score"]).check()
    with pytest.raises(RunError, match="compares texts"):
        MetricCalculator.bleu_score(["a"], ["b"])


def test_the_calculator_agrees_with_counting_by_hand() -> None:
    """Spec: H6, H7, K15"""
    batches = uneven()
    logits, targets = (torch.cat([one[i] for one in batches]) for i in (0, 1))
    known = oracle(batches)
    assert MetricCalculator.accuracy(logits, targets) == pytest.approx(known["accuracy"])
    assert MetricCalculator.f1_score(logits, targets) == pytest.approx(known["f1_score"])
    precision, recall = MetricCalculator.precision_recall(logits, targets)
    assert (precision, recall) == pytest.approx((known["precision"], known["recall"]))
    assert MetricCalculator.top_k_accuracy(logits, targets, k=3) == 1.0
    assert MetricCalculator.perplexity(2.0) == pytest.approx(7.38905609893065)
    assert MetricCalculator.perplexity(1e6) is None
    with pytest.raises(RunError, match="9 predictions for 8 targets"):
        MetricCalculator.accuracy(logits, targets[1:])


def test_perplexity_is_measured_when_asked_for() -> None:
    """Spec: H7"""
    config = ValidationConfig(metrics_to_track=["perplexity"], primary_metric="perplexity")
    validator = RealTimeValidator(Table(), config)
    found = validator.run_validation(uneven(), functional.cross_entropy)
    summary = validator.get_validation_summary()
    wanted = pytest.approx(float(torch.tensor(found["loss"]).exp()), rel=1e-5)
    assert summary["best_metric_value"] == wanted
    assert summary["latest_metrics"]["perplexity"] == wanted
    assert found["perplexity"] == wanted
