"""What a file holds beside what is asked for is its owner's: any name, any type, any length."""

from __future__ import annotations

import datetime
import decimal
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import h5py
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from forge_kernel.config.schema import bind_config
from forge_kernel.errors import PluginError
from forge_plugins.data.file import FileData, open_file, to_batches
from forge_plugins.data.file_config import FileConfig
from forge_plugins.formats.errors import DataError
from forge_plugins.formats.format import Reading
from forge_plugins.formats.open_table import open_table
from forge_plugins.formats.readers.fixed_records import write_records

pa = pytest.importorskip("pyarrow")
Columns = dict[str, Any]
INPUT, TARGET = [1.5, 2.5, 3.5], [0, 1, 1]
ASKED: Columns = {"input": INPUT, "target": TARGET}
OURS: Columns = {
    "problem": [1, 2, 3],
    "weight": [0, 0, 0],
    "defects": [4, 4, 4],
    "others": [1, 1, 1],
}
"""Names that mean something in the code, as columns of numbers, which every format can hold."""
DATE = datetime.date(2020, 1, 1)
PLAIN: Columns = {
    "text": ["a", "b: \"c\": 'd'", "]}"], "null": [None] * 3, "id": [2**63, 2**64 - 1, 10**30],
    "ragged": [[1], [1, 2], []], "nested": [{"a": [1, {"b": None}]}, {}, {"input": 3}],
    "mixed": [1, "a", None], "strange": [float("nan"), float("-inf"), 1.0],
}  # fmt: skip
OBJECTS: Columns = {
    **PLAIN, "dates": [DATE] * 3, "bytes": [b"\x00"] * 3, "sets": [{1, 2}] * 3, "long": [2**999] * 3,
    "money": [decimal.Decimal(1)] * 3, "keys": [{(1, 2): 3, None: 4}] * 3, "complex": [1j] * 3,
    "arrays": [np.array(["a"]), np.array([None], object), np.datetime64("2020")],
}  # fmt: skip
ARROW: Columns = {
    "text": ["a", "b", "c"], "large": pa.array(["a"] * 3, pa.large_string()), "null": pa.nulls(3),
    "ids": pa.array([2**64 - 1] * 3, pa.uint64()), "gaps": [1, None, 3], "dates": [DATE] * 3,
    "money": [decimal.Decimal("1.5")] * 3, "times": [datetime.datetime(2020, 1, 1)] * 3,
    "category": pa.array(["a", "b", "a"]).dictionary_encode(), "bytes": [b"x"] * 3,
    "ragged": [[1], [1, 2], []], "structs": [{"a": 1}] * 3, "many": [[{"a": 1}]] * 3,
    "input.x": [1, 2, 3], "größe": [1, 2, 3], "a b": [1, 2, 3],
}  # fmt: skip
ARRAYS: Columns = {
    "text": np.array(["a", "b", "c"]), "dates": np.array(["2020"] * 3, "M8[D]"), "longer": np.zeros(7),
    "ids": np.array([2**64 - 1] * 3, np.uint64), "complex": np.ones(3, complex),
}  # fmt: skip


def rows(columns: Columns) -> list[Columns]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def arrays(columns: Columns) -> dict[str, np.ndarray]:
    return {name: np.asarray(column) for name, column in columns.items()}


def hdf5(file: Path, columns: Columns) -> None:
    with h5py.File(file, "w") as opened:
        for name, column in arrays(columns).items():
            opened[name] = column
        if "longer" not in columns:
            return
        opened["strings"], opened["alone"] = ["a", "b"], 3
        opened["ragged"] = h5py.Empty("f4")
        opened["soft"], opened["outside"] = h5py.SoftLink("/no"), h5py.ExternalLink("o.h5", "/x")
        opened["group/x"] = np.arange(3)


def structured(file: Path, columns: Columns) -> None:
    plain = arrays(columns)
    whole = np.zeros(3, [(name, column.dtype) for name, column in plain.items()])
    for name, column in plain.items():
        whole[name] = column
    np.save(file, whole)


def parquet(file: Path, columns: Columns) -> None:
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table(columns), file)


def arrow(file: Path, columns: Columns) -> None:
    table = pa.table(columns)
    with pa.ipc.new_file(str(file), table.schema) as writer:
        writer.write_table(table)


def lines(file: Path, columns: Columns) -> None:
    file.write_text("\n".join(map(json.dumps, rows(columns))))


