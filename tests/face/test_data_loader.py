"""The loaders of the Phase 5 face, read from outside: files in, dictionaries of tensors out."""

from __future__ import annotations

import json
import os
import pickle
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from agent_forge.phases.phase5_training.configuration import SettingError
from agent_forge.phases.phase5_training.pipeline.data_loader import (
    CachedDataset,
    DataConfig,
    DataFormat,
    DataLoaderFactory,
    DataLoadingProfiler,
    QualityValidator,
    StreamingDataset,
    create_optimized_loader,
)
from forge_kernel.errors import PluginError
from forge_plugins.formats.readers.fixed_records import write_records

COUNT = 50
INPUTS = np.arange(COUNT * 3, dtype=np.float32).reshape(COUNT, 3) + 0.5
TARGETS = np.arange(COUNT) % 4
ROWS = [{"input": x.tolist(), "target": int(y)} for x, y in zip(INPUTS, TARGETS, strict=True)]


def config(folder: Path, **chosen: Any) -> DataConfig:
    return DataConfig(**{"num_workers": 0, "cache_dir": str(folder / "cache"), **chosen})


def lines(folder: Path, rows: Any = ROWS, name: str = "x.jsonl") -> Path:
    file = folder / name
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def write_json(file: Path) -> None:
    file.write_text(json.dumps(ROWS))


def write_columns(file: Path) -> None:
    file.write_text(json.dumps({"input": INPUTS.tolist(), "target": TARGETS.tolist()}))


def write_hdf5(file: Path) -> None:
    with h5py.File(file, "w") as opened:
        opened["input"], opened["target"] = INPUTS, TARGETS


def write_pickle(file: Path) -> None:
    file.write_bytes(pickle.dumps(ROWS))


def write_npz(file: Path) -> None:
    np.savez(file, input=INPUTS, target=TARGETS)


def write_binary(file: Path) -> None:
    write_records(file, {"input": INPUTS, "target": TARGETS})


FILES = {
    "a.json": write_json, "b.json": write_columns, "c.jsonl": lambda f: lines(f.parent, name=f.name),
    "d.h5": write_hdf5, "e.pkl": write_pickle, "f.npz": write_npz, "g.bin": write_binary,
}  # fmt: skip


def firsts(loader: Any) -> list[float]:
    return [
        float(x) for batch in loader for x in batch["input"].reshape(len(batch["input"]), -1)[:, 0]
    ]


@pytest.mark.spec("B1", "B2", "B10", "B11", "B12", "B13")
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["cached", "streaming"])
def test_every_format_gives_the_files_numbers_once(name: str, kind: Any, tmp_path: Path) -> None:
    """Spec: B1, B2, B10, B11, B12, B13."""
    FILES[name](tmp_path / name)
    chosen = config(tmp_path, shuffle=False, batch_size=16, quality_threshold=0.0)
    loader = DataLoaderFactory.create_loader(tmp_path / name, chosen, kind)
    batches = list(loader)
    assert [len(batch["input"]) for batch in batches] == [16, 16, 16, 2]
    assert len(loader) == 4
    assert all(set(batch) == {"input", "target"} for batch in batches)
    whole = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    assert torch.equal(whole["input"], torch.from_numpy(INPUTS))
    assert whole["input"].dtype == torch.float32
    assert torch.equal(whole["target"], torch.from_numpy(TARGETS))


@pytest.mark.spec("B2")
def test_integers_stay_integers_and_a_missing_target_stays_missing(tmp_path: Path) -> None:
    """Spec: B2. Planted fault: `_tensor` that made all floats."""
    np.save(tmp_path / "x.npy", np.arange(24, dtype=np.int16).reshape(6, 2, 2))
    [batch] = DataLoaderFactory.create_loader(tmp_path / "x.npy", config(tmp_path, shuffle=False))
    assert set(batch) == {"input"}
    assert batch["input"].dtype == torch.int64
    assert batch["input"].shape == (6, 2, 2)
    np.savez(tmp_path / "y.npz", input=np.ones((4, 2)), target=np.full((4, 2), 0.25))
    [batch] = DataLoaderFactory.create_loader(
        tmp_path / "y.npz", config(tmp_path, quality_threshold=0.0)
    )
    assert batch["input"].dtype == batch["target"].dtype == torch.float32
    assert batch["target"].tolist() == [[0.25, 0.25]] * 4


