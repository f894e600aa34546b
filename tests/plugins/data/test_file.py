"""`data.file`: order, split, quality, facts; and the shipped digits in every format."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_kernel import load_pipeline, run
from forge_kernel.config.schema import bind_config
from forge_kernel.contract.plugin import facts
from forge_kernel.contract.run_config import RunConfig
from forge_kernel.contract.values import Batch
from forge_kernel.errors import ConfigError, PluginError
from forge_kernel.testing.compare import differences
from forge_kernel.training.one_process import OneProcess
from forge_plugins.data.file import File, FileData
from forge_plugins.data.file_config import FileConfig
from forge_plugins.formats.columns.table import Table
from forge_plugins.formats.inspection.quality import assess, outlier_limits
from forge_plugins.formats.inspection.quality_scan import scanned
from forge_plugins.formats.open_table import open_table

ROOT = Path(__file__).parents[3]
DIGITS = sorted(file.stem for file in (ROOT / "pipelines").glob("digits_*.yaml"))


class Seeded:
    strategy = OneProcess()
    settings = RunConfig()

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.told: dict[str, str] = {}

    def emit_event(self, name: str, message: str, **facts: Any) -> None:
        self.told[name] = f"{message} {facts}"


def made(seed: int = 0, **chosen: Any) -> FileData:
    data: Any = File(FileConfig(**chosen)).make_data(Seeded(seed))  # type: ignore[arg-type]
    return data


def numbered(count: int, seed: int = 0, **chosen: Any) -> FileData:
    """Samples whose input is their number."""
    column = np.arange(count, dtype=np.float32)[:, None]
    table = Table(Path("memory"), "npy", {"input": column, "target": np.arange(count) % 3})
    config = FileConfig(**chosen)
    return FileData(table, scanned(assess(table, target="class"), 0.0), config, seed)


def ids(batches: Any) -> list[int]:
    return [int(i) for batch in batches for i in batch.inputs[:, 0]]


def write(file: Path, *rows: Any) -> str:
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(file)


@pytest.mark.spec("B1", "B3", "B5", "B8", "B16")
@given(
    count=st.integers(2, 200),
    size=st.integers(1, 60),
    share=st.floats(0, 0.9),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 9),
)
@settings(max_examples=80, deadline=None)
def test_an_epoch_is_a_permutation_of_what_the_split_leaves(
    count: int, size: int, share: float, seed: int, epoch: int
) -> None:
    data = numbered(
        count, seed, batch_size=size, validation_split=share, validation_batch_size=size
    )
    batches = list(data.batches(epoch, 0))
    assert len(batches) == data.batches_per_epoch
    assert all(len(batch.inputs) == size for batch in batches[:-1])
    training, validation = ids(batches), ids(data.validation())
    assert sorted(training + validation) == list(range(count))
    expected = min(max(1, round(count * share)), count - 1) if share else 0
    assert len(validation) == expected
    assert validation == ids(data.validation())
    assert all(len(batch.inputs) <= size for batch in data.validation())
    again = numbered(count, seed, batch_size=size, validation_split=share)
    assert ids(again.batches(epoch, 0)) == training


@given(count=st.integers(2, 99), size=st.integers(1, 20), epoch=st.integers(0, 5), data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_resume_at_any_batch_goes_on_as_the_straight_run(
    count: int, size: int, epoch: int, data: st.DataObject
) -> None:
    samples = numbered(count, batch_size=size)
    straight = [(b.inputs, b.targets) for b in samples.batches(epoch, 0)]
    start = data.draw(st.integers(0, len(straight)))
    again = numbered(count, batch_size=size).batches(epoch, start * size)
    rest = [(b.inputs, b.targets) for b in again]
    assert len(rest) == len(straight) - start
    for (x, y), (other_x, other_y) in zip(rest, straight[start:], strict=True):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)


def test_a_late_start_reads_nothing_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = numbered(1000, batch_size=10, validation_split=0.0)
    gathered: list[int] = []
    read = samples.rows
    monkeypatch.setattr(samples, "rows", lambda index: gathered.append(len(index)) or read(index))
    next(samples.batches(0, 990))
    assert gathered == [10]


def test_epochs_and_seeds_have_orders_of_their_own_and_no_shuffle_has_the_files() -> None:
    orders = [ids(numbered(50, seed).batches(epoch, 0)) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    plain = numbered(50, shuffle=False, validation_split=0.0)
    assert ids(plain.batches(3, 0)) == list(range(50))


def test_the_split_follows_the_run_unless_it_has_a_seed_of_its_own() -> None:
    assert ids(numbered(50, 0).validation()) != ids(numbered(50, 1).validation())
    fixed = [ids(numbered(50, seed, split_seed=7).validation()) for seed in (0, 1)]
    assert fixed[0] == fixed[1] != ids(numbered(50, 0, split_seed=8).validation())


def test_without_a_path_the_shipped_digits_are_read() -> None:
    data = made(batch_size=100, validation_batch_size=7)
    assert (data.spec.features, data.spec.classes) == (64, 10)
    batch = next(iter(data.batches(0, 0)))
    assert batch.inputs.shape == (100, 64)
    assert batch.inputs.dtype == torch.float32
    assert batch.targets.dtype == torch.int64
    assert len(next(data.validation()).inputs) == 7


def test_features_keep_their_shape(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", input=np.ones((4, 2, 3)), target=np.ones((4, 1), np.int8))
    data = made(path=str(tmp_path / "x.npz"), cache_dir=str(tmp_path / "cache"))
    assert data.spec.features == 6
    batch = next(iter(data.batches(0, 0)))
    assert data.spec.shape == (2, 3)
    assert batch.inputs.shape[1:] == (2, 3)
    assert batch.targets.ndim == 1
    assert list((tmp_path / "cache").iterdir())


def test_numbers_as_targets(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", *[{"input": [i], "target": [i + 0.5, 2]} for i in range(4)])
    data = made(path=path, target="number", cache_dir=str(tmp_path), shuffle=False)
    batch: Batch = next(iter(data.batches(0, 0)))
    assert torch.equal(batch.targets[:, 0], batch.inputs[:, 0] + 0.5)
    assert data.spec.classes == 2
    assert (
        next(iter(made(path=path, target="none", cache_dir=str(tmp_path)).batches(0, 0))).targets
        is None
    )


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, {"data:features", "data:classes"}),
        ({"input": "tokens"}, {"data:tokens", "data:classes"}),
        ({"target": "number"}, {"data:features", "data:numbers"}),
        ({"target": "none"}, {"data:features"}),
        ({"input": "tokens", "target": "next"}, {"data:tokens", "data:classes"}),
    ],
)
def test_the_settings_say_which_facts_the_data_bring(chosen: Any, expected: set[str]) -> None:
    assert set(facts(File.info.provides, FileConfig(**chosen))) == expected


def test_tokens_with_one_answer_are_read_at_the_last_position(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", *[{"input": [i, 5], "target": i} for i in range(4)])
    data = made(path=path, input="tokens", cache_dir=str(tmp_path))
    assert (data.spec.vocabulary, data.spec.sequence, data.spec.classes) == (6, 2, 4)
    batch = next(iter(data.batches(0, 0)))
    assert batch.inputs.dtype == torch.int64
    assert batch.positions == slice(-1, None)
    assert torch.equal(batch.targets[:, 0], batch.inputs[:, 0])
    more = made(path=path, input="tokens", cache_dir=str(tmp_path), vocabulary=9, classes=7)
    assert (more.spec.vocabulary, more.spec.classes) == (9, 7)


def test_the_next_token_is_the_target_of_windows_and_of_rows(tmp_path: Path) -> None:
    np.arange(41, dtype=np.uint8).tofile(tmp_path / "t.bin")
    raw = made(
        path=str(tmp_path / "t.bin"), format="tokens", token_dtype="uint8", sequence_length=8,
        input="tokens", target="next", validation_split=0.0,
    )  # fmt: skip
    assert (raw.spec.vocabulary, raw.spec.sequence, raw.batches_per_epoch) == (41, 8, 1)
    np.save(tmp_path / "t.npy", np.arange(40).reshape(5, 8))
    rows = made(path=str(tmp_path / "t.npy"), input="tokens", target="next")
    assert rows.spec.sequence == 7
    for data in (raw, rows):
        for batch in data.batches(0, 0):
            assert torch.equal(batch.targets, batch.inputs + 1)


BAD = [
    {"input": [1.0, 1.0]},
    {"input": "x", "target": 0},
    {"input": [1.0], "target": 0},
    {"input": [[1.0, 2.0]], "target": 0},
    {"input": [1.0, 2.0], "target": 9},
    {"input": [None, 2.0], "target": 1},
]


@pytest.mark.spec("B9", "B14")
def test_samples_of_low_quality_are_left_out_and_counted(tmp_path: Path) -> None:
    good = [{"input": [i + 0.5, 1.0], "target": i % 3} for i in range(20)]
    path = write(tmp_path / "x.jsonl", *good, *BAD, good[4])
    chosen = {"path": path, "classes": 3, "cache_dir": str(tmp_path / "c"), "shuffle": False}
    data = made(**chosen, quality_threshold=0.9, validation_split=0.0)
    assert data.left_out == {
        "missing field": 1, "wrong type": 1, "wrong length": 1, "wrong shape": 1, "label out of range": 1,
        "duplicate": 1, "not finite": 1,
    }  # fmt: skip
    [batch] = data.batches(0, 0)
    assert batch.inputs.tolist() == [row["input"] for row in good]
    assert batch.targets.tolist() == [row["target"] for row in good]
    with pytest.raises(PluginError, match="record 25.*not finite"):  # half of it is a number
        made(**chosen, quality_threshold=0.5)
    with pytest.raises(PluginError, match="record 20, field 'target'.*missing"):
        made(**chosen)


def test_a_sample_far_from_all_others_is_an_outlier(tmp_path: Path) -> None:
    inputs = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    inputs[17, 2] = 1e4
    np.savez(tmp_path / "x.npz", input=inputs)
    table = open_table(tmp_path / "x.npz", cache_dir=tmp_path / "c")
    found = assess(table)
    assert np.flatnonzero(found.found["outlier"]).tolist() == [17]
    assert found.scores[17] == pytest.approx(0.75)
    assert np.flatnonzero(found.scores < 1).tolist() == [17]


@given(
    count=st.integers(10_001, 30_000),
    kind=st.sampled_from(["normal", "sorted", "halves", "constant", "integers", "gaps"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_the_limits_of_outliers_are_those_of_the_whole_file(
    count: int, kind: str, seed: int
) -> None:
    """Planted fault: limits of the first 4,096 records failed for sorted files."""
    draw = np.random.default_rng(seed)
    column = {
        "normal": lambda: draw.normal(1e4, 1, (count, 2)),
        "sorted": lambda: np.sort(draw.normal(0, 1, (count, 2)), axis=0),
        "halves": lambda: np.where(
            np.arange(count)[:, None] % 3 == 0, 1e5, draw.random((count, 2))
        ),
        "constant": lambda: np.full((count, 2), 7.0),
        "integers": lambda: draw.integers(0, 5, (count, 2)),
        "gaps": lambda: np.where(draw.random((count, 2)) < 0.1, np.nan, draw.random((count, 2))),
    }[kind]().astype(np.float32)
    limits = outlier_limits(Table(Path("memory"), "npy", {"input": column}))
    assert limits is not None
    wide = column.astype(np.float64)
    middle = np.nanmedian(wide, 0)
    reach = 14.826 * np.nanmedian(np.abs(wide - middle), 0)
    reach[reach == 0] = np.inf
    known = np.isfinite(reach)
    assert np.array_equal(np.isfinite(limits[1]), known)
    near = 0.15 * reach[known]  # as sure as 4,096 of them can tell
    for found, expected in ((limits[0], middle - reach), (limits[1], middle + reach)):
        assert (np.abs(found[known] - expected[known]) <= near).all()


@given(
    inputs=st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=2), min_size=1, max_size=40)
)
@settings(max_examples=60, deadline=None)
def test_a_duplicate_is_what_stood_there_before(inputs: list[list[int]]) -> None:
    table = Table(Path("memory"), "npy", {"input": np.array(inputs)})
    repeats = [row in inputs[:at] for at, row in enumerate(inputs)]
    found = assess(table)
    assert found.found["duplicate"].tolist() == repeats
    assert ((found.scores >= 0) & (found.scores <= 1)).all()


@pytest.mark.parametrize(
    ("rows", "chosen", "told"),
    [
        ([{"input": [1]}], {}, "no field 'target'.*target: none"),
        ([{"input": [1], "target": 0.5}] * 2, {}, "record 0, field 'target'.*label"),
        ([{"input": [1], "target": -1}] * 2, {}, "record 0, field 'target'.*label"),
        ([{"input": [1], "target": 2**40}] * 2, {}, "'target'.*too large to count classes"),
        ([{"input": [1], "target": [1, 2]}] * 2, {}, "'target'.*not one of target: class"),
        ([{"input": [0.5, 1], "target": 1}] * 2, {"input": "tokens"}, "tokens are integers"),
        ([{"input": 1, "target": 1}] * 2, {"input": "tokens"}, r"shape \(samples, length\)"),
        ([{"input": [7, 1], "target": 1}] * 2, {"input": "tokens", "vocabulary": 7}, "record 0.*token"),
        ([{"input": [1], "target": 1}], {}, "1 of 1 samples are left"),
        ([{"input": [1]}] * 3, {"input": "tokens", "target": "next"}, "no next one"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_on_is_told_by_record_and_field(
    rows: Any, chosen: Any, told: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "x.jsonl", *rows)
    with pytest.raises(PluginError, match=told):
        made(path=path, format="json", cache_dir=str(tmp_path), **chosen)


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        ({"format": "json"}, "needs a path"),
        ({"classes": 9}, "10 classes"),
        ({"vocabulary": 3}, "17 tokens"),
        ({"target": "next"}, "needs input: tokens"),
        ({"path": "x", "format": "tokens"}, "needs input: tokens and target: next"),
        ({"batch_size": 0}, "1"),
        ({"validation_split": 1.0}, "1"),
        ({"quality_threshold": 1.5}, "1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(chosen: Any, told: str) -> None:
    with pytest.raises(Exception, match=told):
        bind_config(FileConfig, chosen)


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("made-by-pickle",)


def test_a_pickle_runs_only_when_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pickle

    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps([Evil()]))
    for trusted in (False, True):
        with pytest.raises(PluginError, match="mkdir" if not trusted else "record 0"):
            made(path="x.pkl", trust_pickle=trusted, cache_dir="c")
        assert (tmp_path / "made-by-pickle").exists() is trusted


@pytest.mark.spec("B10", "B11", "B12", "B13")
def test_digits_of_every_format_give_the_same_weights(tmp_path: Path) -> None:
    assert len(DIGITS) == 9
    extra = () if importlib.util.find_spec("pyarrow") else ("parquet", "arrow")
    for name in (name for name in DIGITS if not name.endswith(extra or "-")):
        cache = f"data.with.cache_dir={tmp_path / 'cache'}"
        pipeline = load_pipeline(
            ROOT / f"pipelines/{name}.yaml", [cache, "run.device=cpu", "run.name=digits"]
        )
        result = run(pipeline, output_dir=tmp_path / name, quiet=True)
        assert result.best["accuracy"] > 0.9
        checkpoints = tmp_path / name / "checkpoints"
        assert (checkpoints / "step-276" / "model.safetensors").is_file()
        state = checkpoints / "step-276" / "state.json"
        told = json.loads(state.read_text())
        assert told["plugins"].pop("data file")["records"] == 1797  # each file is another content
        state.write_text(json.dumps(told))
        first = tmp_path / DIGITS[0] / "checkpoints"
        assert differences(first / "step-276", checkpoints / "step-276") == []


def test_a_missing_file_ends_the_run_with_its_name(tmp_path: Path) -> None:
    with pytest.raises((PluginError, ConfigError), match="nowhere.json.*no such file"):
        made(path=str(tmp_path / "nowhere.json"))


def test_a_perceptron_learns_numbers(tmp_path: Path) -> None:
    """Planted fault: with one output for two numbers the loss refused the shapes."""
    draw = np.random.default_rng(0).normal(size=(400, 3)).astype(np.float32)
    targets = np.stack([draw @ [1.0, -2.0, 0.5], draw[:, 0] ** 2], 1).astype(np.float32)
    np.savez(tmp_path / "x.npz", input=draw, target=targets)
    (tmp_path / "p.yaml").write_text(
        f"""
