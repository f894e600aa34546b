"""Twenty mistakes of a beginner: each refused at its place, with cause and mend, nothing written."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from forge_kernel.cli import main
from forge_kernel.planning.pipeline_file import load_pipeline
from forge_kernel.runner import run

PIPELINE = """forge: 1
run: {name: mine, max_steps: 2, device: cpu}
data: {use: file, with: {path: flowers.csv, target_column: kind, batch_size: 8, validation_split: 0.25}}
model: {use: mlp, with: {hidden: [8]}}
optimizer: {use: adamw, with: {lr: 1e-2}}
loss: {use: cross_entropy}
validators: [{use: classification}]
exporters: [{use: state_dict}]
observers: [{use: metrics_jsonl}]
"""
NETS = """import torch
from torch import nn

class TooNarrow(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, inputs):
        return self.last(self.first(inputs).relu())

class TwoOutputs(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(2, 2))

class SmallVocabulary(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 50)

    def forward(self, tokens):
        return self.head(self.tokens(tokens))

class Buggy(nn.Linear):
    def __init__(self):
        super().__init__(2, 3)

    def forward(self, inputs):
        return super().forward(inputs) + self.offset

class Doubles(nn.Linear):
    def __init__(self):
        super().__init__(2, 3, dtype=torch.float64)