Write = Callable[[Path, Columns], Any]
FORMS: dict[str, tuple[Write, str, Columns]] = {
    "json": (lambda file, c: file.write_text(json.dumps(rows(c))), "a.json", PLAIN),
    "columnar": (lambda file, c: file.write_text(json.dumps(c)), "b.json", {**PLAIN, "one": "a]"}),
    "lines": (lines, "c.jsonl", PLAIN),
    "pickle": (lambda file, c: file.write_bytes(pickle.dumps(rows(c))), "d.pkl", OBJECTS),
    "old pickle": (lambda file, c: file.write_bytes(pickle.dumps(rows(c), 0)), "e.pkl", OBJECTS),
    "lists": (lambda file, c: file.write_bytes(pickle.dumps(c)), "f.pkl", {**OBJECTS, "one": DATE}),
    "torch": (lambda file, c: torch.save(rows(c), file), "g.pt", PLAIN),
    "tensors": (lambda file, c: torch.save(
        {n: torch.tensor(v) if n in ("input", *OURS) else v for n, v in c.items()}, file
    ), "h.pth", {**PLAIN, "one": "a"}),
    "hdf5": (hdf5, "i.h5", {"longer": np.zeros(7), "complex": np.ones(3, complex)}),
    "npz": (lambda file, c: np.savez(file, **arrays(c)), "j.npz", {**ARRAYS, "objects": np.array([None] * 3)}),
    "npy": (structured, "k.npy", {n: c for n, c in ARRAYS.items() if n != "longer"}),
    "binary": (lambda file, c: write_records(file, arrays(c)), "l.frec", {"bytes": np.array([b"a"] * 3)}),
    "safetensors": (lambda file, c: save_file(arrays(c), file), "m.safetensors", {"longer": np.zeros(7)}),
    "parquet": (parquet, "n.parquet", ARROW),
    "arrow": (arrow, "o.arrow", ARROW),
}  # fmt: skip


def dealt(file: Path, **chosen: Any) -> FileData:
    plain = {"validation_split": 0.0, "shuffle": False, "cache_dir": str(file.parent / "cache")}
    config = FileConfig(path=str(file), **{**plain, **chosen})
    return to_batches(open_file(config), config, 0)


def batch(file: Path, **chosen: Any) -> tuple[Any, Any]:
    first = next(iter(dealt(file, **chosen).batches(0, 0)))
    return first.inputs.tolist(), None if first.targets is None else first.targets.tolist()


WANTED = [[number] for number in INPUT], TARGET


@pytest.mark.parametrize("threshold", [0.0, 0.5])
@pytest.mark.parametrize("form", FORMS)
def test_columns_that_nobody_asks_for_are_left_alone(
    form: str, threshold: float, tmp_path: Path
) -> None:
    """Planted fault: a column `problem` was taken for the reader's own notes of defects."""
    write, name, odd = FORMS[form]
    write(tmp_path / name, {**OURS, **odd, **ASKED})
    assert batch(tmp_path / name, quality_threshold=threshold) == WANTED
    table = open_table(tmp_path / name, cache_dir=tmp_path / "cache")
    assert set(table.columns) == {"input", "target"}
    assert set(table.others) >= {*OURS, *odd}


@pytest.mark.parametrize("form", FORMS)
def test_columns_of_any_name_can_be_asked_for(form: str, tmp_path: Path) -> None:
    write, name, odd = FORMS[form]
    columns = {**odd, "problem": INPUT, "weight": TARGET, "input": INPUT[::-1], "target": [0] * 3}
    write(tmp_path / name, columns)
    chosen: Any = {"input_column": "problem", "target_column": "weight"}
    assert batch(tmp_path / name, **chosen) == WANTED
    assert batch(tmp_path / name, **chosen, quality_threshold=0.5) == WANTED
    both = batch(tmp_path / name, input_column="problem", target_column="problem", target="number")
    assert both == (WANTED[0], WANTED[0])
    alone = batch(tmp_path / name, target="none", input_column="problem")
    assert alone == (WANTED[0], None)


@pytest.mark.parametrize("form", FORMS)
def test_a_name_that_is_not_there_is_refused_with_those_that_are(form: str, tmp_path: Path) -> None:
    write, name, _ = FORMS[form]
    write(tmp_path / name, {"pixels": INPUT, "label": TARGET})
    for threshold in (0.0, 0.5):
        with pytest.raises(PluginError, match=r"'pixel'; .*'label', 'pixels'.*mean 'pixels'"):
            dealt(
                tmp_path / name, input_column="pixel", target_column="label",
                quality_threshold=threshold,
            )  # fmt: skip
        with pytest.raises(PluginError, match=r"'labels'; .*'label', 'pixels'.*mean 'label'"):
            dealt(
                tmp_path / name, input_column="pixels", target_column="labels",
                quality_threshold=threshold,
            )  # fmt: skip
        with pytest.raises(PluginError, match=r"field 'input'; there are \['label', 'pixels'\]"):
            dealt(tmp_path / name, quality_threshold=threshold)
    with pytest.raises(PluginError, match="no field 'target'.*'label'.*target: none"):
        dealt(tmp_path / name, input_column="pixels")


