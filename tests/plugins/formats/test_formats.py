"""Any table survives any format, mapped, and the cache gives what the file says now."""

from __future__ import annotations

import gzip
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import save_file

from forge_plugins.formats.columns.table import take
from forge_plugins.formats.errors import DataError
from forge_plugins.formats.format import Reading
from forge_plugins.formats.open_table import open_table, sniff
from forge_plugins.formats.readers.fixed_records import write_records

Columns = dict[str, np.ndarray]


def rows(columns: Columns) -> list[dict[str, Any]]:
    count = len(columns["input"])
    return [{name: c[at].tolist() for name, c in columns.items()} for at in range(count)]


def write_json(file: Path, columns: Columns) -> None:
    file.write_text(json.dumps(rows(columns)))


def write_columnar(file: Path, columns: Columns) -> None:
    file.write_text(json.dumps({name: column.tolist() for name, column in columns.items()}))


def write_lines(file: Path, columns: Columns) -> None:
    text = "\r\n\n".join(json.dumps(row) for row in rows(columns))
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())


def write_gzip(file: Path, columns: Columns) -> None:
    file.write_bytes(gzip.compress(json.dumps(rows(columns)).encode()))


def write_hdf5(file: Path, columns: Columns, **how: Any) -> None:
    with h5py.File(file, "w") as opened:
        for name, column in columns.items():
            opened.create_dataset(name, data=column, **how)


def write_chunked(file: Path, columns: Columns) -> None:
    write_hdf5(file, columns, chunks=True, compression="gzip", shuffle=True)


def write_pickle(file: Path, columns: Columns) -> None:
    file.write_bytes(pickle.dumps(rows(columns)))


def write_arrays(file: Path, columns: Columns) -> None:
    file.write_bytes(pickle.dumps(columns, protocol=2))


def write_array_records(file: Path, columns: Columns) -> None:
    count = len(columns["input"])
    file.write_bytes(
        pickle.dumps([{n: c[at] for n, c in columns.items()} for at in range(count)], protocol=5)
    )


def write_tensors(file: Path, columns: Columns) -> None:
    file.write_bytes(pickle.dumps({n: torch.from_numpy(c.copy()) for n, c in columns.items()}))


def write_npz(file: Path, columns: Columns) -> None:
    with file.open("wb") as stream:
        np.savez_compressed(stream, **columns)


def write_structured(file: Path, columns: Columns) -> None:
    kind = [(name, c.dtype, c.shape[1:]) for name, c in columns.items()]
    whole = np.zeros(len(columns["input"]), kind)
    for name, column in columns.items():
        whole[name] = column
    np.save(file, whole)


def arrow_table(columns: Columns) -> Any:
    pyarrow = pytest.importorskip("pyarrow")
    return pyarrow.table(
        {name: column.tolist() for name, column in columns.items()},
        schema=pyarrow.schema(
            [(name, nested(pyarrow, column)) for name, column in columns.items()]
        ),
    )


def nested(pyarrow: Any, column: np.ndarray) -> Any:
    kind = pyarrow.from_numpy_dtype(column.dtype)
    for length in reversed(column.shape[1:]):
        kind = pyarrow.list_(kind, length if length % 2 else -1)  # of fixed and of free length
    return kind


def write_parquet(file: Path, columns: Columns) -> None:
    table = arrow_table(columns)
    import pyarrow.parquet

    pyarrow.parquet.write_table(table, file, row_group_size=5)


def write_arrow(file: Path, columns: Columns) -> None:
    table = arrow_table(columns)
    import pyarrow

    new = pyarrow.ipc.new_stream if len(table) % 2 else pyarrow.ipc.new_file
    with new(str(file), table.schema) as writer:
        writer.write_table(table, max_chunksize=4)


FORMS = {
    "json": (write_json, "a.json"),
    "columnar": (write_columnar, "b.json"),
    "lines": (write_lines, "c.jsonl"),
    "gzip": (write_gzip, "d.json.gz"),
    "hdf5": (write_hdf5, "e.h5"),
    "chunked": (write_chunked, "f.h5"),
    "pickle": (write_pickle, "g.pkl"),
    "arrays": (write_arrays, "h.pkl"),
    "array records": (write_array_records, "i.pkl"),
    "tensors": (write_tensors, "j.pkl"),
    "binary": (write_records, "k.frec"),
    "npy": (write_structured, "l.npy"),
    "npz": (write_npz, "m.npz"),
    "safetensors": (lambda file, columns: save_file(columns, file), "n.safetensors"),
    "parquet": (write_parquet, "o.parquet"),
    "arrow": (write_arrow, "p.arrow"),
}