"""
OF_OWN = "model: {use: python_class, with: {factory: 'nets_of_a_beginner:%s'}}"
MLP = "model: {use: mlp, with: {hidden: [8]}}"
ROWS = [f"{number % 7},{number * 5 % 11},{'abc'[number % 3]}" for number in range(40)]


@dataclass(frozen=True)
class Mistake:
    """What a beginner writes, and what is told."""

    place: str  # line:column and path
    cause: str
    mend: str
    change: tuple[tuple[str, str], ...] = ()
    arguments: tuple[str, ...] = ()
    prepare: Callable[[Path], None] = lambda folder: None


def _shadowed(folder: Path) -> None:
    (folder / "nets_of_a_beginner.py").write_text("import a_module_that_is_not_there\n")


def _cell(row: int, text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        rows = [*ROWS]
        rows[row] = text
        (folder / "flowers.csv").write_text("\n".join(["width,height,kind", *rows]) + "\n")

    return write


def _tokens(folder: Path) -> None:
    lines = [f'{{"input": [{n % 7}, {n % 50}, 49], "target": [1, 2, {n % 50}]}}' for n in range(40)]
    (folder / "tokens.jsonl").write_text("\n".join(lines) + "\n")


def _locked_file(folder: Path) -> None:
    (folder / "flowers.csv").unlink()
    (folder / "flowers.csv").symlink_to("flowers.csv")  # nobody can open it, not even root


def _taken(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out/thesis.txt").write_text("mine")


def _file_for_a_folder(folder: Path) -> None:
    (folder / "out").write_text("mine")


MISTAKES = {
    "wrong_path": Mistake(
        "3:32  data.with.path", "flower.csv", "no such file",
        change=(("flowers.csv", "flower.csv"),),
    ),
    "cuda_without_one": Mistake(
        "2:41  run.device", "torch sees 0 CUDA devices", "set run.device: cpu", change=(("device: cpu", "device: cuda"),),
    ),
    "batch_of_nothing": Mistake(
        "3:78  data.with.batch_size", "0 must be at least 1", "forge plugins file", change=(("batch_size: 8", "batch_size: 0"),),
    ),
    "no_such_column": Mistake(
        "3:60  data.with.target_column", "colour", "kind", change=(("target_column: kind", "target_column: colour"),),
    ),
    "labels_out_of_range": Mistake(
        "4:8  model", "3 classes (labels 0 to 2)", "let the model give 3 outputs", change=((MLP, OF_OWN % "TwoOutputs"),),
    ),
    "tokens_out_of_range": Mistake(
        "4:8  model", "tokens up to 49, which the model's layer tokens, Embedding(10, 4), was given shape (2, 3) int64", "vocabulary",
        change=(
            ("path: flowers.csv, target_column: kind", "path: tokens.jsonl, input: tokens"),
            (MLP, OF_OWN % "SmallVocabulary"),
        ),
        prepare=_tokens,
    ),
    "words_with_a_regression": Mistake(
        "6:7  loss", "regression", "target", change=(("cross_entropy", "regression"), ("classification", "regression")),
    ),
    "words_as_numbers": Mistake(
        "3:60  data.with.target_column", "holds words", "write numbers",
        change=(("cross_entropy", "regression"), ("classification", "regression"), ("target_column: kind", "target_column: kind, target: number")),
    ),
    "nan_in_the_data": Mistake(
        "3:75  data.with.missing", "record 3", "fill", prepare=_cell(3, "nan,nan,a"),
        change=(("target_column: kind", "target_column: kind, missing: refuse"),),
    ),
    "shapes_that_do_not_meet": Mistake(
        "4:8  model", "the model's layer first, Linear(in_features=5, out_features=8, bias=True), was given shape (2, 2) float32", "the data gives inputs of shape (2, 2) float32",
        change=((MLP, OF_OWN % "TooNarrow"),),
    ),
    "other_numbers_than_the_data": Mistake(
        "4:8  model", "Double", "the data gives inputs of shape (2, 2) float32", change=((MLP, OF_OWN % "Doubles"),),
    ),
    "bug_in_ones_own_network": Mistake(
        "4:8  model", "has no attribute 'offset'", "nets_of_a_beginner.py:31", change=((MLP, OF_OWN % "Buggy"),),
    ),
    "import_error_in_ones_own_module": Mistake(
        "4:44  model.with.factory", "No module named 'a_module_that_is_not_there'", "itself imports a_module_that_is_not_there: install that", change=((MLP, OF_OWN % "Buggy"),), prepare=_shadowed,
    ),
    "no_permission_to_read": Mistake("3:32  data.with.path", "flowers.csv", "", prepare=_locked_file),
    "folder_in_use": Mistake("", "the folder out is not empty", "name a new one", arguments=("--output-dir", "out"), prepare=_taken),
    "file_where_a_folder_should_be": Mistake("", "cannot make the run folder out", "", arguments=("--output-dir", "out"), prepare=_file_for_a_folder),
    "wrong_exporter": Mistake("8:13  exporters[0]", "gguf", "use: llama_decoder", change=(("state_dict", "gguf"),)),
    "exporter_without_a_quantizer": Mistake("8:13  exporters[0]", "packed_ternary", "quantizer: {use: bitnet}", change=(("state_dict", "packed_ternary"),)),
    "metric_that_nobody_computes": Mistake("8:13  callbacks[0]", "perplexity", "accuracy", change=(("[{use: classification}]\n", "[{use: classification}]\ncallbacks: [{use: early_stopping, with: {metric: perplexity}}]\n"),)),
    "batch_larger_than_the_data": Mistake("3:93  data.with.drop_last", "30 samples are left to train on", "batch_size", change=(("batch_size: 8", "batch_size: 64, drop_last: true"),)),
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "flowers.csv").write_text("\n".join(["width,height,kind", *ROWS]) + "\n")
    (tmp_path / "nets_of_a_beginner.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.with_name("cache")))
    yield tmp_path
    sys.modules.pop("nets_of_a_beginner", None)


def forge(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit status of the command line."""
    monkeypatch.setattr(sys, "argv", ["forge", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> str:
    """What is told of a command that is refused and leaves all files as they were."""
    before = _files(Path())
    assert forge(monkeypatch, *arguments) == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    assert _files(Path()) == before
    return shown


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
        if "__pycache__" not in path.parts
    }


def write(mistake: Mistake, folder: Path) -> None:
    text = PIPELINE
    for old, new in mistake.change:
        assert old in text
        text = text.replace(old, new)
    (folder / "mine.yaml").write_text(text)
    mistake.prepare(folder)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_at_its_place_with_cause_and_mend_and_nothing_is_written(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "cuda_without_one" and torch.cuda.is_available():
        pytest.skip("there is one")
    mistake = MISTAKES[name]
    write(mistake, place)
    shown = refused(monkeypatch, capsys, "run", "mine.yaml", "-q", *mistake.arguments)
    if mistake.place:
        assert f"mine.yaml:{mistake.place}" in shown
    assert mistake.cause in shown
    assert mistake.mend in shown
    assert not re.search(r"needs '[a-z]+:", shown)  # words between plugins are not for people
    if not mistake.arguments:
        assert refused(monkeypatch, capsys, "check", "--deep", "mine.yaml") == shown


def test_another_model_is_refused_when_a_run_goes_on_and_the_run_stays_as_it_was(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "mine.yaml").write_text(PIPELINE)
    assert forge(monkeypatch, "run", "mine.yaml", "-q", "--output-dir", "run") == 0
    for change in ("model.with.hidden=[16]", "data.with.path=lost.csv"):
        shown = refused(
            monkeypatch, capsys, "resume", "run", "--set", change, "--set", "run.max_steps=4"
        )
        assert f"--set {change.partition('=')[0]}" in shown
    assert forge(monkeypatch, "resume", "run", "-q", "--set", "run.max_steps=4") == 0


def test_the_look_before_a_run_changes_no_bit_of_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: the samples drawn through the cache; the streams not put back; training mode."""
    text = PIPELINE.replace("batch_size: 8", "batch_size: 8, cache_size: 20, cache_policy: lru")
    text = text.replace(MLP, "model: {use: mlp, with: {hidden: [8], dropout: 0.5}}")
    text = text.replace("max_steps: 2", "max_steps: 6, log_every: 1, validate_every: 2")
    (place / "mine.yaml").write_text(text)
    assert forge(monkeypatch, "run", "mine.yaml", "-q", "--output-dir", "looked") == 0
    _ = run(load_pipeline("mine.yaml"), output_dir="plain", quiet=True)
    for file in ("model.safetensors", "state.safetensors"):
        looked, plain = (Path(run, "checkpoints/step-6", file) for run in ("looked", "plain"))
        assert looked.read_bytes() == plain.read_bytes()
    looked, plain = (metrics(Path(run)) for run in ("looked", "plain"))
    assert looked == plain
    assert any("cache_loads" in line for line in plain)


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key != "time" and "second" not in key}
        for line in lines
    ]
