"""Pickles of any protocol, form and length."""

from __future__ import annotations

import contextlib
import io
import pickle
import pickletools
import tempfile
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


def opened(folder: Path, raw: bytes, **chosen: Any) -> Any:
    (folder / "x.pkl").write_bytes(raw)
    return open_table(folder / "x.pkl", "auto", Reading(**chosen), cache_dir=folder / "c")


floats = st.floats(allow_nan=False, width=32)
fields = st.one_of(
    floats,
    st.lists(floats, min_size=1, max_size=40),
    st.lists(st.integers(0, 255), min_size=1, max_size=40),
)


@pytest.mark.parametrize("protocol", range(6))
@given(
    field=fields, count=st.integers(1, 9), text=st.text(max_size=8), optimized=st.booleans(),
    python=st.booleans(), by_column=st.booleans(),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_any_record_is_read_of_any_protocol_and_pickler(
    protocol: int, field: Any, count: int, text: str, optimized: bool, python: bool, by_column: bool
) -> None:
    rows: Any = [{"input": field, "target": number, text + "!": text} for number in range(count)]
    if by_column:
        rows = {name: [row[name] for row in rows] for name in rows[0]}
    stream = io.BytesIO()
    (pickle._Pickler if python else pickle.Pickler)(stream, protocol).dump(rows)  # type: ignore[attr-defined]
    raw = stream.getvalue()
    with tempfile.TemporaryDirectory() as folder:
        table = opened(Path(folder), pickletools.optimize(raw) if optimized else raw)
        assert table.columns["input"].tolist() == [field] * count
        assert table.columns["target"].tolist() == [*range(count)]
        assert table.others == (text + "!",)


@given(raw=st.binary(max_size=60), start=st.sampled_from([b"", b"\x80\x04", b"(", b"]\x94("]))
@settings(max_examples=100, deadline=None)
def test_no_bytes_raise_anything_else(raw: bytes, start: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(DataError):
        opened(Path(folder), start + raw)


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
        [{"input": INPUTS[:30].tolist(), "target": TARGETS[:30].tolist()}, ROWS[30:50]],
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


def test_a_trusted_pickle_beyond_its_budget_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "x.pkl").open("wb") as file:
        file.truncate(2**28 + 1)  # a hole: no bytes on the disk
    with pytest.raises(DataError, match="in memory as a whole"):
        open_table(tmp_path / "x.pkl", "auto", Reading(trust_pickle=True), cache_dir=tmp_path / "c")