forge: 1
run: {{name: numbers, seed: 0, device: cpu, max_steps: 300, validate_every: 100}}
data: {{use: file, with: {{path: {tmp_path / "x.npz"}, target: number, cache_dir: {tmp_path / "c"}}}}}
model: {{use: mlp}}
optimizer: {{use: adamw, with: {{lr: 0.01}}}}
loss: {{use: regression}}
validators: [{{use: regression}}]
"""
    )
    result = run(load_pipeline(tmp_path / "p.yaml"), output_dir=tmp_path / "run", quiet=True)
    assert result.best["r2"] > 0.9


def test_what_was_left_out_and_what_was_run_on_trust_is_told(tmp_path: Path) -> None:
    import pickle

    rows = [{"input": [float(at)], "target": at % 2} for at in range(9)]
    (tmp_path / "x.pkl").write_bytes(pickle.dumps([*rows, {"input": [1.0]}]))
    here = Seeded(0)
    config = FileConfig(
        path=str(tmp_path / "x.pkl"), quality_threshold=0.5, trust_pickle=True,
        cache_dir=str(tmp_path / "c"),
    )  # fmt: skip
    File(config).make_data(here)  # type: ignore[arg-type]
    assert (
        "1 of 10 samples are left out: missing field 1 {'left_out': 1, 'kept': 9}"
        in here.told["samples_left_out"]
    )
    assert "run as it is, on trust {'sha256': '" in here.told["pickle_trusted"]


def test_a_run_tells_its_log_what_was_left_out(tmp_path: Path) -> None:
    rows = [{"input": [float(at)], "target": at % 2} for at in range(40)]
    path = write(tmp_path / "x.jsonl", *rows, {"input": [1.0]})
    (tmp_path / "p.yaml").write_text(
        f"""
forge: 1
run: {{name: left, seed: 0, device: cpu, max_steps: 2}}
data: {{use: file, with: {{path: {path}, quality_threshold: 0.5, batch_size: 8, cache_dir: {tmp_path / "c"}}}}}
model: {{use: mlp}}
optimizer: {{use: sgd, with: {{lr: 0.1}}}}
loss: {{use: cross_entropy}}
observers: [{{use: metrics_jsonl}}]
"""
    )
    run(load_pipeline(tmp_path / "p.yaml"), output_dir=tmp_path / "run", quiet=True)
    assert "samples_left_out" in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "missing field 1" in (tmp_path / "run" / "forge.log").read_text()
