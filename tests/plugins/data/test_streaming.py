"""Streaming: the order, the split, the shares of processes and the position are functions."""

from __future__ import annotations

import json
import sys
import time
from itertools import chain, islice
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_parts import StopAfter

from forge_kernel import load_pipeline, resume, run
from forge_kernel.storage.checkpoint_store import CheckpointStore
from forge_kernel.testing.compare import differences
from forge_plugins.data.file_batches import FileData
from forge_plugins.data.file_config import FileConfig
from forge_plugins.data.permutations import BlockOrder, HashSplit, UnevenOrder, permuted
from forge_plugins.data.resumable_epochs import Epochs
from forge_plugins.formats.columns.table import Table
from forge_plugins.formats.inspection.quality import assess
from forge_plugins.formats.inspection.quality_scan import ScanOptions, ScanResult, scan, scanned


def streamed(
    count: int,
    seed: int = 0,
    *,
    rank: int = 0,
    world: int = 1,
    streaming: bool = True,
    **chosen: Any,
) -> FileData:
    """Samples whose input is their number."""
    inputs = np.arange(count, dtype=np.float32)[:, None]
    table = Table(Path("memory"), "npy", {"input": inputs, "target": np.arange(count) % 3})
    config = FileConfig(streaming=streaming, **chosen)
    found: Any = ScanResult(0.0, count, None, {}, None, 2, None)
    if not streaming:
        found = scanned(assess(table, target="class"), 0.0)
    return FileData(table, found, config, seed, rank=rank, world=world)


def ids(batches: Any) -> list[int]:
    return [int(i) for batch in batches for i in batch.inputs[:, 0]]


@given(count=st.integers(1, 5000), key=st.integers(0, 2**60))
@settings(max_examples=60, deadline=None)
def test_a_keyed_permutation_is_one(count: int, key: int) -> None:
    found = permuted(np.arange(count), count, key)
    assert np.array_equal(np.sort(found), np.arange(count))


@given(
    count=st.integers(0, 3000),
    block=st.integers(1, 70),
    window=st.integers(1, 9),
    key=st.integers(0, 2**60),
    data=st.data(),
)
@settings(max_examples=80, deadline=None)
def test_an_order_by_blocks_is_a_permutation_of_which_any_part_is_known(
    count: int, block: int, window: int, key: int, data: st.DataObject
) -> None:
    order = BlockOrder(count, block, window)
    check_windows(order, count, key, data)


def check_windows(order: Any, count: int, key: int, data: st.DataObject) -> None:
    """The windows that follow each other are a permutation, and any place tells its window."""
    parts, place = [], 0
    while place < count:
        number, first = order.at(key, place)
        assert number >= len(parts)
        assert first == place
        parts += [order.window(key, empty) for empty in range(len(parts), number)]
        assert sum(map(len, parts)) == place
        parts.append(order.window(key, number))
        place += len(parts[-1])
    whole = np.concatenate(parts) if parts else np.zeros(0, np.int64)
    assert np.array_equal(np.sort(whole), np.arange(count))
    if count:
        place = data.draw(st.integers(0, count - 1))
        number, first = order.at(key, place)
        assert order.window(key, number)[place - first] == whole[place]


@given(
    sizes=st.lists(st.integers(0, 70), min_size=1, max_size=60),
    window=st.integers(1, 9),
    key=st.integers(0, 2**60),
    data=st.data(),
)
@settings(max_examples=80, deadline=None)
def test_an_order_of_uneven_blocks_is_one_and_takes_each_block_in_one_window(
    sizes: list[int], window: int, key: int, data: st.DataObject
) -> None:
    bounds = np.cumsum([0, *sizes])
    order = UnevenOrder(bounds, window)
    check_windows(order, int(bounds[-1]), key, data)
    seen: set[int] = set()
    for number in range(len(order._begins) - 1):
        blocks = {int(np.searchsorted(bounds, s, "right")) for s in order.window(key, number)}
        assert len(blocks) <= window
        assert not blocks & seen
        seen |= blocks