def test_a_target_that_is_named_is_not_made_of_the_inputs(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", input=np.arange(6).reshape(2, 3))
    chosen: Any = {"input": "tokens", "target": "next"}
    assert dealt(tmp_path / "x.npz", **chosen).spec.sequence == 2
    with pytest.raises(PluginError, match="no field 'answer'"):
        dealt(tmp_path / "x.npz", **chosen, target_column="answer")
    with pytest.raises(Exception, match="target_column is not read with target: none"):
        bind_config(FileConfig, {"path": "x", "target": "none", "target_column": "y"})


def test_a_text_that_is_asked_for_is_refused_by_its_name(tmp_path: Path) -> None:
    for form in ("json", "pickle", "torch", "parquet", "arrow", "npz", "npy"):
        write, name, _ = FORMS[form]
        write(tmp_path / name, {"input": INPUT, "name": ["a", "b", "c"]})
        with pytest.raises(PluginError, match="field 'name': holds|field 'name': .*not numbers"):
            dealt(tmp_path / name, target_column="name")


def test_data_sets_in_groups_are_named_by_their_path(tmp_path: Path) -> None:
    hdf5(tmp_path / "x.h5", {"train/x": INPUT, "train/y": TARGET, "test/x": [0.0]})
    assert batch(tmp_path / "x.h5", input_column="train/x", target_column="train/y") == WANTED
    with h5py.File(tmp_path / "x.h5", "a") as opened:
        opened["link"] = h5py.ExternalLink("other.h5", "/")
    for name, told in (
        ("train", "is a group, not a data set; name what is in it, such as 'train/x'"),
        ("train/z", "there is no field 'train/z'"),
        ("train//x", "there is no field"),
        ("link/x", "is a ExternalLink, which may lead anywhere"),
    ):
        with pytest.raises(PluginError, match=told):
            dealt(tmp_path / "x.h5", input_column=name, target="none")


def test_of_two_columns_of_one_name_none_is_chosen(tmp_path: Path) -> None:
    """Planted fault: both were written into one column, one after the other."""
    import pyarrow.parquet

    table = pa.Table.from_arrays([pa.array(INPUT)] * 4, ["input", "a", "a", "target"])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    assert len(open_table(tmp_path / "x.parquet", cache_dir=tmp_path / "c")) == 3
    with pytest.raises(DataError, match="'a': 2 columns have this name"):
        open_table(tmp_path / "x.parquet", "auto", Reading(input="a"), cache_dir=tmp_path / "c")


BOOLEANS = [[True, False], [False, False], [True, True]]


@pytest.mark.parametrize("form", [form for form in FORMS if form != "binary"])
def test_true_and_false_are_1_and_0_in_every_format(form: str, tmp_path: Path) -> None:
    write, name, _ = FORMS[form]
    write(tmp_path / name, {"input": INPUT, "target": [True, False, True]})
    assert batch(tmp_path / name) == (WANTED[0], [1, 0, 1])
    if form in ("npy", "binary"):
        return
    write(tmp_path / name, {"input": BOOLEANS, "target": TARGET})
    assert batch(tmp_path / name) == ([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]], TARGET)


def test_booleans_of_numpy_and_among_numbers_are_numbers(tmp_path: Path) -> None:
    some = [{"input": np.array([True, False]), "target": np.bool_(True)}] * 2
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(some))
    assert batch(tmp_path / "x.pkl") == ([[1.0, 0.0]] * 2, [1, 1])
    (tmp_path / "x.json").write_text('[{"input": [0.5, true, 32], "target": false}]')
    assert batch(tmp_path / "x.json") == ([[0.5, 1.0, 32.0]], [0])
    (tmp_path / "y.json").write_text('[{"input": [[true], [false]], "target": [3.5, true]}]')
    assert batch(tmp_path / "y.json", target="number") == ([[[1.0], [0.0]]], [[3.5, 1.0]])


def test_what_arrow_wraps_is_read_as_the_numbers_it_stands_for(tmp_path: Path) -> None:
    kind = pa.fixed_shape_tensor(pa.float32(), [2])
    flat = pa.FixedSizeListArray.from_arrays(pa.array(range(6), pa.float32()), 2)
    tensor = pa.ExtensionArray.from_storage(kind, flat)
    category = pa.array(TARGET).dictionary_encode()
    arrow(tmp_path / "x.arrow", {"input": tensor, "target": category})
    assert batch(tmp_path / "x.arrow") == ([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]], TARGET)
    runs = pa.compute.run_end_encode(pa.array(TARGET))
    views = pa.array([[1, 2], [3, 4], [5, 6]], pa.list_view(pa.int64()))
    arrow(tmp_path / "y.arrow", {"input": views, "target": runs})
    assert batch(tmp_path / "y.arrow") == ([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], TARGET)


