"""HDF5 in chunks, read in place: the numbers that the library reads, at any block and bound."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forge_kernel.contract.run_config import RunConfig
from forge_kernel.errors import RunError
from forge_kernel.training.one_process import OneProcess
from forge_plugins.data.file import File
from forge_plugins.data.file_config import FileConfig
from forge_plugins.formats.columns.chunks import MappedChunks, PackedChunks, fletcher32
from forge_plugins.formats.columns.layout import Layout
from forge_plugins.formats.columns.mapping import map_layout
from forge_plugins.formats.columns.table import take
from forge_plugins.formats.errors import DataError
from forge_plugins.formats.format import Reading
from forge_plugins.formats.open_table import open_table
from forge_plugins.formats.readers.hdf5 import layouts

STREAMING = Reading(streaming=True)


@st.composite
def chunkings(draw: st.DrawFn) -> tuple[np.ndarray, dict[str, Any]]:
    count, width = draw(st.integers(1, 60)), draw(st.integers(1, 30))
    kind = draw(st.sampled_from(["<f4", ">f4", "<i8", ">i2", "u1", "<f8", "?"]))
    numbers = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 2**15, (count, width))
    how: dict[str, Any] = {"chunks": (draw(st.integers(1, count)), width)}
    if draw(st.booleans()):
        how["compression"] = draw(st.sampled_from(["gzip", "lzf"]))
    how["shuffle"], how["fletcher32"] = draw(st.booleans()), draw(st.booleans())
    how["libver"] = draw(st.sampled_from(["earliest", "latest"]))
    return numbers.astype(kind), how


@given(made=chunkings(), budget=st.integers(1, 4000), data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_rows_in_chunks_are_the_rows_that_the_library_reads(
    made: tuple[np.ndarray, dict[str, Any]], budget: int, data: st.DataObject, tmp_path: Path
) -> None:
    numbers, how = made
    with h5py.File(tmp_path / "x.h5", "w", libver=how.pop("libver")) as file:
        file.create_dataset("input", data=numbers, **how)
    found = layouts(tmp_path / "x.h5", STREAMING)["input"]
    packed = any(how.get(name) for name in ("compression", "shuffle", "fletcher32"))
    if how.get("compression") == "lzf":
        assert found is None
        return
    assert found is not None
    column: Any = map_layout(tmp_path / "x.h5", "input", Layout.of(found.to_data()))
    assert isinstance(column, PackedChunks if packed else MappedChunks)
    if packed:
        column = PackedChunks(tmp_path / "x.h5", "input", found, budget)
    for _ in range(3):
        places = st.lists(st.integers(0, len(numbers) - 1), max_size=40)
        index = np.array(data.draw(places), np.int64)
        rows = take(column, index)
        assert rows.dtype == numbers.dtype.newbyteorder("=")
        assert np.array_equal(rows, numbers[index])
    if packed:
        assert np.array_equal(np.concatenate([rows.copy() for rows in column.pieces()]), numbers)
        assert np.array_equal(take(column, np.arange(len(numbers))), numbers)
    begin, end = sorted(data.draw(st.tuples(st.integers(0, 60), st.integers(0, 60))))
    assert np.array_equal(column[begin:end], numbers[begin:end])


@given(raw=st.one_of(st.binary(min_size=1, max_size=900), st.integers(1, 900).map(bytes)))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_checksum_is_the_librarys(raw: bytes, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        numbers = np.frombuffer(raw, np.uint8)
        made = file.create_dataset("x", data=numbers, chunks=numbers.shape, fletcher32=True)
        _, stored = made.id.read_direct_chunk((0,))
    assert fletcher32(raw) == int.from_bytes(stored[-4:], "little")


def write(path: Path, count: int = 3000, **how: Any) -> np.ndarray:
    inputs = np.random.default_rng(0).standard_normal((count, 32)).astype(np.float32)
    inputs[:, 0] = np.arange(count)
    with h5py.File(path, "w") as file:
        file.create_dataset("input", data=inputs, chunks=(50, 32), **how)
        file.create_dataset("target", data=np.arange(count) % 3)
    return inputs


class Run:
    seed, strategy, settings = 0, OneProcess(), RunConfig()

    def emit_event(self, *_: Any, **__: Any) -> None:
        """Nobody listens here."""


def made(path: Path, **chosen: Any) -> Any:
    config = FileConfig(path=str(path), cache_dir=str(path.parent / "cache"), **chosen)
    return File(config).make_data(Run())  # type: ignore[arg-type]


@pytest.mark.spec("B7", "B11")
@pytest.mark.parametrize("threshold", [0.0, 0.5])
@pytest.mark.parametrize("workers", [0, 2])
def test_packed_chunks_are_streamed_without_a_copy_each_once_an_epoch(
    workers: int, threshold: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted fault: blocks of 64 samples unpacked each chunk several times."""
    small(monkeypatch)
    inputs = write(tmp_path / "x.h5", compression="gzip", shuffle=True, fletcher32=True)
    if threshold:
        with h5py.File(tmp_path / "x.h5", "r+") as file:
            file["target"][100:170] = -1
    data = made(
        tmp_path / "x.h5", streaming=True, batch_size=64, workers=workers,
        quality_threshold=threshold, validation_split=0.2,
    )  # fmt: skip
    column = data.table.columns["input"]
    assert isinstance(column, PackedChunks)
    kept = [path for path in (tmp_path / "cache").glob("*/*.npy") if path.parent.name != "memos"]
    assert not kept  # nothing was converted
    batches = [*data.batches(0, 0)]
    seen = [int(row[0]) for batch in batches for row in batch.inputs]
    validation = [int(row[0]) for batch in data.validation() for row in batch.inputs]
    good = [at for at in range(3000) if not threshold or not 100 <= at < 170]
    assert sorted(seen + validation) == good
    assert len(validation) == round(0.2 * len(good))
    for batch in batches:
        index = batch.inputs[:, 0].numpy().astype(int)
        assert np.array_equal(batch.inputs.numpy(), inputs[index])
        assert np.array_equal(batch.targets.numpy(), index % 3)
    order = np.array(seen) // 50
    firsts = [list(order).index(chunk) for chunk in set(order)]
    lasts = [len(order) - 1 - list(order[::-1]).index(chunk) for chunk in set(order)]
    spans = [last - first for first, last in zip(firsts, lasts, strict=True)]
    assert max(spans) < 8 * 50 + 64  # each chunk is done with within its window of 8


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than 8 chunks are held."""
    begin = PackedChunks.__init__
    monkeypatch.setattr(
        PackedChunks, "__init__",
        lambda self, file, name, layout: begin(self, file, name, layout, 8 * 50 * 32 * 4),
    )  # fmt: skip


def test_each_chunk_is_unpacked_once_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted fault: with blocks of 64 places each chunk was unpacked five times."""
    write(tmp_path / "x.h5", compression="gzip")
    unpacked: list[int] = []
    plain = PackedChunks._unpack
    monkeypatch.setattr(
        PackedChunks, "_unpack", lambda self, n, to: (unpacked.append(n), plain(self, n, to))[1]
    )
    small(monkeypatch)
    data = made(tmp_path / "x.h5", streaming=True, batch_size=10, validation_split=0.3)
    for epoch in range(2):
        unpacked.clear()
        assert sum(len(batch.inputs) for batch in data.batches(epoch, 0)) == 2100
        assert len(unpacked) <= 60 + 8  # at most one twice at each edge of the 8 windows
    straight = [batch.inputs for batch in data.batches(5, 0)]
    again = made(tmp_path / "x.h5", streaming=True, batch_size=10, validation_split=0.3)
    for start in (0, 1, 17, 100, 209):
        assert (next(again.batches(5, start * 10)).inputs == straight[start]).all()