@given(count=st.integers(1, 2000), share=st.floats(0, 0.99), key=st.integers(0, 2**60))
@settings(max_examples=60, deadline=None)
def test_the_samples_trained_on_before_a_sample_are_counted(
    count: int, share: float, key: int
) -> None:
    split = HashSplit(count, share, key)
    training = split.training_samples(np.arange(split.training))
    numbers = np.arange(count + 1)
    assert np.array_equal(split.training_before(numbers), np.searchsorted(training, numbers))


@given(
    count=st.integers(1, 4000), share=st.floats(0, 0.99), key=st.integers(0, 2**60), data=st.data()
)
@settings(max_examples=100, deadline=None)
def test_a_split_by_hash_is_disjoint_exhaustive_and_of_the_size_asked_for(
    count: int, share: float, key: int, data: st.DataObject
) -> None:
    split = HashSplit(count, share, key)
    validation = split.validation_samples(np.arange(split.validation))
    training = split.training_samples(np.arange(split.training))
    assert np.array_equal(np.sort(np.concatenate([validation, training])), np.arange(count))
    wanted = min(max(1, round(count * share)), count - 1) if share else 0
    assert len(validation) == wanted
    assert (np.diff(training) > 0).all()
    some = np.array(data.draw(st.lists(st.integers(0, split.training - 1), max_size=9)), np.int64)
    assert np.array_equal(HashSplit(count, share, key).training_samples(some), training[some])


@pytest.mark.spec("B8", "B16")
def test_the_split_follows_its_seed_and_appended_samples_leave_the_order_of_strata() -> None:
    parts = [ids(streamed(5000, seed).validation()) for seed in (0, 0, 1)]
    assert parts[0] == parts[1] != parts[2]
    fixed = [ids(streamed(5000, seed, split_seed=4).validation()) for seed in (0, 1)]
    assert fixed[0] == fixed[1]


