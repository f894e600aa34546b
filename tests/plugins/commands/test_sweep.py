"""`forge sweep`: which runs, in forked processes, ranked; cut and gone on with; early ends."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import forked
import pytest
from typer.testing import CliRunner

from forge_kernel.cli import build_app
from forge_kernel.errors import ConfigError
from forge_kernel.planning.pipeline_file import load_pipeline
from forge_kernel.runner import run
from forge_plugins.sweeps.axis import parse_axis, parse_seeds
from forge_plugins.sweeps.outcome import Goal, Row, ranked, table
from forge_plugins.sweeps.search import OptunaSearch
from forge_plugins.sweeps.sweep import validations
from forge_plugins.sweeps.variant import Job, Variant, drawn, grid

PIPELINE = """forge: 1
run: {name: tiny, max_steps: 6, validate_every: 2, save_every: 2, device: cpu, threads: 1}
data: {use: modular_arithmetic, with: {modulus: 5, batch_size: 8}}
model: {use: mlp, with: {hidden: [8]}}
optimizer: {use: adamw}
loss: {use: cross_entropy}
validators: [{use: classification}]
callbacks: [{use: best_checkpoint, with: {metric: accuracy, mode: max}}]
"""
SWEEP = ["sweep", "tiny.yaml", "--set", "optimizer.with.lr=1e-3,1e-1", "--seeds", "0-1"]


def forge(*arguments: str, cwd: Path) -> Any:
    return forked.run(
        [sys.executable, "-m", "forge_kernel", *arguments], cwd=cwd, capture_output=True, text=True,
        check=False, timeout=120,
    )  # fmt: skip


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "tiny.yaml").write_text(PIPELINE)
    done = forge(*SWEEP, "--output-dir", "s", "--workers", "2", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder


# -- what is varied -----------------------------------------------------------------------------


def test_commas_part_values_and_not_what_stands_in_brackets_or_quotes() -> None:
    assert parse_axis("a.b=1e-3, 3e-3").values == ("1e-3", "3e-3")
    assert parse_axis("m=[64, 32],[8]").values == ("[64, 32]", "[8]")
    assert parse_axis("m={a: 1, b: 2}").values == ("{a: 1, b: 2}",)
    assert parse_axis("p='a,b',c").values == ("'a,b'", "c")
    assert not parse_axis("run.max_steps=3").varies


@pytest.mark.parametrize(
    "text", ["lr", "=3", "lr=", "lr=1,,2", "lr=1,1", "lr=2..1", "lr=log:0..1", "lr=1..1"]
)
def test_what_is_no_axis_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_axis(text)


def test_seeds_are_ranges_and_lists() -> None:
    assert parse_seeds("0-2,7") == (0, 1, 2, 7)
    for text in ("", "a", "3-1", "1,1", "-1", "0-99999"):
        with pytest.raises(ConfigError):
            parse_seeds(text)


def test_a_grid_has_each_with_each_and_names_what_differs() -> None:
    axes = [parse_axis(text) for text in ("o.lr=1,2", "m.hidden=[8],[4, 4]", "run.max_steps=3")]
    variants = list(grid(axes))
    assert [variant.label for variant in variants] == [
        "lr=1 hidden=[8]", "lr=1 hidden=[4, 4]", "lr=2 hidden=[8]", "lr=2 hidden=[4, 4]"
    ]  # fmt: skip
    assert variants[1].settings == ["run.max_steps=3", "o.lr=1", "m.hidden=[4, 4]"]
    assert variants[1].name == "lr-1-hidden-4-4"
    assert Job(variants[1], 7).settings[-2:] == ["run.seed=7", "run.name=lr-1-hidden-4-4"]
    alike = next(grid([parse_axis("a.lr=1,2"), parse_axis("b.lr=3,4")]))
    assert alike.label == "a.lr=1 b.lr=3"


def test_what_is_drawn_lies_in_its_range_and_is_drawn_again_alike() -> None:
    axes = [parse_axis(text) for text in ("lr=log:1e-4..1e-1", "n=2..9", "x=a,b", "y=0..1")]
    first, again = (list(drawn(axes, 200, 0)) for _ in range(2))
    assert first == again
    assert first[:5] == list(drawn(axes, 5, 0))  # more of them are more of the same
    values = [dict(variant.values) for variant in first]
    rates = [float(value["lr"]) for value in values]
    assert 1e-4 <= min(rates) < 5e-4
    assert 60 < sum(rate < 10**-2.5 for rate in rates) < 140  # by the logarithm
    assert {int(value["n"]) for value in values} == set(range(2, 10))
    assert {value["x"] for value in values} == {"a", "b"}
    assert parse_axis("n=2..9").span.drawn(random.Random(0)).isdecimal()  # type: ignore[union-attr]


def test_the_table_has_the_best_median_first_and_those_without_one_last() -> None:
    def row(name: str, *values: float) -> Row:
        return Row(Variant(0, (("lr", name),), ()), values, 3, "")

    rows = [row("none"), row("wide", 0.1, 0.2, 0.99), row("good", 0.5, 0.6, 0.7)]
    shown = table(ranked(rows, Goal("accuracy", True)), Goal("accuracy", True))
    assert [line.split()[-1] for line in shown[2:]] == ["lr=good", "lr=wide", "lr=none"]
    assert shown[2].split()[:5] == ["1", "0.6", "0.5", "0.7", "3"]
    assert ranked(rows, Goal("loss", False))[0].variant.label == "lr=wide"


# -- runs ---------------------------------------------------------------------------------------


def test_a_sweep_ranks_its_runs_and_writes_the_comparison(swept: Path) -> None:
    shown = (swept / "stdout").read_text()
    best = {
        path.parent.name: json.loads(path.read_text())["best"]["accuracy"]
        for path in swept.glob("s/*/result.json")
    }
    assert sorted(best) == [
        "000-lr-1e-3-seed-0", "000-lr-1e-3-seed-1", "001-lr-1e-1-seed-0", "001-lr-1e-1-seed-1"
    ]  # fmt: skip
    assert "accuracy of the validation, highest first" in shown
    medians = {
        lr: sum(value for name, value in best.items() if lr in name) / 2 for lr in ("1e-3", "1e-1")
    }
    first = max(medians, key=lambda lr: medians[lr])
    (line,) = (line for line in shown.splitlines() if line.split()[:1] == ["1"])
    assert line.endswith(f"lr={first}")
    assert float(line.split()[1]) == pytest.approx(medians[first], rel=1e-3)
    page = (swept / "s/report.html").read_text()
    assert "lr-1e-3 (2 seeds)" in page
    assert list(swept.glob("s/*.txt")) == []  # nobody had anything to say


def test_a_run_of_a_sweep_is_the_run_that_it_would_be_alone(swept: Path) -> None:
    settings = ["optimizer.with.lr=1e-1", "run.seed=1"]
    _ = run(load_pipeline(swept / "tiny.yaml", settings), output_dir=swept / "alone", quiet=True)
    one, other = (
        (swept / name / "checkpoints/step-6/model.safetensors").read_bytes()
        for name in ("alone", "s/001-lr-1e-1-seed-1")
    )
    assert one == other


def test_the_same_command_runs_nothing_twice_and_resumes_what_was_cut(swept: Path) -> None:
    """Planted: a complete run begun again; a cut one begun anew."""
    folder = swept / "s/000-lr-1e-3-seed-1"
    whole = (folder / "checkpoints/step-6/model.safetensors").read_bytes()
    forked.run(
        ["rm", "-r", str(folder / "checkpoints/step-6"), str(folder / "result.json")], check=True
    )
    other = swept / "s/001-lr-1e-1-seed-0/result.json"
    before = other.stat().st_mtime_ns
    done = forge(*SWEEP, "--output-dir", "s", cwd=swept)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if "seed " in line)
    assert line.startswith("lr=1e-3, seed 1")
    assert (folder / "checkpoints/step-6/model.safetensors").read_bytes() == whole
    assert '"resumed"' in (folder / "forge.log").read_text() or (
        (folder / "forge.log").read_text().count('"run_start"') == 2
    )
    assert other.stat().st_mtime_ns == before
    wrong = forge(*SWEEP[:-1], "0-2", "--output-dir", "s", cwd=swept)
    assert wrong.returncode == 2
    assert "is of another sweep: seeds was [0, 1]" in wrong.stderr


def test_a_sweep_that_is_killed_leaves_runs_that_go_on(tmp_path: Path) -> None:
    """Its children notice that it has gone, stop at a step's edge and save."""
    (tmp_path / "tiny.yaml").write_text(
        PIPELINE.replace("max_steps: 6", "max_steps: 100000, max_seconds: 60")
    )
    command = [sys.executable, "-m", "forge_kernel", *SWEEP[:-2], "--output-dir", "s"]
    process = forked.Popen(
        [*command, "--workers", "2"], cwd=tmp_path, stdout=forked.DEVNULL, stderr=forked.DEVNULL
    )
    folders = [tmp_path / "s" / name for name in ("000-lr-1e-3", "001-lr-1e-1")]
    _until(lambda: all(list(folder.glob("checkpoints/step-*")) for folder in folders))
    process.send_signal(signal.SIGKILL)
    process.wait()
    _until(lambda: all((folder / "result.json").is_file() for folder in folders))
    for folder in folders:
        assert json.loads((folder / "result.json").read_text())["outcome"] == "stopped"
    process = forked.Popen(
        [*command, "--max-seconds", "0.5"], cwd=tmp_path, stdout=forked.PIPE, text=True
    )
    shown, _ = process.communicate(timeout=60)
    assert "--max-seconds 0.5 are over; go on: the same command" in shown
    assert "(2 not finished)" in shown or "(1 not finished)" in shown