def test_a_chunk_that_breaks_while_it_is_trained_on_ends_the_run_with_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch)
    path = tmp_path / "x.h5"
    write(path, compression="gzip")
    data = made(path, streaming=True, shuffle=False, batch_size=50, validation_split=0.0)
    layout = data.table.columns["input"]._layout
    size, when = path.stat().st_size, path.stat()
    with path.open("r+b") as stream:
        stream.seek(int(layout.starts[20]) + 40)
        stream.write(b"\x00" * 64)
    os.utime(path, ns=(when.st_atime_ns, when.st_mtime_ns))  # as a broken disk would
    assert path.stat().st_size == size
    batches = data.batches(0, 0)
    for _ in range(20):
        next(batches)
    with pytest.raises(RunError, match="record 1000, field 'input': a chunk"):
        next(batches)


def test_chunks_that_lie_beyond_the_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.h5").write_bytes(bytes(100))
    starts = np.array([0, 90])
    layout = Layout(dtype="<f4", shape=(10, 2), chunk=5, starts=starts)
    with pytest.raises(DataError, match="ends at byte 130, the file at 100"):
        map_layout(tmp_path / "x.h5", "input", layout)


def test_layouts_that_are_known_are_not_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "x.h5")
    first = open_table(tmp_path / "x.h5", cache_dir=tmp_path / "c")
    monkeypatch.setattr("forge_plugins.formats.open_table.run_sandboxed", None)
    second = open_table(tmp_path / "x.h5", cache_dir=tmp_path / "c")
    assert np.array_equal(first.columns["input"][:], second.columns["input"][:])
    assert isinstance(second.columns["input"], MappedChunks)
    assert isinstance(second.columns["target"], np.ndarray)


def test_a_file_with_a_user_block_is_copied_by_the_library(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w", userblock_size=512) as file:
        file.create_dataset("input", data=np.arange(12.0).reshape(3, 4), chunks=(2, 4))
    table = open_table(tmp_path / "x.h5", cache_dir=tmp_path / "c")
    assert isinstance(table.columns["input"], np.ndarray)
    assert np.asarray(table.columns["input"]).tolist() == np.arange(12.0).reshape(3, 4).tolist()


def test_numbers_of_a_form_of_their_own_are_converted_by_the_library(tmp_path: Path) -> None:
    """A float of 3 bytes has no array of its width: h5py gives it as float32."""
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_fields(22, 15, 7, 0, 15)
    kind.set_size(3)
    kind.set_ebias(63)
    numbers = np.array([[1.5, -2.0], [0.25, 8.0]], np.float32)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        space = h5py.h5s.create_simple((2, 2))
        made = h5py.h5d.create(file.id, b"input", kind, space)
        made.write(h5py.h5s.ALL, h5py.h5s.ALL, numbers)
    table = open_table(tmp_path / "x.h5", cache_dir=tmp_path / "c")
    assert np.asarray(table.columns["input"]).tolist() == numbers.tolist()


def test_chunks_of_which_few_fit_into_memory_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "x.h5", compression="gzip")
    assert made(tmp_path / "x.h5", streaming=True).shuffle_advice() is None
    small(monkeypatch)
    told = made(tmp_path / "x.h5", streaming=True).shuffle_advice()
    assert "chunks of 50 samples, of which 8 are in memory" in told
    assert made(tmp_path / "x.h5", streaming=True, shuffle=False).shuffle_advice() is None
    assert made(tmp_path / "x.h5").shuffle_advice() is None