@pytest.mark.spec("B7")
@given(
    count=st.integers(2, 400),
    size=st.integers(1, 50),
    world=st.integers(1, 5),
    share=st.floats(0, 0.8),
    streaming=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_processes_share_each_batch_and_every_sample_is_read_once(
    count: int, size: int, world: int, share: float, streaming: bool
) -> None:
    """Planted fault: a rank that read the whole batch repeated every sample."""
    parts = [
        streamed(
            count, rank=rank, world=world, batch_size=size, validation_split=share,
            streaming=streaming,
        )
        for rank in range(world)
    ]  # fmt: skip
    alone = streamed(count, batch_size=size * world, validation_split=share, streaming=streaming)
    lots = [list(part.batches(1, 0)) for part in parts]
    assert len({len(lot) for lot in lots}) == 1  # all take each step
    for batches, whole in zip(zip(*lots, strict=True), alone.batches(1, 0), strict=True):
        real = [b for b in batches if b.weights is None]
        assert sorted(ids(real)) == sorted(ids([whole]))
        for filler in (b for b in batches if b.weights is not None):
            assert filler.weights.tolist() == [0.0]
    validation = sorted(i for part in parts for i in ids(part.validation()))
    assert validation == sorted(ids(alone.validation()))
    assert sorted(validation + ids(alone.batches(0, 0))) == list(range(count))


@pytest.mark.spec("B4", "B7")
@pytest.mark.parametrize("streaming", [True, False])
def test_workers_only_fetch(streaming: bool) -> None:
    def read(workers: int) -> list[list[int]]:
        data = streamed(500, batch_size=16, workers=workers, streaming=streaming)
        before = torch.get_rng_state()
        found = [ids(data.batches(0, 0)), ids(data.batches(1, 3)), ids(data.batches(2, 0))]
        assert torch.equal(torch.get_rng_state(), before)
        return found

    assert read(0) == read(2) == read(4)


@pytest.mark.spec("B5", "B7")
@given(
    count=st.integers(2, 300),
    size=st.integers(1, 40),
    stop=st.integers(0, 30),
    drop=st.booleans(),
    streaming=st.booleans(),
    second=st.integers(1, 5),
)
@settings(max_examples=80, deadline=None)
def test_a_position_is_taken_up_at_any_batch_first_and_second_time(
    count: int, size: int, stop: int, drop: bool, streaming: bool, second: int
) -> None:
    chosen = {
        "batch_size": size,
        "drop_last": drop,
        "streaming": streaming,
        "validation_split": 0.1,
    }
    straight = Epochs(streamed(count, **chosen))
    if not len(straight):
        return
    whole = [ids([batch]) for _ in range(3) for batch in straight]
    stop = min(stop, 2 * len(straight))
    found, state = [], None
    for amount in (stop, second, 10**6):
        epochs = Epochs(streamed(count, **chosen))
        if state is not None:
            epochs.load_state_dict(json.loads(json.dumps(state)))
        rest = min(amount, len(whole) - len(found))
        endless = chain.from_iterable(iter(epochs) for _ in range(4))
        found += [ids([batch]) for batch in islice(endless, rest)]
        state = epochs.state_dict()
        assert len(json.dumps(state)) <= 300
    assert found == whole


@pytest.mark.spec("B7")
@given(
    count=st.integers(30, 200),
    worlds=st.permutations([(1, 12), (2, 6), (3, 4), (4, 3)]),
    stop=st.integers(0, 6),
    streaming=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_a_position_is_taken_up_by_other_processes_with_the_same_global_batch(
    count: int, worlds: Any, stop: int, streaming: bool
) -> None:
    """Planted fault: a place counted in batches of one process lost and repeated samples."""
    straight = [
        sorted(ids([batch]))
        for batch in streamed(
            count, batch_size=12, streaming=streaming, validation_split=0.2
        ).batches(0, 0)
    ]
    found: list[list[int]] = []
    state: Any = None
    for (world, size), amount in zip(worlds, (stop, 1, 2, 10**6), strict=True):
        parts = [
            Epochs(
                streamed(
                    count,
                    rank=rank,
                    world=world,
                    batch_size=size,
                    streaming=streaming,
                    validation_split=0.2,
                )
            )
            for rank in range(world)
        ]
        for part in parts:
            if state is not None:
                part.load_state_dict(json.loads(json.dumps(state)))
        if state is not None and parts[0].epoch:
            break
        for lot in islice(zip(*map(iter, parts), strict=True), amount):
            found.append(sorted(ids([b for b in lot if b.weights is None])))
        assert len({json.dumps(part.state_dict()) for part in parts}) == 1
        state = parts[-1].state_dict()
    assert found == straight


def test_a_position_with_workers_counts_what_was_handed_out() -> None:
    straight = ids(streamed(300, batch_size=7).batches(0, 0))
    epochs = Epochs(streamed(300, batch_size=7, workers=2))
    iterator = iter(epochs)
    found = [ids([next(iterator)]) for _ in range(5)]
    state = epochs.state_dict()
    assert state["place"] == 35
    for workers in (0, 3):
        again = Epochs(streamed(300, batch_size=7, workers=workers))
        again.load_state_dict(state)
        assert [*chain.from_iterable(found), *ids(again)] == straight


@pytest.mark.parametrize(
    ("change", "told"),
    [({"seed": 1}, "seed is 1"), ({"samples": 3}, "samples is 3"), ({"content": "x"}, "content")],
)
def test_a_position_of_other_data_is_refused(change: Any, told: str) -> None:
    epochs = Epochs(streamed(50))
    with pytest.raises(ValueError, match=told):
        epochs.load_state_dict({**epochs.state_dict(), **change})


def test_a_position_in_ten_million_samples_is_taken_up_at_once() -> None:
    """No wall-clock bar here (see benchmarks/data.py): what is computed is a window or two."""
    zeros = np.broadcast_to(np.float32(0), (10_000_000, 1))
    table = Table(Path("memory"), "npy", {"input": zeros})
    config = FileConfig(streaming=True, target="none")
    data = FileData(table, ScanResult(0.0, 10_000_000, None, {}, None, None, None), config, 0)
    asked: list[int] = []
    split = data.sampler._split  # type: ignore[attr-defined]
    plain = split.training_samples
    split.training_samples = lambda places: asked.append(len(places)) or plain(places)
    begin = time.process_time()
    next(data.batches(3, 70_000 * config.batch_size))
    assert sum(asked) <= 2 * 64 * 256
    print(f"{time.process_time() - begin:.4f} s to the first batch")


def chi_squared(order: np.ndarray, count: int, size: int) -> float:
    labels = (order * 10 // count).astype(np.int64)
    lots = labels[: len(labels) // size * size].reshape(-1, size)
    counts = np.stack([(lots == label).sum(1) for label in range(10)], 1)
    expected = size / 10
    return float(((counts - expected) ** 2 / expected).sum() / (len(lots) * 9))


def test_the_shuffle_mixes_a_file_in_order_of_its_labels() -> None:
    count = 200_000
    by_blocks = streamed(count, validation_split=0.0, batch_size=256)
    assert chi_squared(by_blocks.sampler.training_samples(0, 0, count), count, 256) <= 2.0
    full = streamed(count, validation_split=0.0, streaming=False)
    assert chi_squared(full.sampler.training_samples(0, 0, count), count, 256) <= 1.1


@given(
    rows=st.lists(
        st.lists(st.sampled_from([0.0, 1.0, np.nan, 5000.0]), min_size=2, max_size=2),
        min_size=1,
        max_size=60,
    ),
    part=st.integers(8, 200),
    threshold=st.sampled_from([0.0, 0.4, 0.9]),
)
@settings(max_examples=60, deadline=None)
def test_a_survey_in_parts_finds_what_a_look_at_the_whole_finds(
    rows: Any, part: int, threshold: float, tmp_path_factory: Any
) -> None:
    inputs = np.array(rows, np.float32)
    inputs[:, 0] += np.arange(len(rows)) * 10  # no sample repeats another
    table = Table(Path("memory"), "npy", {"input": inputs, "target": np.arange(len(rows)) % 4})
    whole = assess(table, target="class", classes=3, thorough=threshold > 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("forge_plugins.formats.inspection.quality_scan.PART_BYTES", part)
        asked = ScanOptions(
            inputs="features", target="class", classes=3, vocabulary=None, threshold=threshold,
            parts=True,
        )  # fmt: skip
        found = scan(table, asked, tmp_path_factory.mktemp("survey"))
    kept = whole.kept(threshold)
    assert found.kept_count == len(kept)
    index = np.arange(len(rows)) if found.index is None else found.index
    assert np.array_equal(index, kept)
    assert found.left_out == whole.left_out(threshold)
    assert found.unusable == whole.unusable(threshold)
    assert (found.largest_label, found.largest_token) == (whole.largest_label, None)


def test_a_streamed_run_resumes_bit_for_bit_with_other_workers(tmp_path: Path) -> None:
    options = [
        "data.with.streaming=true", "run.max_steps=40", "run.device=cpu", "data.with.batch_size=64",
        f"data.with.cache_dir={tmp_path / 'cache'}", "run.save_every=17", "run.keep_checkpoints=9",
        "observers=[]", "run.validate_every=13",
    ]  # fmt: skip
    straight = run(load_pipeline("digits_json", options), output_dir=tmp_path / "a", quiet=True)
    assert straight.final["validation_loss"] is not None
    stop = StopAfter(17)
    pipeline = load_pipeline("digits_json", options)
    cut = run(pipeline, output_dir=tmp_path / "b", plugins=[stop], cancel=stop, quiet=True)
    assert (cut.outcome, cut.steps) == ("stopped", 17)
    resume(tmp_path / "b", ["data.with.workers=2"], plugins=[stop], quiet=True)
    left, right = (CheckpointStore(tmp_path / name / "checkpoints").path(40) for name in "ab")
    assert differences(left, right) == []


READER = """
import sys
from pathlib import Path
from forge_plugins.data.file import File, FileConfig
from forge_kernel.config.pipeline import RunConfig
from forge_kernel.training.one_process import OneProcess
import resource, torch
class Run:
    seed, strategy, settings = 0, OneProcess(), RunConfig()
    def emit_event(self, *_, **__): pass
def data(path):
    config = FileConfig(path=path, cache_dir=sys.argv[3], streaming=True, classes=10,
                        batch_size=2048, quality_threshold=float(sys.argv[4]), validation_split=0.1)
    return File(config).make_data(Run())
for batch in data(sys.argv[2]).batches(0, 0): pass
for line in open("/proc/self/status"):
    if line.startswith("VmData"):
        held = int(line.split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (held + 64 * 2**20,) * 2)
large = data(sys.argv[1])
seen = sum(len(batch.inputs) for epoch in range(2) for batch in large.batches(epoch, 0))
print(seen, sum(len(batch.inputs) for batch in large.validation()), large.left_out)
"""


@pytest.mark.spec("B7")
@pytest.mark.parametrize("threshold", ["0", "0.5"])
def test_a_file_larger_than_the_memory_is_streamed(threshold: str, tmp_path: Path) -> None:
    """Planted fault: `IndexSampler` and `assess` ended with MemoryError."""
    count = 3_000_000
    inputs = np.lib.format.open_memmap(
        tmp_path / "x.npy", "w+", np.dtype([("input", "<f4", (8,)), ("target", "<i8")]), (count,)
    )
    for begin in range(0, count, 100_000):
        rows = inputs[begin : begin + 100_000]
        rows["input"] = np.random.default_rng(begin).standard_normal((100_000, 8), np.float32)
        rows["target"] = np.arange(100_000) % 10
    if threshold != "0":
        inputs["target"][[5, count - 7]] = -1
    inputs.flush()
    np.save(tmp_path / "small.npy", inputs[1000:1200])
    words = [str(tmp_path / name) for name in ("x.npy", "small.npy", "cache")]
    done = forked.run(
        [sys.executable, "-c", READER, *words, threshold],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1500:]
    seen, validation, left_out = done.stdout.split(" ", 2)
    assert int(seen) // 2 + int(validation) == count - (2 if threshold != "0" else 0)
    expected = {"label out of range": 2} if threshold != "0" else {}
    assert left_out.strip() == str(expected)


@pytest.mark.spec("B6", "B15")
@pytest.mark.parametrize("workers", [0, 2])
def test_the_cache_is_bounded_counted_and_changes_no_batch(workers: int) -> None:
    plain = streamed(100, batch_size=8)
    kept = streamed(100, batch_size=8, cache_size=30, workers=workers)
    for epoch in range(2):
        for one, other in zip(plain.batches(epoch, 0), kept.batches(epoch, 0), strict=True):
            assert torch.equal(one.inputs, other.inputs)
            assert torch.equal(one.targets, other.targets)
        metrics = kept.get_cache_stats()
        assert metrics["values"] <= 30 * max(1, workers)
        assert metrics["hits"] + metrics["loads"] == 90 * (epoch + 1)
        if not workers:
            assert metrics["hits"] == 30 * epoch
    assert metrics["hits"] > 0
    assert metrics["seconds"] > 0
    off = plain.get_cache_stats()
    assert (off["hits"], off["loads"], off["values"]) == (0, 0, 0)


def test_a_run_says_when_its_cache_does_not_help(tmp_path: Path) -> None:
    options = [
        "run.max_epochs=3", "run.max_steps=null", "run.device=cpu", "observers=[]",
        "data.with.cache_size=20", "data.with.cache_policy=lru", "exporters=[]", "quantizer=null",
        "validators=[]", "callbacks=[]", "regularizers=[]", "run.validate_every=null",
    ]  # fmt: skip
    told: list[dict[str, Any]] = []
    result = run(
        load_pipeline("digits_binary", options), output_dir=tmp_path / "a", on_progress=told.append,
        quiet=True,
    )  # fmt: skip
    events = [event for event in told if event.get("name") == "cache_useless"]
    assert len(events) == 1
    assert "give it more, or none" in events[0]["message"]
    assert result.final["cache_hit_rate"] == 0.0