@pytest.mark.spec("B4", "B5")
@pytest.mark.parametrize("streaming", [False, True])
def test_workers_change_nothing(streaming: bool, tmp_path: Path) -> None:
    """Spec: B4, B5."""
    file = lines(tmp_path)
    orders = []
    for workers in (0, 2, 4):
        for persistent in (True, False):
            chosen = config(
                tmp_path, num_workers=workers, batch_size=7, streaming=streaming,
                persistent_workers=persistent, prefetch_factor=3,
            )  # fmt: skip
            loader = DataLoaderFactory.create_loader(file, chosen)
            orders.append([firsts(loader) for _ in range(3)])
    assert all(order == orders[0] for order in orders)
    assert len({tuple(epoch) for epoch in orders[0]}) == 3
    assert all(sorted(epoch) == INPUTS[:, 0].tolist() for epoch in orders[0])
    other = DataLoaderFactory.create_loader(file, config(tmp_path, seed=1, streaming=streaming))
    assert firsts(other) != orders[0][0]


@pytest.mark.spec("B3")
def test_the_last_batch_may_be_left_out(tmp_path: Path) -> None:
    """Spec: B3."""
    chosen = config(tmp_path, batch_size=16, drop_last=True)
    loader = DataLoaderFactory.create_loader(lines(tmp_path), chosen)
    assert [len(batch["input"]) for batch in loader] == [16, 16, 16]
    assert len(loader) == 3


@pytest.mark.spec("B6", "B15")
@pytest.mark.parametrize("workers", [0, 2])
def test_the_cache_is_bounded_and_counted_in_workers_too(workers: int, tmp_path: Path) -> None:
    """Spec: B6, B15."""
    file = lines(tmp_path)
    loader = DataLoaderFactory.create_loader(
        file, config(tmp_path, cache_size=10, num_workers=workers, batch_size=5)
    )
    expected = [firsts(loader), firsts(loader)]
    stats = loader.get_cache_stats()
    assert stats["cache_hits"] + stats["cache_misses"] == 2 * COUNT
    assert stats["cache_hits"] > 0
    assert stats["cache_size"] <= stats["max_cache_size"] * max(1, workers)
    assert stats["hit_rate"] == stats["cache_hits"] / (2 * COUNT)
    off = DataLoaderFactory.create_loader(file, config(tmp_path, cache_size=0, batch_size=5))
    assert [firsts(off), firsts(off)] == expected
    assert off.get_cache_stats()["cache_hits"] == 0


@pytest.mark.spec("B8", "B16")
@pytest.mark.parametrize("streaming", [False, True])
def test_a_split_is_disjoint_exhaustive_and_reproducible(streaming: bool, tmp_path: Path) -> None:
    """Spec: B8, B16."""
    file = lines(tmp_path)
    chosen = config(tmp_path, validation_split=0.3, streaming=streaming, batch_size=8)
    training, validation = DataLoaderFactory.create_validation_split(file, chosen)
    assert (training.samples, validation.samples) == (35, 15)
    assert len(validation) == len(list(validation)) == 2
    found = firsts(training), firsts(validation)
    assert sorted(found[0] + found[1]) == INPUTS[:, 0].tolist()
    assert firsts(validation) == found[1]
    again = DataLoaderFactory.create_validation_split(file, chosen)
    assert (firsts(again[0]), firsts(again[1])) == found
    other = DataLoaderFactory.create_validation_split(
        file, config(tmp_path, validation_split=0.3, streaming=streaming, seed=5)
    )
    assert firsts(other[1]) != found[1]


@pytest.mark.spec("B9", "B14")
def test_bad_rows_are_left_out_and_counted_and_good_ones_untouched(tmp_path: Path) -> None:
    """Spec: B9, B14."""
    bad = [{"input": [1.0], "target": 1}, {"input": [None, 1.0, 2.0], "target": 0}, {"target": 2}]
    negative = [{"input": [-1.0, -2.0, -3.0], "target": 3}]
    file = lines(tmp_path, [*ROWS, *bad, *negative])
    loader = DataLoaderFactory.create_loader(file, config(tmp_path, shuffle=False))
    assert firsts(loader) == [*INPUTS[:, 0].tolist(), -1.0]
    assert loader.get_quality_stats() == {
        "total_samples": COUNT + 4, "kept_samples": COUNT + 1, "filtered_samples": 3,
        "reasons": {"missing field": 1, "wrong length": 1, "not finite": 1}, "threshold": 0.8,
    }  # fmt: skip
    with pytest.raises(PluginError, match="record 50, field 'input'"):
        DataLoaderFactory.create_loader(file, config(tmp_path, quality_threshold=0.0))