@st.composite
def tables(draw: st.DrawFn) -> Columns:
    count = draw(st.integers(1, 12))
    inner = draw(st.lists(st.integers(1, 4), min_size=1, max_size=2))
    kind = draw(st.sampled_from([np.float32, np.int64]))
    values = (
        st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)
        if kind is np.float32
        else st.integers(-(2**63), 2**63 - 1)
    )
    inputs = draw(arrays.arrays(kind, (count, *inner), elements=values))
    targets = draw(arrays.arrays(np.int64, (count,), elements=st.integers(0, 9)))
    return {"input": inputs, "target": targets}


@pytest.mark.spec("B1", "B2", "B10", "B11", "B12", "B13")
@pytest.mark.parametrize("form", FORMS)
@given(columns=tables(), data=st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_table_survives_any_format(
    form: str, columns: Columns, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    write, name = FORMS[form]
    folder = tmp_path_factory.mktemp("table")
    write(folder / name, columns)
    table = open_table(folder / name, cache_dir=folder / "cache")
    assert table.columns.keys() == columns.keys()
    for key, column in columns.items():
        found = table.columns[key]
        assert found.shape == column.shape
        assert np.dtype(found.dtype).newbyteorder("=") == column.dtype
        assert np.array_equal(found, column)
    places = st.integers(0, len(table) - 1)
    index = np.array(data.draw(st.lists(places, max_size=20)), np.int64)
    for key, column in columns.items():
        rows = take(table.columns[key], index)
        assert rows.dtype == column.dtype
        assert rows.flags.c_contiguous
        assert np.array_equal(rows, column[index])
    lenient = open_table(folder / name, "auto", Reading(lenient=True), cache_dir=folder / "cache")
    assert lenient.problems is None or not lenient.problems.any()


@pytest.mark.parametrize("form", FORMS)
def test_no_format_holds_the_numbers_in_memory(form: str, tmp_path: Path) -> None:
    write, name = FORMS[form]
    inputs = np.arange(40, dtype=np.float32).reshape(10, 4) + 0.5
    write(tmp_path / name, {"input": inputs, "target": np.arange(10)})
    for column in open_table(tmp_path / name, cache_dir=tmp_path / "c").columns.values():
        base: Any = column
        while base is not None and not isinstance(base, np.memmap):
            base = base.base
        assert isinstance(base, np.memmap)


def test_a_single_array_is_the_input(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.asfortranarray(np.arange(12.0).reshape(3, 4)))
    table = open_table(tmp_path / "x.npy")
    assert list(table.columns) == ["input"]
    assert take(table.columns["input"], np.array([2, 0])).tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]


def test_big_endian_numbers_are_read_as_numbers(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(3, dtype=">i4"))
    found = take(open_table(tmp_path / "x.npy").columns["input"], np.array([1, 2]))
    assert found.dtype.isnative
    assert found.tolist() == [1, 2]


@given(count=st.integers(5, 80), length=st.integers(1, 4))
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_windows_of_raw_tokens_are_followed_by_the_next_token(
    count: int, length: int, tmp_path: Path
) -> None:
    np.arange(count, dtype="<u2").tofile(tmp_path / "t.bin")
    table = open_table(tmp_path / "t.bin", "tokens", Reading(length=length))
    assert len(table) == (count - 1) // length
    windows = take(table.columns["input"], np.arange(len(table)))
    assert windows[:, :-1].reshape(-1).tolist() == list(range(len(table) * length))
    assert (windows[:, 1:] == windows[:, :-1] + 1).all()


def test_the_format_is_found_by_content_before_the_name(tmp_path: Path) -> None:
    columns = {"input": np.ones((2, 2), np.float32)}
    write_hdf5(tmp_path / "a.json", columns)
    assert sniff(tmp_path / "a.json").name == "hdf5"
    write_json(tmp_path / "noname", columns)
    assert sniff(tmp_path / "noname").name == "json"


def test_a_changed_file_of_the_same_size_is_read_anew(tmp_path: Path) -> None:
    file, folder = tmp_path / "a.json", tmp_path / "cache"
    for value in (1, 2, 1):
        file.write_text(f'[{{"input": [{value}]}}]')
        assert open_table(file, cache_dir=folder).columns["input"].tolist() == [[value]]
    assert len(converted(folder)) == 2  # the third reading found the first's


def converted(cache: Path) -> list[Path]:
    """The converted files in a cache; beside them lies what was noted of files that rest."""
    return sorted(path for path in cache.iterdir() if path.name != "memos")


def test_a_damaged_cache_is_built_anew(tmp_path: Path) -> None:
    file, folder = tmp_path / "a.json", tmp_path / "cache"
    file.write_text('[{"input": [3, 4]}]')
    open_table(file, cache_dir=folder)
    [kept] = converted(folder)
    for name in ("0.npy", "manifest.json"):
        (kept / name).write_bytes(b"x")
        assert open_table(file, cache_dir=folder).columns["input"].tolist() == [[3, 4]]
    assert [kept] == converted(folder)


def test_the_second_reading_does_not_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    file.write_text('[{"input": [3, 4]}]')
    open_table(file, cache_dir=tmp_path / "cache")
    monkeypatch.setattr("forge_plugins.formats.readers.json.JsonText", None)
    assert open_table(file, cache_dir=tmp_path / "cache").columns["input"].tolist() == [[3, 4]]


RACER = """
import sys
from pathlib import Path
from forge_plugins.formats.open_table import open_table
print(open_table(Path(sys.argv[1]), cache_dir=Path(sys.argv[2])).columns["input"].sum())
"""


def test_processes_that_build_one_cache_at_once_all_get_it(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"input": np.ones((2000, 10), np.int64)})
    command = [sys.executable, "-c", RACER, str(file), str(tmp_path / "cache")]
    racers = [forked.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [racer.communicate(timeout=120)[0].strip() for racer in racers] == ["20000"] * 3
    [kept] = converted(tmp_path / "cache")
    assert not kept.name.startswith(".")


def test_what_was_read_with_trust_is_not_found_without_it(tmp_path: Path) -> None:
    file = tmp_path / "a.pkl"
    file.write_bytes(pickle.dumps([{"input": torch.nn.Parameter(torch.ones(2))}] * 2))
    folder = tmp_path / "cache"
    assert len(open_table(file, "auto", Reading(trust_pickle=True), cache_dir=folder)) == 2
    with pytest.raises(DataError, match="_rebuild_parameter"):
        open_table(file, cache_dir=folder)


def test_a_lenient_reading_notes_what_a_strict_one_refuses(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    good = [{"input": [1.5, 2.0], "target": 0}] * 3
    bad = [{"input": [1.0, None], "target": 1}, {"input": [1.0], "target": 1}, {"target": 1}]
    file.write_text(json.dumps([*good, *bad, {"input": "ab", "target": 1}, 7]))
    with pytest.raises(DataError, match=r"record 3, field 'input': .*null"):
        open_table(file, cache_dir=tmp_path / "c")
    table = open_table(file, "auto", Reading(lenient=True), cache_dir=tmp_path / "c")
    assert table.problems is not None
    assert table.problems.tolist() == [0, 0, 0, 0, 4, 1, 2, 2]
    assert np.isnan(table.columns["input"][3, 1])


def test_what_pyarrow_can_hold_and_a_column_cannot_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    for values, told in (
        ([[1.0], None], "'input'.*null"),
        ([[1.0], [1.0, 2.0]], "'input'.*ragged"),
        (["a", "b"], "'input'.*not numbers|'input'.*holds"),
        ([[1.0], [None]], "'input'.*null"),
        ([], "no records"),
    ):
        file = tmp_path / "x.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"input": values}), file)
        with pytest.raises(DataError, match=told):
            open_table(file, cache_dir=tmp_path / "c")
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match="cannot be read"):
            open_table(file, cache_dir=tmp_path / "c")


def test_without_pyarrow_it_is_said_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1" * 9)
    program = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from pathlib import Path\n"
        "from forge_plugins.formats.open_table import open_table\n"
        "open_table(Path('x.parquet'), cache_dir=Path('c'))"
    )
    done = forked.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "pip install pyarrow" in done.stderr.splitlines()[-1]
