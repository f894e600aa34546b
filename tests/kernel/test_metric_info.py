"""What plugins declare of their metrics, and who reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_parts import make_plugin

from forge_kernel import run
from forge_kernel.api import MetricInfo, MetricInfos
from forge_kernel.contract.plugin import Kind
from forge_kernel.run_folder.folder import RunFolder
from forge_kernel.run_folder.log_text import metrics_lines, metrics_text


@pytest.mark.parametrize(
    ("info", "value", "text"),
    [
        (MetricInfo("a"), 0.123456789, "0.12346"),
        (MetricInfo("a", digits=2), 0.123456789, "0.12"),
        (MetricInfo("a"), 1234567.0, "1,234,567"),
        (MetricInfo("a"), 123456.7, "123,457"),
        (MetricInfo("a"), 0.00001, "1e-5"),
        (MetricInfo("a", "bytes"), 558_350_336, "558 MB"),
        (MetricInfo("a", "bytes"), 0, "0 B"),
        (MetricInfo("a", "1/s"), 656.7131, "656.71/s"),
        (MetricInfo("a", "%", digits=3), 72.34, "72.3 %"),
        (MetricInfo("a", "s"), 3, "3 s"),
        (MetricInfo("a"), None, "–"),
        (MetricInfo("a"), float("nan"), "–"),
    ],
)
def test_a_value_has_its_digits_and_its_unit(
    info: MetricInfo, value: float | None, text: str
) -> None:
    assert info.number(value) == text


def test_a_metric_is_found_by_name_pattern_validation_and_part() -> None:
    infos = MetricInfos([MetricInfo("top_*_accuracy", "share"), MetricInfo("retention", "share")])
    assert infos.of("top_5_accuracy").unit == "share"
    assert infos.of("validation_top_5_accuracy").unit == "share"
    assert infos.of("retention/add").unit == "share"
    assert infos.of("validation_loss").goal == "min"
    assert not infos.declares("top_5")
    assert infos.of("top_5") == MetricInfo("top_5")


def test_declarations_survive_the_round_trip_and_foreign_data() -> None:
    infos = MetricInfos([MetricInfo("a", "s", "max", 3, "A", "B"), MetricInfo("level_*", "share")])
    again = MetricInfos.from_data(json.loads(json.dumps(infos.to_data())))
    assert [again.of(name) for name in ("a", "level_1")] == [infos.of("a"), infos.of("level_1")]
    for data in (None, 3, [None, {"name": 4}, {}], {"name": "a"}):
        assert not MetricInfos.from_data(data).declares("a")


class Score:
    """A metric whose plugin says which way is better."""

    def __init__(self, values: list[float], goals: dict[str, str] | None) -> None:
        self._values = values
        if goals is not None:
            self.goals = goals

    def reset(self) -> None:
        """Nothing is kept."""

    def update(self, *_: Any) -> None:
        """Nothing is looked at."""

    def compute(self, add: Any) -> dict[str, float]:
        """The next value."""
        return {"score": self._values.pop(0)}


@pytest.mark.parametrize(
    ("declared", "goals", "best"),
    [
        ((MetricInfo("score", "%", "max", 2),), None, 3.0),
        ((MetricInfo("score", "%", "min", 2),), None, 1.0),
        ((), {"score": "max"}, 3.0),
        ((), None, 1.0),
    ],
)
def test_what_a_plugin_declares_decides_the_best_and_is_kept_with_the_run(
    tmp_path: Path, declared: tuple[MetricInfo, ...], goals: Any, best: float
) -> None:
    """Red when the direction is not read, or the declarations are not written."""
    plugin = make_plugin(
        "score", Kind.VALIDATORS, make_metrics=lambda self, run: [Score([1.0, 3.0, 2.0], goals)]
    )
    plugin.info = plugin.__class__.info.__class__(
        name="score", kind=Kind.VALIDATORS, config=plugin.info.config, metrics=declared
    )
    plugin.__class__.info = plugin.info
    file = tmp_path / "p.yaml"
    file.write_text(
        "forge: 1\nrun: {name: t, seed: 0, device: cpu, max_steps: 3, validate_every: 1}\n"
        "optimizer: {use: sgd, with: {lr: 0.1}}\nloss: {use: cross_entropy}\n"
    )
    batches = [(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))]
    result = run(
        file, model=torch.nn.Linear(3, 2), data=(batches, batches),
        plugins=[plugin], output_dir=tmp_path / "r", quiet=True,
    )  # fmt: skip
    assert result.best["score"] == best
    shown = metrics_text({"validation_score": 0.4567}, RunFolder(tmp_path / "r").metric_infos())
    assert shown == f"validation_score {'0.46 %' if declared else '0.4567'}"


def test_what_matters_comes_first_and_the_rest_side_by_side() -> None:
    """Planted: the order of the log; lines that are longer than the terminal."""
    infos = MetricInfos([MetricInfo("accuracy", goal="max"), MetricInfo("perplexity", goal="min")])
    metrics = {
        "grad_norm": 0.25, "loss": 1.5, "slow": None, "validation_perplexity": 4.5, "accuracy": 1,
        "validation_accuracy": 0.5, "skipped_steps": 2, "level_-1": 0.125, "level_0": 0.75,
    }  # fmt: skip
    assert infos.that_matter(metrics) == [
        "validation_accuracy", "validation_perplexity", "accuracy", "loss",
    ]  # fmt: skip
    lines = metrics_lines(metrics, infos, 40)
    assert lines == [
        "validation_accuracy    0.5", "validation_perplexity  4.5", "accuracy               1",
        "loss                   1.5", "grad_norm 0.25  skipped_steps 2", "level_-1 0.125  level_0 0.75",
    ]  # fmt: skip
    assert metrics_lines(None, infos, 40) == []