@pytest.mark.spec("B9", "B14")
def test_a_validator_looks_at_one_sample() -> None:
    """Spec: B9, B14."""
    validator = QualityValidator(0.6)
    assert validator.validate_sample({"input": [-5.0, 2.0], "target": 1})
    assert validator.validate_sample({"input": torch.tensor([1, 2, 3])})
    assert not validator.validate_sample({"target": 1})
    assert not validator.validate_sample({"input": "text"})
    assert not validator.validate_sample({"input": [float("nan"), 2.0]})
    assert QualityValidator(0.5).validate_sample({"input": [float("nan"), 2.0]})
    assert validator.get_stats() == {
        "total_samples": 5, "kept_samples": 2, "filtered_samples": 3, "threshold": 0.6,
        "reasons": {"missing field": 1, "wrong type": 1, "not finite": 1},
    }  # fmt: skip
    with pytest.raises(SettingError, match="from 0 to 1"):
        QualityValidator(2)


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("made-by-pickle",)


@pytest.mark.spec("B12", "B13")
def test_files_that_are_hostile_or_broken_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spec: B12, B13."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps([Evil()]))
    (tmp_path / "x.frec").write_bytes(b"FORGEREC" + b"\xff" * 40)
    for name, told in (("x.pkl", "mkdir"), ("x.frec", "header"), ("none.json", "no such file")):
        with pytest.raises(PluginError, match=told):
            DataLoaderFactory.create_loader(name, config(tmp_path))
    assert not (tmp_path / "made-by-pickle").exists()
    with pytest.raises(PluginError):
        DataLoaderFactory.create_loader("x.pkl", config(tmp_path, trust_pickle=True))
    assert (tmp_path / "made-by-pickle").exists()


