"""Integers that become floats stay what they are, or the file is refused by column and row."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from table_files import write

from forge_kernel.errors import PluginError
from forge_plugins.data.file import open_file, to_batches
from forge_plugins.data.file_config import FileConfig
from forge_plugins.formats.columns.exact import inexact, is_exact


@given(
    values=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-(2**26), 2**26), max_size=20),
    shift=st.integers(0, 40),
)
@settings(max_examples=200, deadline=None)
def test_an_integer_is_exact_when_a_float_gives_it_back(values: list[int], shift: int) -> None:
    values = [value >> shift for value in values] + [value >> shift << shift for value in values]
    rows = np.array(values, np.int64)
    expected = [at for at, value in enumerate(values) if int(np.float32(value)) != value]
    assert inexact(rows, np.dtype(np.float32)).tolist() == expected
    assert [at for at, value in enumerate(values) if not is_exact(value)] == expected
    sizes = np.abs(rows.astype(object)).astype(np.uint64)
    assert inexact(sizes, np.dtype(np.float32)).tolist() == expected
    wide = [at for at, value in enumerate(values) if int(float(value)) != value]
    assert inexact(rows, np.dtype(np.float64)).tolist() == wide


def first(file: Path, **chosen: Any) -> Any:
    plain = {"validation_split": 0.0, "shuffle": False, "cache_dir": str(file.parent / "c")}
    config = FileConfig(path=str(file), **{**plain, **chosen})
    return next(iter(to_batches(open_file(config), config, 0).batches(0, 0)))


SUFFIXES = ["json", "jsonl", "pkl", "pickle", "pt", "npz", "h5", "frec", "safetensors", "parquet"]
LARGE = np.array([[1, 2**24], [3, 2**24 + 1]])


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("chosen", [{}, {"streaming": True}, {"quality_threshold": 0.5}])
def test_features_that_would_become_one_number_are_refused(
    suffix: str, chosen: Any, tmp_path: Path
) -> None:
    """Planted fault: 16777216 and 16777217 were both given to the model as 16777216."""
    file = write(tmp_path / f"x.{suffix}", LARGE, np.arange(2))
    with pytest.raises(
        PluginError, match="record 1, field 'input': the integer 16777217 is no 32-bit"
    ):
        first(file, **chosen)
    tokens = first(file, input="tokens", vocabulary=2**25)
    assert tokens.inputs.tolist() == LARGE.tolist()
    file = write(tmp_path / f"x.{suffix}", LARGE * 2**20 // 2**21 * 2**30, np.arange(2))
    assert first(file, **chosen).inputs.tolist() == [[0, 2.0**53], [2.0**30, 2.0**53]]


def test_numbers_to_be_predicted_are_refused_as_well(tmp_path: Path) -> None:
    file = write(tmp_path / "x.npz", np.arange(2.0), np.array([-5, -(2**24) - 1]))
    with pytest.raises(PluginError, match="record 1, field 'target': the integer -16777217"):
        first(file, target="number")
    assert first(file, target="none").inputs.tolist() == [[0.0], [1.0]]


@pytest.mark.parametrize("kind", [np.int32, np.uint32, np.uint64])
def test_every_type_of_integers_is_looked_at(kind: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "x.npz", LARGE.astype(kind), np.arange(2))
    with pytest.raises(PluginError, match="16777217"):
        first(file)


@pytest.mark.parametrize(
    "rows",
    [
        [[0.5, 2**24 + 1]], [[0.5, 1], [2, 2**24 + 1]], [[2**24 + 1, 0], [0.5, 1]],
        [[2**24 + 1, 0]] * 5000 + [[0.5, 1]] * 5000, [[0.5, 1]] * 5000 + [[2**24 + 1, 0]] * 5000,
    ],
    ids=["one row", "a later row", "an earlier row", "an earlier block", "a later block"],
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["jsonl", "pkl"])
def test_integers_among_floats_are_looked_at_too(suffix: str, rows: Any, tmp_path: Path) -> None:
    records = [{"input": row, "target": 0} for row in rows]
    file = tmp_path / f"x.{suffix}"
    if suffix == "pkl":
        file.write_bytes(pickle.dumps(records))
    else:
        file.write_text("\n".join(map(json.dumps, records)))
    with pytest.raises(PluginError, match="field 'input': the integer 16777217 is no 32-bit float"):
        first(file)


def test_floats_are_rounded_as_ever(tmp_path: Path) -> None:
    file = write(tmp_path / "x.npz", np.array([[2.0**24 + 1]]), np.arange(1))
    assert first(file).inputs.tolist() == [[2.0**24]]
