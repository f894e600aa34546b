"""Pickles of any protocol, form and length, read by a machine of our own."""

from __future__ import annotations

import io
import pickle
import pickletools
import tracemalloc
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_plugins.formats.errors import DataError
from forge_plugins.formats.format import Reading
from forge_plugins.formats.open_table import open_table
from forge_plugins.formats.readers.pickle_codes import BrokenError, fetched
from forge_plugins.formats.readers.pickle_machine import Machine, plain
from forge_plugins.formats.readers.pickle_values import RefusedError

numbers = st.one_of(
    st.floats(allow_nan=False), st.integers(-(2**70), 2**70), st.booleans(), st.none()
)
values = st.recursive(
    st.one_of(numbers, st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=6),
        st.lists(st.floats(allow_nan=False), max_size=40),
        st.lists(st.integers(0, 255), max_size=40),
        st.dictionaries(st.text(max_size=3), inner, max_size=4),
        st.tuples(inner, inner),
        st.tuples(inner, inner, inner, inner),
    ),
    max_leaves=30,
)


def listed(value: Any) -> Any:
    """As plain lists, for comparison."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [listed(part) for part in value]
    return {k: listed(v) for k, v in value.items()} if isinstance(value, dict) else value


@pytest.mark.parametrize("protocol", range(6))
@given(value=values, optimized=st.booleans(), python=st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_plain_value_is_what_the_library_reads(
    protocol: int, value: Any, optimized: bool, python: bool
) -> None:
    stream = io.BytesIO()
    (pickle._Pickler if python else pickle.Pickler)(stream, protocol).dump(value)  # type: ignore[attr-defined]
    raw = stream.getvalue()
    raw = pickletools.optimize(raw) if optimized else raw
    found, end = Machine(memoryview(raw)).run(0)
    assert end == len(raw)
    assert repr(listed(plain(found))) == repr(listed(value))


@given(value=values, protocol=st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_the_numbers_that_are_fetched_again_are_those_of_the_librarys_walk(
    value: Any, protocol: int
) -> None:
    raw = pickle.dumps([value, value, "again", "again"], protocol)
    wanted = {arg for code, arg, _ in pickletools.genops(raw) if code.name.endswith("GET")}
    assert fetched(memoryview(raw), 0) == (wanted, len(raw))


@given(raw=st.binary(max_size=60), start=st.sampled_from([b"", b"\x80\x04", b"(", b"]\x94("]))
@settings(max_examples=400, deadline=None)
def test_no_bytes_raise_anything_else(raw: bytes, start: bytes) -> None:
    try:
        plain(Machine(memoryview(start + raw)).run(0)[0])
    except (BrokenError, RefusedError):
        return


def opened(folder: Path, raw: bytes, **chosen: Any) -> Any:
    (folder / "x.pkl").write_bytes(raw)
    return open_table(folder / "x.pkl", "auto", Reading(**chosen), cache_dir=folder / "c")


INPUTS = np.arange(24_000, dtype=np.float32).reshape(12_000, 2) / 4
TARGETS = np.arange(12_000) % 7
ROWS = [{"input": row.tolist(), "target": int(t)} for row, t in zip(INPUTS, TARGETS, strict=True)]
FORMS = {
    "records": ROWS,
    "tuple of records": tuple(ROWS),
    "columns of lists": {"input": INPUTS.tolist(), "target": TARGETS.tolist()},
    "columns of arrays": {"input": INPUTS, "target": TARGETS},
    "ordered": OrderedDict(input=INPUTS, target=TARGETS),
    "a pair": (INPUTS, TARGETS),
    "a list of two": [INPUTS, TARGETS],
    "mixed columns": {"input": INPUTS, "target": TARGETS.tolist()},
    "columns first": {"input": np.asfortranarray(INPUTS), "target": TARGETS},
    "big-endian": {"input": INPUTS.astype(">f4"), "target": TARGETS.astype(">i8")},
    "tensors": {"input": torch.from_numpy(INPUTS), "target": torch.from_numpy(TARGETS)},
    "a view": {"input": torch.from_numpy(INPUTS.T.copy()).T, "target": torch.from_numpy(TARGETS)},
    "bfloat16": {"input": torch.from_numpy(INPUTS[:500] * 4).bfloat16() / 4, "target": TARGETS[:500]},
    "array records": [{"input": r, "target": t} for r, t in zip(INPUTS, TARGETS, strict=True)],
}  # fmt: skip


@pytest.mark.spec("B12")
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_same_table(form: str, protocol: int, tmp_path: Path) -> None:
    table = opened(tmp_path, pickle.dumps(FORMS[form], protocol))
    count = len(table)
    assert count == (500 if form == "bfloat16" else 12_000)
    wanted = INPUTS[:count]
    if form == "bfloat16":
        wanted = (torch.from_numpy(wanted * 4).bfloat16() / 4).float().numpy()
    assert np.array_equal(table.columns["input"], wanted)
    assert np.array_equal(table.columns["target"], TARGETS[:count])


def test_objects_may_follow_each_other_in_a_file(tmp_path: Path) -> None:
    for parts in (
        ROWS[:50],  # each a record
        [ROWS[:20], ROWS[20:50]],
        [{"input": INPUTS[:30], "target": TARGETS[:30]}, {"input": INPUTS[30:50], "target": TARGETS[30:50]}],
    ):  # fmt: skip
        table = opened(tmp_path, b"".join(map(pickle.dumps, parts)))
        assert np.array_equal(table.columns["input"], INPUTS[:50])
        assert np.array_equal(table.columns["target"], TARGETS[:50])


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ([{"input": INPUTS[:3]}, {"input": INPUTS[:3].astype(np.float64)}], "record 3.*float64, not float32"),
        ([{"input": INPUTS[:3]}, {"input": INPUTS[:3], "target": TARGETS[:3]}], "record 3.*columns"),
        ([{"input": INPUTS[:3]}, ROWS[:3]], "in turns"),
        ([{"input": INPUTS.tolist()}, {"input": INPUTS.tolist()}], "in turns"),
        ([ROWS[:2], {"input": [1.0], "target": 0}], "record 2, field 'input'"),
    ],
)  # fmt: skip
def test_objects_that_do_not_go_together_are_refused(
    parts: list[Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=told):
        opened(tmp_path, b"".join(map(pickle.dumps, parts)))


def test_shared_records_are_read_as_often_as_they_stand_there(tmp_path: Path) -> None:
    table = opened(tmp_path, pickle.dumps([ROWS[1]] * 9000 + [ROWS[2]]))
    assert np.array_equal(table.columns["input"], np.repeat(INPUTS[1:3], [9000, 1], axis=0))


def test_lenient_columns_note_the_first_defect_of_each_record(tmp_path: Path) -> None:
    rows: list[Any] = INPUTS[:9000].tolist()
    labels: list[Any] = TARGETS[:9000].tolist()
    rows[7], labels[8000], rows[8500] = [1.0], "x", "y"
    raw = pickle.dumps({"input": rows, "target": labels})
    with pytest.raises(DataError, match="record 7, field 'input'"):
        opened(tmp_path, raw)
    problems = opened(tmp_path, raw, lenient=True).problems
    assert np.flatnonzero(problems).tolist() == [7, 8000, 8500]


def test_a_long_list_is_not_held(tmp_path: Path) -> None:
    """Planted fault: a memo of everything held all records: 28 MB."""
    raw = pickle.dumps([dict(row) for row in ROWS * 4])
    parts: list[int] = []
    tracemalloc.start()
    value, _ = Machine(memoryview(raw), lambda _, items: parts.append(len(items))).run(0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(parts) + len(value) == 48_000
    assert peak < 12e6


def test_what_must_be_held_and_is_too_much_is_refused(tmp_path: Path) -> None:
    deep = [{"input": [[float(i)] for i in range(400_000)]}]
    with pytest.raises(DataError, match="bytes of objects at once"):
        opened(tmp_path, pickle.dumps(deep))


def test_a_trusted_pickle_beyond_its_budget_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "x.pkl").open("wb") as file:
        file.truncate(2**28 + 1)  # a hole: no bytes on the disk
    with pytest.raises(DataError, match="in memory as a whole"):
        open_table(tmp_path / "x.pkl", "auto", Reading(trust_pickle=True), cache_dir=tmp_path / "c")