def _until(true: Any) -> None:
    for _ in range(1200):
        if true():
            return
        time.sleep(0.05)
    raise AssertionError("it never came")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--set", "optimizer.with.lr=1e-3,-1"], "must be at least 0"),
        (["--set", "optimizer.with.lr=1e-4..1e-2"], "--random N or --optuna N"),
        (["--random", "3"], "no setting varies"),
        (["--random", "3", "--optuna", "3", "--set", "run.max_steps=1..9"], "exclude each other"),
        (["--set", "optimizer.with.rate=1,2"], "rate"),
        (["--seeds", "x"], "'x' is no list of seeds"),
        (["--output-dir", "."], "is not empty"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_is_begun(
    change: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny.yaml").write_text(PIPELINE)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(build_app(), ["sweep", "tiny.yaml", *change])
    assert isinstance(done.exception, ConfigError)
    assert said in str(done.exception)
    assert os.listdir() == ["tiny.yaml"]


def test_a_first_run_that_is_refused_ends_the_sweep(tmp_path: Path) -> None:
    data = "data: {use: file, with: {path: lost.csv}}"
    old = "data: {use: modular_arithmetic, with: {modulus: 5, batch_size: 8}}"
    (tmp_path / "tiny.yaml").write_text(PIPELINE.replace(old, data))
    done = forge(*SWEEP, "--output-dir", "s", "--workers", "1", cwd=tmp_path)
    assert done.returncode == 2
    assert "tiny.yaml:3:32  data.with.path" in done.stderr
    assert not list(tmp_path.glob("s/*/"))


# -- Optuna -------------------------------------------------------------------------------------


def test_optuna_proposes_where_it_was_good_and_ends_what_is_behind() -> None:
    pytest.importorskip("optuna")
    axes = [parse_axis("x=0.0..1.0"), parse_axis("n=1..4"), parse_axis("kind=a,b")]
    search = OptunaSearch(axes, 40, 0, largest=False)
    seen = []
    for _ in range(41):
        variant = search.next()
        if variant is None:
            break
        values = dict(variant.values)
        loss = (float(values["x"]) - 0.3) ** 2 + (values["kind"] == "b")
        behind = search.is_behind(variant, {2: loss, 4: loss})
        search.learn(variant, None if behind else loss, pruned=behind)
        seen.append((loss, behind))
    assert len(seen) == 40
    late = [loss for loss, _ in seen[-10:]]
    assert sorted(late)[5] < sorted(loss for loss, _ in seen[:10])[5] / 4
    assert any(behind for _, behind in seen)
    assert not any(behind for loss, behind in seen if loss == min(loss for loss, _ in seen))
    known = [{"x": "0.25", "n": "2", "kind": "b"}]
    again = OptunaSearch(axes, 2, 0, largest=False, known=known).next()
    assert again is not None
    assert dict(again.values) == known[0]


def test_a_sweep_by_optuna_runs(swept: Path) -> None:
    pytest.importorskip("optuna")
    done = forge(
        "sweep", "tiny.yaml", "--set", "optimizer.with.lr=log:1e-4..1e-1", "--optuna", "3",
        "--metric", "loss", "--output-dir", "o", cwd=swept,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "loss of the validation, lowest first" in done.stdout
    assert len(list(swept.glob("o/*/result.json"))) == 3
    (folder, *_) = swept.glob("o/000-*")
    assert set(validations(folder, "loss")) == {2, 4, 6}