@pytest.mark.spec("B7")
@pytest.mark.parametrize("workers", [0, 2, 3])
def test_a_streaming_dataset_shares_itself_out_to_torchs_workers(
    workers: int, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Spec: B7. Planted fault: without the stride each worker gave the whole file."""
    dataset = StreamingDataset(lines(tmp_path), config(tmp_path, batch_size=4))
    if workers == 3:
        workers = 2
        dataset.set_epoch(5)
    loader = DataLoader(dataset, batch_size=4, num_workers=workers)
    found = firsts(loader)
    assert sorted(found) == INPUTS[:, 0].tolist()
    assert found != INPUTS[:, 0].tolist()


@pytest.mark.spec("B6")
def test_a_cached_dataset_is_read_by_number(tmp_path: Path) -> None:
    """Spec: B6."""
    dataset = CachedDataset(lines(tmp_path), config(tmp_path, cache_size=20))
    assert len(dataset) == COUNT
    for _ in range(2):
        for number in range(15):
            sample = dataset[number]
            assert torch.equal(sample["input"], torch.from_numpy(INPUTS[number]))
            assert sample["target"] == TARGETS[number]
    stats = dataset.get_cache_stats()
    assert (stats["cache_hits"], stats["cache_misses"], stats["hit_rate"]) == (15, 15, 0.5)
    assert (stats["cache_size"], stats["max_cache_size"]) == (15, 20)
    assert firsts(DataLoader(dataset, batch_size=8)) == INPUTS[:, 0].tolist()
    assert dataset.get_cache_stats()["cache_size"] == 20
    assert torch.equal(dataset[-1]["input"], torch.from_numpy(INPUTS[-1]))
    with pytest.raises(IndexError, match="no sample 50"):
        dataset[50]


def test_columns_can_be_named_and_others_are_left_alone(tmp_path: Path) -> None:
    rows = [{"pixels": r["input"], "label": r["target"], "name": "a", "problem": 1} for r in ROWS]
    named = {"input_column": "pixels", "target_column": "label", "quality_threshold": 0.0}
    file = lines(tmp_path, rows)
    loader = DataLoaderFactory.create_loader(file, config(tmp_path, shuffle=False, **named))
    batch = next(iter(loader))
    assert batch["input"].tolist() == INPUTS[:32].tolist()
    assert batch["target"].tolist() == TARGETS[:32].tolist()
    with pytest.raises(PluginError, match="did you mean 'pixels'"):
        CachedDataset(file, config(tmp_path, input_column="pixel"))
    with pytest.raises(PluginError, match="no field 'labels'"):
        CachedDataset(file, config(tmp_path, **{**named, "target_column": "labels"}))


def test_drop_last_that_leaves_no_batch_is_the_loaders_matter(tmp_path: Path) -> None:
    """Planted fault: a loader with one sample less than a batch gave nothing, without a word."""
    chosen = config(tmp_path, batch_size=COUNT + 1, drop_last=True)
    with pytest.raises(PluginError, match="50 samples .* batch has 51 .*drop_last"):
        DataLoaderFactory.create_loader(lines(tmp_path), chosen)
    assert len(CachedDataset(lines(tmp_path), chosen)) == COUNT
    assert len(list(StreamingDataset(lines(tmp_path), chosen))) == COUNT


def test_integers_stay_integers_and_true_and_false_are_1_and_0(tmp_path: Path) -> None:
    rows = [{"input": [2**24, 2**24 + 1], "target": True}, {"input": [1, 2], "target": False}]
    loader = DataLoaderFactory.create_loader(lines(tmp_path, rows), config(tmp_path, shuffle=False))
    batch = next(iter(loader))
    assert batch["input"].tolist() == [[2**24, 2**24 + 1], [1, 2]]
    assert batch["target"].tolist() == [1, 0]


@pytest.mark.spec("B7")
@pytest.mark.parametrize("streaming", [False, True])
def test_a_loader_goes_on_at_its_position(streaming: bool, tmp_path: Path) -> None:
    """Spec: B7."""
    file = lines(tmp_path)
    made = DataLoaderFactory.create_loader
    straight = made(file, config(tmp_path, batch_size=6, streaming=streaming))
    whole = firsts(straight) + firsts(straight)
    cut = made(file, config(tmp_path, batch_size=6, streaming=streaming, num_workers=2))
    first = firsts(cut) + firsts(islice(cut, 4))
    state = json.loads(json.dumps(cut.state_dict()))
    rest = made(file, config(tmp_path, batch_size=6, streaming=streaming))
    rest.load_state_dict(state)
    assert first + firsts(rest) == whole
    firsts(islice(straight, 2))
    assert sorted(firsts(straight)) == INPUTS[:, 0].tolist()  # a new epoch, not the rest of one


def test_texts_and_tokens_are_windows_with_the_next_token(tmp_path: Path) -> None:
    """Spec: B2."""
    (tmp_path / "x.txt").write_text("abcdefghijklmnopq")
    chosen = config(tmp_path, max_sequence_length=8, shuffle=False)
    [batch] = DataLoaderFactory.create_loader(tmp_path / "x.txt", chosen)
    assert bytes(batch["input"][1].tolist()) == b"ijklmnop"
    assert bytes(batch["target"][1].tolist()) == b"jklmnopq"
    np.arange(33, dtype=np.uint16).tofile(tmp_path / "x.dat")
    chosen.data_format = DataFormat.TOKENIZED
    [batch] = DataLoaderFactory.create_loader(tmp_path / "x.dat", chosen)
    assert batch["input"].shape == (4, 8)
    rows = [{"input": list(range(9)), "target": 1}] * 2
    chosen = config(tmp_path, max_sequence_length=4, quality_threshold=0.0)
    [batch] = DataLoaderFactory.create_loader(lines(tmp_path, rows), chosen)
    assert batch["input"].tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.spec("B15", "B17")
def test_a_profile_tells_what_was_measured_and_nothing_else(tmp_path: Path) -> None:
    """Spec: B15, B17."""
    empty = DataLoadingProfiler().get_report()
    assert empty["batches"] == 0
    assert empty["samples_per_second"] is None
    loader = create_optimized_loader(
        lines(tmp_path), 16, 0, cache_dir=str(tmp_path / "c"), cache_size=5
    )
    assert loader.profiler is not None
    firsts(loader)
    report = loader.profiler.get_report()
    assert (report["batches"], report["samples"]) == (4, COUNT)
    assert report["samples_per_second"] == pytest.approx(COUNT / report["loading_seconds"])
    assert report["max_batch_seconds"] >= report["mean_batch_seconds"] > 0
    assert report["cache"]["cache_misses"] == COUNT
    assert report["quality"]["kept_samples"] == COUNT
    loader.profiler.start_profiling()
    assert loader.profiler.get_report()["batches"] == 0


@pytest.mark.parametrize(
    "chosen",
    [
        {"batch_size": 0}, {"num_workers": -1}, {"validation_split": 1.0}, {"cache_size": -1},
        {"quality_threshold": 2.0}, {"prefetch_factor": 0}, {"max_sequence_length": 0},
        {"data_format": "xml"}, {"batch_size": True},
    ],
    ids=str,
)  # fmt: skip
def test_settings_outside_their_bounds_are_refused(chosen: Any) -> None:
    """Spec: B3, B4, B6, B8, B9."""
    with pytest.raises(SettingError, match=next(iter(chosen))):
        DataConfig(**chosen)


def test_an_unknown_dataset_type_is_refused(tmp_path: Path) -> None:
    """Spec: B7."""
    kind: Any = "lazy"
    with pytest.raises(SettingError, match="'cached' or 'streaming'"):
        DataLoaderFactory.create_loader(lines(tmp_path), config(tmp_path), kind)
