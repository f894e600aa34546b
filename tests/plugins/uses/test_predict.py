"""Answers for the samples of a file: in its order, as the model gives them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
from clients import need
from model_folders import edit_config, make_folder

from forge_kernel import load_run, run
from forge_kernel.errors import ConfigError
from forge_kernel.planning.pipeline_file import load_pipeline
from forge_plugins.uses.file_inputs import file_inputs

ROOT = Path(__file__).resolve().parents[3]
ROWS = 600


def write(file: Path, target: str, rows: int = ROWS, features: int = 5) -> None:
    draws = np.random.default_rng(3)
    inputs = draws.normal(size=(rows, features)).astype(np.float32)
    answers: Any = (inputs[:, 0] > 0).astype(np.int64)
    if target == "number":
        answers = inputs[:, :1] * 2
    np.savez(file, input=inputs, target=answers)


def trained(folder: Path, target: str) -> Path:
    write(folder / "train.npz", target)
    data = (
        f"data={{use: file, with: {{path: {folder / 'train.npz'}, target: {target}, batch_size: 50, "
        f"cache_dir: {folder / 'cache'}}}}}"
    )
    loss = "cross_entropy" if target == "class" else "regression"
    settings = [
        data, "model={use: mlp, with: {hidden: [16]}}", "run.max_steps=60", "observers=null",
        "callbacks=null", "validators=null", "exporters=null", f"loss={{use: {loss}}}",
        "run.validate_every=null",
    ]  # fmt: skip
    run(load_pipeline("smoke", settings), output_dir=folder / "run", quiet=True)
    return folder / "run"


def forge(*arguments: object) -> subprocess.CompletedProcess[str]:
    return forked.run(
        [sys.executable, "-m", "forge_kernel", *map(str, arguments)], capture_output=True,
        text=True, check=False,
    )  # fmt: skip


def answers(folder: Path, file: Path) -> list[dict[str, Any]]:
    done = forge("predict", folder, file)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("target", ["class", "number"])
def test_each_sample_has_its_answer_in_the_files_order(tmp_path: Path, target: str) -> None:
    """More samples than a batch. Planted: the order of training; the last batch dropped."""
    folder, out = trained(tmp_path, target), tmp_path / "out.jsonl"
    write(tmp_path / "new.npz", target, rows=ROWS + 7)
    done = forge("predict", folder, tmp_path / "new.npz", "--out", out)
    assert done.returncode == 0, done.stderr
    assert f"{ROWS + 7} predictions" in done.stdout
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    inputs = torch.from_numpy(np.load(tmp_path / "new.npz")["input"])
    with torch.no_grad():
        outputs = load_run(folder).model(inputs)
    if target == "class":
        assert [line["label"] for line in lines] == outputs.argmax(-1).tolist()
        wanted = outputs.softmax(-1).max(-1).values
        seen = torch.tensor([line["probability"] for line in lines])
        right = [line["label"] for line in lines] == (inputs[:, 0] > 0).numpy()
        assert right.mean() > 0.6  # it has learned something of the order's rows
    else:
        wanted, seen = outputs.squeeze(-1), torch.tensor([line["value"] for line in lines])
    torch.testing.assert_close(seen, wanted, rtol=1e-5, atol=1e-6)


def test_a_file_of_another_format_gives_the_same_answers(tmp_path: Path) -> None:
    folder = trained(tmp_path, "class")
    inputs = np.load(tmp_path / "train.npz")["input"][:20]
    rows = [{"input": row.tolist()} for row in inputs]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = forge("predict", folder, tmp_path / "rows.jsonl")
    assert done.returncode == 0, done.stderr
    outputs = load_run(folder).predict(torch.from_numpy(inputs))
    labels = [json.loads(line)["label"] for line in done.stdout.splitlines()]
    assert labels == outputs.argmax(-1).tolist()


def test_a_run_on_other_data_reads_tokens(tmp_path: Path) -> None:
    """The showcase's task: four tokens, one answer at each place."""
    settings = ["run.max_steps=2", "observers=null", "exporters=null"]
    run(load_pipeline("bitnet_grokfast", settings), output_dir=tmp_path / "run", quiet=True)
    trained_run = load_run(tmp_path / "run")
    (tmp_path / "t.jsonl").write_text('{"input": [1, 97, 2, 98]}\n{"input": [5, 97, 6, 98]}\n')
    (batch,) = file_inputs(trained_run, tmp_path / "t.jsonl")
    assert batch.tolist() == [[1, 97, 2, 98], [5, 97, 6, 98]]
    done = forge("predict", tmp_path / "run", tmp_path / "t.jsonl")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout.splitlines()[0])["label"]) == 4


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "such file"), ('{"input": [1.0, 2.0]}\n' * 2, "numbers in a sample, and the run was"),
        ('{"input": "x"}\n', "input"), ("", "the file is empty"),
    ],
)  # fmt: skip
def test_what_the_model_cannot_read_is_refused(
    tmp_path: Path, content: str | None, told: str
) -> None:
    folder, file = trained(tmp_path, "class"), tmp_path / "new.jsonl"
    if content is not None:
        file.write_text(content)
    done = forge("predict", folder, file)
    assert done.returncode == 2, done.stdout
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_no_sample_is_no_question(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no sample"):
        load_run(trained(tmp_path, "class")).predict(torch.empty(0, 5))


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run folder and no model's folder"):
        load_run(tmp_path)


def test_a_label_has_the_name_that_the_model_gives_it(tmp_path: Path) -> None:
    need("transformers")
    folder = make_folder(tmp_path / "model", "vit")
    samples = np.random.default_rng(0).random((3, 64)).astype(np.float32)
    np.savez(tmp_path / "x.npz", input=samples)
    plain = answers(folder, tmp_path / "x.npz")
    assert all("name" not in line for line in plain)
    words = ["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"]
    edit_config(folder, id2label=dict(zip(map(str, range(10)), words, strict=True)))
    named = answers(folder, tmp_path / "x.npz")
    for line, before in zip(named, plain, strict=True):
        assert line["label"] == before["label"]
        assert line["name"] == words[line["label"]]
