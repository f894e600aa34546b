"""`forge init` looks at data and writes a pipeline that learns them; `forge data` says what to write.

Planted faults: the majority's share left out of the file; a file that is there written over; the
target taken for an input.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest

from forge_kernel import load_pipeline, run
from forge_kernel.planning.catalog import Catalog
from forge_kernel.planning.plan import plan
from forge_plugins.commands.first_pipeline import pipeline_text
from forge_plugins.commands.suggestion import looked_at
from forge_plugins.formats.errors import DataError
from forge_plugins.formats.open_table import open_table

ROOT = Path(__file__).resolve().parents[3]
DIGITS = ROOT / "pipelines" / "data" / "digits.frec"


def forge(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return forked.run(
        [sys.executable, "-m", "forge_kernel", *map(str, arguments)], capture_output=True,
        text=True, check=False, cwd=cwd,
    )  # fmt: skip


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def learned(data: str, folder: Path, *settings: str, target: str | None = None) -> dict[str, Any]:
    """The best metrics of a run of the pipeline that is written for data."""
    file = folder / "first.yaml"
    file.write_text(
        pipeline_text(looked_at(data, target), "first", "schema.json"), encoding="utf-8"
    )
    chosen = load_pipeline(file, ["observers=null", "exporters=null", *settings])
    return dict(run(chosen, output_dir=folder / "run", quiet=True).best)


def digits_as_pictures(folder: Path, count: int | None = None) -> Path:
    image = pytest.importorskip("PIL.Image")
    table = open_table(DIGITS)
    pixels = np.asarray(table.columns["input"][:]).reshape(-1, 8, 8) * 15
    labels = np.asarray(table.columns["target"][:]).reshape(-1)
    for at, (picture, label) in enumerate(zip(pixels[:count], labels[:count], strict=True)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        image.fromarray(picture.astype(np.uint8)).save(folder / str(label) / f"{at:04}.png")
    return folder


def texts(folder: Path, size: int) -> Path:
    from pydoc_data.topics import topics

    folder.mkdir()
    left = size
    for at, text in enumerate(topics.values()):
        (folder / f"{at:03}.txt").write_text(text[:left], encoding="utf-8")
        left -= len(text[:left])
        if not left:
            break
    return folder


def test_two_commands_train_on_a_table(cache: Path) -> None:
    shutil.copy(ROOT / "pipelines" / "data" / "wine.csv", cache / "my wine.csv")
    done = forge("init", "my wine.csv", cwd=cache)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "my-wine.yaml is written; now: forge run my-wine.yaml"
    text = (cache / "my-wine.yaml").read_text(encoding="utf-8")
    first, second = text.splitlines()[:2]
    assert re.fullmatch(r"# yaml-language-server: \$schema=pipeline\.schema\.json", first)
    assert (cache / "pipeline.schema.json").is_file()
    assert "always 'B' is right in 39.9 %" in second
    short = ("--set", "run.max_steps=150", "--set", "exporters=null", "--set", "observers=null")
    trained = forge("run", "my-wine.yaml", "-q", "--output-dir", "run", *short, cwd=cache)
    assert trained.returncode == 0, trained.stderr
    result = json.loads((cache / "run" / "result.json").read_text())
    assert result["best"]["accuracy"] >= 0.9
    again = forge("init", "my wine.csv", cwd=cache)
    assert again.returncode == 2
    assert "my-wine.yaml is there already" in again.stderr
    assert (cache / "my-wine.yaml").read_text(encoding="utf-8") == text


def test_pictures_and_texts_beat_their_baselines_in_a_few_steps(cache: Path) -> None:
    digits_as_pictures(cache / "digits", 500)
    assert learned("digits", cache, "run.max_steps=60")["accuracy"] > 0.6
    texts(cache / "texts", 60_000)
    suggestion = looked_at("texts")
    entropy = float(re.findall(r"a loss of ([\d.]+)", suggestion.baseline)[0])
    short = (
        "run.max_steps=40", "run.validate_every=40", "model.with.layers=1",
        "data.with.sequence_length=48", "data.with.validation_split=0.03",
    )  # fmt: skip
    (cache / "t").mkdir()
    assert learned(str(cache / "texts"), cache / "t", *short)["loss"] < entropy


@pytest.mark.deep
def test_whole_first_runs_reach_what_is_promised(cache: Path) -> None:
    assert learned("shipped:wine.csv", cache)["accuracy"] >= 0.95
    digits_as_pictures(cache / "digits")
    (cache / "d").mkdir()
    assert learned(str(cache / "digits"), cache / "d")["accuracy"] >= 0.93
    texts(cache / "texts", 400_000)
    entropy = float(re.findall(r"a loss of ([\d.]+)", looked_at("texts").baseline)[0])
    (cache / "t").mkdir()
    assert learned(str(cache / "texts"), cache / "t")["loss"] < entropy - 1


def test_numbers_are_predicted_better_than_their_mean(cache: Path) -> None:
    draws = np.random.default_rng(0)
    a, b = draws.normal(size=(2, 300))
    rows = [
        f"{x:.3f},{y:.3f},{'rg'[int(y > 0)]},{1000 + 90 * x - 40 * y:.2f}"
        for x, y in zip(a, b, strict=True)
    ]
    (cache / "x.csv").write_text("\n".join(["a,b,colour,price", *rows]))
    suggestion = looked_at("x.csv")
    assert suggestion.target == "number"
    assert suggestion.settings["target_column"] == "price"
    assert "has an R² of 0" in suggestion.baseline
    assert learned("x.csv", cache, "run.max_steps=150")["r2"] > 0.5
    other = looked_at("x.csv", "colour")
    assert other.settings["target_column"] == "colour"
    assert other.target == "class"


@pytest.mark.parametrize(
    ("name", "target"),
    [("digits.npz", "class"), ("digits.parquet", "class"), ("digits.jsonl.gz", "class")],
)
def test_files_of_samples_have_a_pipeline_that_is_right(
    cache: Path, name: str, target: str
) -> None:
    suggestion = looked_at(f"shipped:{name}")
    assert suggestion.target == target
    file = cache / "x.yaml"
    file.write_text(pipeline_text(suggestion, "x", "s.json"), encoding="utf-8")
    assert plan(load_pipeline(file), Catalog.installed())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n", "x.csv: there are no records"),
        ("a\n1\n2\n", "field 'a': there is no other column"),
        (None, "there is no such file"),
    ],
)
def test_data_that_cannot_be_learned_are_refused(
    cache: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (cache / "x.csv").write_text(content)
    done = forge("init", "x.csv", cwd=cache)
    assert done.returncode == 2
    assert message in done.stderr
    assert not list(cache.glob("*.yaml"))


def test_folders_that_say_nothing_are_refused(cache: Path) -> None:
    pytest.importorskip("PIL")
    for name, message in (("empty", "has no folders"), ("tables", "which one is meant")):
        (cache / name).mkdir()
        if name == "tables":
            (cache / name / "a.csv").write_text("a,b\n1,2\n")
        with pytest.raises(DataError, match=message):
            looked_at(name)
    (cache / "short").mkdir()
    (cache / "short" / "a.txt").write_text("too short")
    with pytest.raises(DataError, match="9 bytes are too few"):
        looked_at("short")


def test_forge_data_shows_columns_and_says_what_to_write(cache: Path) -> None:
    (cache / "x.csv").write_text(
        "id,day,kind,y\n1,2020-01-02,a,yes\n2,2020-01-03,,no\n3,2020-01-05,b,no\n"
    )
    done = forge("data", "x.csv", "--page", "page.html", cwd=cache)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(re.match(r" +day +date +0 +3 +2020-01-02 to 2020-01-05", line) for line in lines)
    assert any(re.match(r" +kind +text +1 +2 +a 1, b 1", line) for line in lines)
    assert "to beat: always 'no' is right in 66.7 % (accuracy 0.667)" in lines
    assert (
        '  data: {use: file, with: {path: "x.csv", target_column: "y", stratified: true}}' in lines
    )
    assert "forge init x.csv" in (cache / "page.html").read_text(encoding="utf-8")
    told = json.loads(forge("data", "x.csv", "--json", cwd=cache).stdout)
    assert told["columns"]["kind"]["missing"] == 1
    assert told["data"]["with"]["target_column"] == "y"
    pictures = digits_as_pictures(cache / "digits", 60)
    shown = forge("data", pictures.name, cwd=cache).stdout
    assert "60 pictures, grey" in shown
    assert "use: image_folder" in shown
