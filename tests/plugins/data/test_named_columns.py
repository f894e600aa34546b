"""Named columns: CSV of any make, words as labels, gaps, scales fitted on the training share alone.

Planted faults: the scale fitted on all records; the label map of the file that is predicted; a
split that is not stratified; a missing number left as it is.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from forge_kernel import load_pipeline, load_run, run
from forge_kernel.contract.run_config import RunConfig
from forge_kernel.errors import ConfigError, PluginError
from forge_kernel.runner import resume
from forge_kernel.testing.compare import differences
from forge_kernel.trained_run import evaluate_run
from forge_kernel.training.one_process import OneProcess
from forge_plugins.data.file import File, FileData
from forge_plugins.data.file_config import FileConfig
from forge_plugins.formats.errors import DataError
from forge_plugins.formats.frame import Frame, open_frame
from forge_plugins.uses.file_inputs import file_inputs, unknown_words

pytest.importorskip("pyarrow")


class Seeded:
    strategy, settings, folder, seed = OneProcess(), RunConfig(), None, 0

    def __init__(self) -> None:
        self.told: list[str] = []

    def emit_event(self, name: str, message: str, **facts: Any) -> None:
        self.told.append(message)


def dealt(file: Path, told: Seeded | None = None, **chosen: Any) -> FileData:
    settings = {"path": str(file), "cache_dir": str(file.parent / "cache"), **chosen}
    data: Any = File(FileConfig(**settings)).make_data(told or Seeded())  # type: ignore[arg-type]
    return data


def everything(data: FileData) -> tuple[torch.Tensor, torch.Tensor]:
    batch = data.samples(np.arange(len(data.table)))
    return batch.inputs, batch.targets


def frame(file: Path, content: str | bytes) -> Frame:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return open_frame(file, cache_dir=file.parent / "cache")


def write(file: Path, head: str, rows: list[Any]) -> Path:
    lines = [",".join(map(str, row)) for row in rows]
    file.write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")
    return file


@pytest.mark.parametrize(
    "content",
    [
        "a,b,c\n1.5,x,2\n2.5,y,\n",
        "a;b;c\r\n1,5;x;2\r\n2,5;y;\r\n",
        "a\tb\tc\n1.5\t\"x\"\t2\n2.5\ty\tNA\n\n",
        "\ufeffa,b,c\n1.5, x ,2\n2.5,y,null\n",
        "a|b|c\r1.5|x|2\r2.5|y|?\r",
        "a,b,c\n1.5,x,2\n2.5,y,\n".encode("utf-16"),
        "a,b,c\n1.5,x,2\n2.5,y,\n".encode("utf-16-le"),
    ],
)  # fmt: skip
def test_how_a_text_is_written_is_found(tmp_path: Path, content: str | bytes) -> None:
    seen = frame(tmp_path / "x.csv", content)
    assert np.asarray(seen.columns["a"]).tolist() == [1.5, 2.5]
    assert seen.about["b"]["values"] == ["x", "y"]
    assert np.isnan(np.asarray(seen.columns["c"])).tolist() == [False, True]


def test_what_cells_are_is_found(tmp_path: Path) -> None:
    text = (
        "no;größe;day;yes;zip;text;big\n"
        '1;1.234,5;2020-01-02;Yes;01234;"a;\nb";12345678901234567890\n'
        "2;2,5;2020-01-03;No;12345;é;1\n"
    )
    seen = frame(tmp_path / "x.csv", text.encode("latin-1"))
    kinds = {name: about["kind"] for name, about in seen.about.items()}
    assert kinds == {
        "no": "integer", "größe": "number", "day": "date", "yes": "boolean", "zip": "text",
        "text": "text", "big": "integer",
    }  # fmt: skip
    assert np.asarray(seen.columns["größe"]).tolist() == [1234.5, 2.5]
    assert np.diff(np.asarray(seen.columns["day"])).tolist() == [86400.0]
    assert seen.about["text"]["values"] == ["a;\nb", "é"]
    assert seen.about["big"]["too_large"] == 0
    assert "decimal commas" in seen.dialect
    packed = tmp_path / "y.tsv.gz"
    packed.write_bytes(gzip.compress(b"1\t2\n3\t4\n"))
    plain = open_frame(packed, cache_dir=tmp_path / "cache")
    assert list(plain.columns) == ["column_1", "column_2"]
    assert "no line of names" in plain.dialect


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n3\n", "line 3: has 1 cells, and the first line 2"),
        ("a,b\n1,2\n3,4,5\n", "line 3: has 3 cells, and the first line 2"),
        ("a,b,a\n1,2,3\n", "line 1, field 'a': 2 columns have this name"),
        ("a,b\n", "there are no records, only the names ['a', 'b']"),
        ("", "the file is empty"),
        ("\n \n", "the file is empty"),
        (b"a,b\n\x00\x01\x02,\xff\n", "is no text: it holds bytes of value 0"),
        ("a," * 70_000 + "b\n", "has 70001 columns, and 65536 are read of a text"),
    ],
)
def test_a_broken_text_is_refused_in_its_place(
    tmp_path: Path, content: str | bytes, message: str
) -> None:
    with pytest.raises(DataError) as refused:
        frame(tmp_path / "x.csv", content)
    assert message in str(refused.value)


ROWS = [
    [at, at / 10, "abc"[at % 3], "same", f"r{at}", "good" if at % 3 else "bad"] for at in range(40)
]
HEAD = "id,size,kind,constant,name,label"


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"target_column": "lable"}, "there is no field 'lable'"),
        ({"target_column": "lable"}, "did you mean 'label'?"),
        ({"input_column": ("size", "kinds")}, "did you mean 'kind'?"),
        ({"input_column": ("size", "label")}, "field 'label': is the target and among the inputs"),
        ({"target_column": "constant"}, "field 'constant': is 'same' in each record"),
        ({"target": "number"}, "record 0, field 'label': holds words, as 'bad'"),
        ({"target_column": "size"}, "record 1, field 'size': holds 0.1, and classes are"),
        ({"target_column": "name"}, "validation share alone"),
    ],
)
def test_what_cannot_be_learned_is_refused_in_its_place(
    tmp_path: Path, chosen: dict[str, Any], message: str
) -> None:
    file = write(tmp_path / "x.csv", HEAD, ROWS)
    with pytest.raises(PluginError) as refused:
        dealt(file, **{"target_column": "label", **chosen})
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([*range(39), "oops"], "record 39, field 'x': holds 'oops' among numbers"),
        ([*range(39), "inf"], "record 39, field 'x': is infinite"),
        ([10**20, *range(39)], "record 0, field 'x': is an integer beyond 2^53"),
        ([""] * 40, "field 'x': holds no value at all"),
    ],
)
def test_cells_that_are_no_numbers_are_refused_in_their_place(
    tmp_path: Path, column: list[Any], message: str
) -> None:
    rows = [[cell, at % 2] for at, cell in enumerate(column)]
    file = write(tmp_path / "x.csv", "x,label", rows)
    with pytest.raises(PluginError) as refused:
        dealt(file, target_column="label", input_column=("x",))
    assert message in str(refused.value)


def test_columns_that_say_nothing_are_left_out_and_said(tmp_path: Path) -> None:
    told = Seeded()
    data = dealt(write(tmp_path / "x.csv", HEAD, ROWS), told, target_column="label")
    assert data.table.name_of("input") == "size, kind"
    assert data.spec.features == 4
    assert data.spec.labels == ("bad", "good")
    said = " ".join(told.told)
    for name in ("id (names rows", "constant (always the same)", "name (names rows"):
        assert name in said
    chosen = dealt(tmp_path / "x.csv", target_column="label", input_column=("s*",))
    assert chosen.spec.features == 1


def test_scales_and_kinds_are_those_of_the_training_share(tmp_path: Path) -> None:
    rows = [[float(at**2), f"k{at}" if at > 28 else "k", at % 2] for at in range(30)]
    file = write(tmp_path / "x.csv", "x,kind,label", rows)
    data = dealt(file, target_column="label", validation_split=0.5)
    training = data.sampler.all_training()  # type: ignore[attr-defined]
    inputs, _ = everything(data)
    of_training = inputs[torch.from_numpy(training)][:, 0].double()
    assert of_training.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert of_training.std(correction=0).item() == pytest.approx(1.0, abs=1e-6)
    whole = inputs[:, 0].double()
    assert abs(whole.mean().item()) > 1e-3
    prepared = data.preparation
    assert prepared is not None
    assert prepared.inputs[1].words == ("k", "k29") if 29 in training else ("k",)
    plain = dealt(file, target_column="label", input_column=("x",), scale="none")
    assert everything(plain)[0][:, 0].tolist() == [row[0] for row in rows]


def test_missing_values_go_by_the_rule_that_is_stated(tmp_path: Path) -> None:
    rows = [
        ["" if at == 3 else at % 7, "" if at == 5 else "ab"[at % 2], at % 2] for at in range(30)
    ]
    file = write(tmp_path / "x.csv", "x,kind,label", rows)
    told = Seeded()
    data = dealt(file, told, target_column="label", scale="none", validation_split=0.0)
    inputs, _ = everything(data)
    known = [row[0] for row in rows if row[0] != ""]
    assert inputs[3, 0].item() == np.median(known)
    assert inputs[5, 1:].tolist() == [0.0, 0.0]
    assert "missing values are the median of the training share" in " ".join(told.told)
    fewer = dealt(file, target_column="label", missing="leave_out")
    assert len(fewer.table) == 28
    with pytest.raises(PluginError, match="record 3, field 'x': 1 records have no value"):
        dealt(file, target_column="label", missing="refuse")
    rows[7][2] = ""
    with pytest.raises(PluginError, match="record 7, field 'label': is missing"):
        dealt(write(file, "x,kind,label", rows), target_column="label")


def test_a_stratified_split_gives_each_class_its_share(tmp_path: Path) -> None:
    labels = ["rare"] * 2 + ["some"] * 18 + ["most"] * 80
    file = write(tmp_path / "x.csv", "x,label", [[at, each] for at, each in enumerate(labels)])
    chosen: dict[str, Any] = {"target_column": "label", "input_column": ("x",)}
    for seed in range(5):
        data = dealt(file, validation_split=0.3, stratified=True, split_seed=seed, **chosen)
        held = data.sampler.validation_samples(0, 100)
        names = [labels[at] for at in held.tolist()]
        assert len(names) == 30
        assert names.count("most") == 24
        assert names.count("some") in (5, 6)
        assert names.count("rare") < 2


def test_columns_of_other_formats_are_read_by_name_too(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    columns = {"a": [1.0, 2.0, 3.0, 4.0], "w": ["x", "y", None, "x"], "t": ["n", "y", "n", "y"]}
    pa.parquet.write_table(pa.table(columns), tmp_path / "x.parquet")
    np.savez(tmp_path / "x.npz", a=np.arange(4), b=np.arange(4.0), t=np.array([0, 1, 0, 1]))
    lines = [{"a": at, "b": at / 2, "t": at % 2} for at in range(4)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    by_name: dict[str, Any] = {"target_column": "t", "validation_split": 0.0, "scale": "none"}
    data = dealt(tmp_path / "x.parquet", input_column=("*",), **by_name)
    assert everything(data)[0].tolist() == [[1, 1, 0], [2, 0, 1], [3, 0, 0], [4, 1, 0]]
    assert everything(data)[1].tolist() == [0, 1, 0, 1]
    assert data.spec.labels == ("n", "y")
    for name in ("x.npz", "x.jsonl"):
        data = dealt(tmp_path / name, input_column=("b", "a"), **by_name)
        assert everything(data)[0][:, 1].tolist() == [0, 1, 2, 3]


def pipeline(folder: Path, *settings: str, **data: Any) -> Any:
    chosen = {"cache_dir": str(folder / "cache"), "batch_size": 8, **data}
    own = [
        f"data={{use: file, with: {json.dumps(chosen)}}}", "model={use: mlp, with: {hidden: [8]}}",
        "observers=null", "callbacks=null", "exporters=null", "gradients=null",
        "run.validate_every=5", "run.save_every=4", "schedule=null", *settings,
    ]  # fmt: skip
    return load_pipeline("smoke", own)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("named")
    rows = [[at % 13, "pqr"[at % 3], "yes" if at % 13 > 6 else "no"] for at in range(60)]
    write(folder / "x.csv", "x,kind,label", rows)
    chosen = pipeline(
        folder,
        "run.max_steps=80",
        "quantizer=null",
        path=str(folder / "x.csv"),
        target_column="label",
    )
    run(chosen, output_dir=folder / "run", quiet=True)
    return folder


def test_a_run_reads_other_files_as_it_was_trained(trained: Path) -> None:
    used = load_run(trained / "run")
    assert used.spec.labels == ("no", "yes")
    straight = write(trained / "new.csv", "x,kind", [[1, "p"], [12, "q"], [3, "r"]])
    other = write(trained / "other.csv", "kind,more,x", [["p", 9, 1], ["q", 9, 12], ["r", 9, 3]])
    wanted = torch.cat(list(file_inputs(used, straight)))
    assert torch.equal(torch.cat(list(file_inputs(used, other))), wanted)
    answers = used.predict(wanted).argmax(1).tolist()
    assert answers[1] == 1
    strange = write(trained / "strange.csv", "x,kind", [[1, "s"], ["", "p"]])
    inputs = torch.cat(list(file_inputs(used, strange)))
    assert inputs[0, 1:].tolist() == [0.0, 0.0, 0.0]
    assert unknown_words(used, strange) == {"kind": ["s"]}
    with pytest.raises(ConfigError, match="did you mean 'xx'"):
        list(file_inputs(used, write(trained / "lack.csv", "kind,xx", [["p", 1]])))
    words = write(trained / "words.csv", "x,kind", [["many", "p"], [2, "q"]])
    with pytest.raises(ConfigError, match="record 0, field 'x': holds words, as"):
        list(file_inputs(used, words))
    new = write(trained / "label.csv", "x,kind,label", [[1, "p", "no"], [2, "q", "maybe"]])
    with pytest.raises(ConfigError, match="record 1, field 'label': holds the label 'maybe'"):
        evaluate_run(trained / "run", new)
    assert evaluate_run(trained / "run", trained / "x.csv")["accuracy"] > 0.8


def test_a_resumed_run_goes_on_with_what_was_fitted(trained: Path, tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"path": str(trained / "x.csv"), "target_column": "label"}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(pipeline(trained, "run.max_steps=11", **chosen), output_dir=whole, quiet=True)
    run(pipeline(trained, "run.max_steps=6", **chosen), output_dir=cut, quiet=True)
    kept = (cut / "preparation.json").read_bytes()
    resume(cut, ["run.max_steps=11", "data.with.split_seed=9"], quiet=True)
    assert (cut / "preparation.json").read_bytes() == kept
    end = tmp_path / "end"
    run(pipeline(trained, "run.max_steps=6", **chosen), output_dir=end, quiet=True)
    resume(end, ["run.max_steps=11"], quiet=True)
    assert not differences(*(each / "checkpoints" / "step-11" for each in (whole, end)))
    damaged = json.loads(kept)
    damaged["inputs"][0]["mean"] = [5.0]
    (cut / "preparation.json").write_text(json.dumps(damaged))
    with pytest.raises(PluginError, match=r"put preparation\.json back"):
        load_run(cut)


def test_numbers_are_predicted_in_their_own_unit(tmp_path: Path) -> None:
    rows = [[at % 11, 5000 + 100 * (at % 11)] for at in range(66)]
    file = write(tmp_path / "x.csv", "x,price", rows)
    settings = [
        "run.max_steps=120", "loss={use: regression}", "validators=[{use: regression}]",
        "optimizer.with.lr=0.03", "quantizer=null",
    ]  # fmt: skip
    chosen = pipeline(
        tmp_path, *settings, path=str(file), target="number", target_column="price",
        target_scale="standard",
    )  # fmt: skip
    run(chosen, output_dir=tmp_path / "run", quiet=True)
    used = load_run(tmp_path / "run")
    inputs = torch.cat(list(file_inputs(used, file)))
    answers = used.preparation.unscaled(used.predict(inputs))[:11, 0]
    assert (answers - torch.tensor([float(row[1]) for row in rows[:11]])).abs().max() < 150