def test_what_arrow_holds_and_is_no_number_is_refused_by_its_row(tmp_path: Path) -> None:
    for column, told in (
        (pa.array([[1.0], [2.0], [None]]), "record 2, field 'input': holds null"),
        (pa.array([1, None, 2]), "record 1, field 'input': holds null"),
        (pa.array([7, None, 7]).dictionary_encode(), "record 1, field 'input': holds null"),
        (pa.array([[1], [1, 2], [1]]), "record 1, field 'input': is ragged"),
        (pa.array(["a"] * 3).dictionary_encode(), "of the type string, not numbers"),
        (pa.array([decimal.Decimal(1)] * 3), r"of the type decimal128\(1, 0\), not numbers"),
        (pa.array([DATE] * 3), "of the type date32"),
        (pa.array([datetime.datetime(2020, 1, 1)] * 3), "of the type timestamp"),
    ):
        for write, name in ((parquet, "x.parquet"), (arrow, "x.arrow")):
            write(tmp_path / name, {"input": column, "target": TARGET})
            with pytest.raises(PluginError, match=told):
                dealt(tmp_path / name)


def test_row_groups_may_be_empty_but_not_differ(tmp_path: Path) -> None:
    """Planted fault: lists of another length in a later part ended in an AssertionError."""
    import pyarrow.parquet

    part = pa.table({"input": [[1.0, 2.0]] * 3, "target": TARGET})
    other = pa.table({"input": [[1.0, 2.0, 3.0]] * 3, "target": TARGET})
    for parts in ([part[:0], part, part[:0]], [part, other]):
        with pyarrow.parquet.ParquetWriter(tmp_path / "x.parquet", part.schema) as writer:
            for one in parts:
                writer.write_table(one)
        if other in parts:
            with pytest.raises(PluginError, match="record 3, field 'input': is ragged"):
                dealt(tmp_path / "x.parquet")
        else:
            assert batch(tmp_path / "x.parquet") == ([[1.0, 2.0]] * 3, TARGET)


def test_a_pickle_of_objects_that_nobody_reads_runs_none_of_them(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    rows_of_user = [{"input": [1.0], "target": 0, "x": Payload(), "y": [Payload()]}]
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(rows_of_user))
    assert batch(tmp_path / "x.pkl") == ([[1.0]], [0])
    with pytest.raises(PluginError, match=r"it names pathlib\.\S*touch|it names builtins.getattr"):
        dealt(tmp_path / "x.pkl", target_column="x")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["pair", "list", "one"])
@pytest.mark.parametrize("name", ["x.pkl", "x.pt"])
def test_arrays_without_names_are_inputs_and_targets(kind: str, name: str, tmp_path: Path) -> None:
    inputs, targets = torch.tensor(INPUT), torch.tensor(TARGET)
    value: Any = {"pair": (inputs, targets), "list": [inputs, targets], "one": inputs}[kind]
    if name == "x.pt":
        torch.save(value, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(value))
    if kind == "one":
        assert batch(tmp_path / name, target="none") == (WANTED[0], None)
    else:
        assert batch(tmp_path / name) == WANTED
    with pytest.raises(PluginError, match="no field 'x'"):
        dealt(tmp_path / name, input_column="x")


def test_the_command_tells_what_is_not_read_and_reads_what_is_named(tmp_path: Path) -> None:
    lines(tmp_path / "x.jsonl", {"pixels": INPUT, "label": [0, -100, 1], "name": ["a", "b", "c"]})

    def told(*words: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "forge_kernel",
            "data",
            "x.jsonl",
            "--cache-dir",
            "c",
            *words,
        ]
        return forked.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    named = ("--input-column", "pixels", "--target-column", "label")
    found = json.loads(told(*named, "--json").stdout)
    assert (found["kept"], found["labels"], found["others"]) == (3, {"0": 1, "1": 1}, ["name"])
    assert set(found["fields"]) == {"pixels", "label"}
    assert "not read: name" in told(*named).stdout
    assert json.loads(told(*named, "--ignore-index", "1", "--json").stdout)["labels"] == {"0": 1}
    missing = told("--input-column", "pixel")
    assert missing.returncode == 2
    assert "did you mean 'pixels'?" in missing.stderr
