"""The MLflow sink, read as MLflow's own client reads it."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
from kernel_parts import StopAfter, make_plugin

from forge_kernel.api import Kind
from forge_kernel.errors import PluginError
from forge_kernel.planning.pipeline_file import load_pipeline
from forge_kernel.runner import resume, run
from forge_plugins.observers.mlflow_store import plain_name

mlflow = pytest.importorskip("mlflow")

SMALL = [
    "run.max_steps=6", "run.validate_every=3", "run.log_every=2", "run.save_every=4",
    "exporters=[]",
]  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: Any) -> str:
    """One store for all tests: making its tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


def pipeline(store: str | None, *more: str, **settings: Any) -> Any:
    chosen = json.dumps({"tracking_uri": store, **settings})
    observers = f"observers=[{{use: mlflow, with: {chosen}}}, {{use: metrics_jsonl}}]"
    return load_pipeline("smoke", [*SMALL, observers, *more])


def found(store: str, experiment: str) -> Any:
    client = mlflow.tracking.MlflowClient(tracking_uri=store)
    about = client.get_experiment_by_name(experiment)
    [one] = client.search_runs([about.experiment_id])
    points = {
        (name, point.step): point.value
        for name in one.data.metrics
        for point in client.get_metric_history(one.info.run_id, name)
    }
    count = sum(len(client.get_metric_history(one.info.run_id, name)) for name in one.data.metrics)
    assert count == len(points), "a point stands there twice"
    return one, points


def expected(folder: Path) -> dict[tuple[str, int], float]:
    kinds = {"log": "training", "validation": "validation"}
    return {
        (f"{kinds[line['kind']]}/{name}", line["step"]): value
        for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        if line["kind"] in kinds
        for name, value in line.items()
        if name not in ("step", "time", "kind", "epoch") and value is not None
    }


def test_the_store_has_every_metric_the_settings_and_what_was_told(
    tmp_path: Path, store: str
) -> None:
    def on_step_end(self: Any, run: Any, step: Any) -> None:
        if step.number == 4:
            run.emit_event("grokked", "It came.", score=1)

    teller = make_plugin("teller", Kind.CALLBACKS, on_step_end=on_step_end)
    before = {name: logging.getLogger(name).level for name in ("mlflow", "alembic")}
    declared = pipeline(store, experiment="all")
    run(declared, output_dir=tmp_path / "run", plugins=[teller], quiet=True)
    one, points = found(store, "all")
    assert points == expected(tmp_path / "run")
    assert {("training/accuracy", 2), ("validation/accuracy", 6)} <= points.keys()
    assert one.info.run_name == "smoke"
    assert one.info.status == "FINISHED"
    assert one.data.params["optimizer.with.lr"] == "0.01"
    assert one.data.params["gradients.0.use"] == '"grokfast"'
    assert one.data.params["run.max_steps"] == "6"
    assert one.data.tags["event.grokked"] == "step 4: It came."
    assert one.data.tags["forge.folder"] == "run"
    assert {name: logging.getLogger(name).level for name in before} == before
    assert not (Path.cwd() / "mlruns").exists()


def test_a_resumed_run_goes_on_with_its_mlflow_run_and_writes_no_point_twice(
    tmp_path: Path, store: str
) -> None:
    """Red when a resumed run opens another one, or sends again what the killed one had sent."""
    stop = StopAfter(5)
    declared = pipeline(store, experiment="resumed", flush_seconds=0)
    run(declared, output_dir=tmp_path / "run", plugins=[stop], cancel=stop, quiet=True)
    one, _ = found(store, "resumed")
    assert one.info.status == "KILLED"
    checkpoints = tmp_path / "run/checkpoints"
    newest = max(checkpoints.glob("step-*"), key=lambda path: int(path.name[5:]))
    assert newest.name == "step-5"
    newest.rename(tmp_path / "gone")  # as if it had been killed: it goes on from step 4
    resume(tmp_path / "run", plugins=[StopAfter(99)], quiet=True)
    one, points = found(store, "resumed")
    assert one.info.status == "FINISHED"
    assert {step for _, step in points} == {2, 3, 4, 6}


def test_a_store_that_has_forgotten_the_run_begins_a_new_one(tmp_path: Path, store: str) -> None:
    stop = StopAfter(5)
    declared = pipeline(store, experiment="lost")
    run(declared, output_dir=tmp_path / "run", plugins=[stop], cancel=stop, quiet=True)
    one, _ = found(store, "lost")
    with sqlite3.connect(store.removeprefix("sqlite:///")) as base:
        for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
            base.execute(f"delete from {table} where run_uuid = ?", (one.info.run_id,))
    resume(tmp_path / "run", plugins=[StopAfter(99)], quiet=True)
    other, points = found(store, "lost")
    assert other.info.run_id != one.info.run_id
    assert {step for _, step in points} == {6}


def test_without_an_address_the_store_lies_in_the_run_folder(tmp_path: Path) -> None:
    run(pipeline(None, "run.max_steps=1"), output_dir=tmp_path / "run", quiet=True)
    file = tmp_path / "run/mlflow.db"
    _, points = found(f"sqlite:///{file}", "forge")
    assert ("training/loss", 1) in points


@pytest.mark.parametrize(("seconds", "calls"), [(0.0, 6), (3600.0, 1)])
def test_lines_are_sent_at_once_or_when_time_has_passed(
    tmp_path: Path, store: str, monkeypatch: Any, seconds: float, calls: int
) -> None:
    sent: list[int] = []
    client = mlflow.tracking.MlflowClient
    original = client.log_batch

    def log_batch(self: Any, run_id: str, metrics: Any = (), **rest: Any) -> Any:
        sent.extend([len(metrics)] if metrics else [])
        return original(self, run_id, metrics=metrics, **rest)

    monkeypatch.setattr(client, "log_batch", log_batch)
    name = f"every {seconds}"
    settings = ["run.save_every=null", "run.max_steps=8", "run.validate_every=4", "callbacks=[]"]
    declared = pipeline(store, *settings, experiment=name, flush_seconds=seconds)
    run(declared, output_dir=tmp_path / "run", quiet=True)
    assert len(sent) == calls
    assert found(store, name)[1] == expected(tmp_path / "run")


def test_a_run_that_fails_is_marked_so(tmp_path: Path, store: str) -> None:
    def on_step_end(self: Any, run: Any, step: Any) -> None:
        if step.number == 5:
            raise ArithmeticError("on purpose")

    breaker = make_plugin("breaker", Kind.CALLBACKS, on_step_end=on_step_end)
    with pytest.raises(ArithmeticError):
        run(pipeline(store, experiment="failed"), output_dir=tmp_path / "run", plugins=[breaker])
    one, points = found(store, "failed")
    assert one.info.status == "FAILED"
    assert ("training/loss", 4) in points


def test_a_store_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    place = f"sqlite:///{tmp_path / 'file' / 'mlflow.db'}"
    with pytest.raises(PluginError, match="mlflow cannot use the store sqlite"):
        run(pipeline(place), output_dir=tmp_path / "run", quiet=True)


def test_mlflow_reports_nothing_to_its_makers_on_our_account(tmp_path: Path, store: str) -> None:
    """Red when it is imported plainly."""
    code = (
        "import os, socket, time\n"
        "asked = []\n"
        "def lookup(*where, **rest): asked.append(where); raise OSError('no network')\n"
        "socket.getaddrinfo = lookup\n"
        "from forge_kernel import load_pipeline, run\n"
        f"observers = 'observers=[{{use: mlflow, with: {{tracking_uri: \"{store}\"}}}}]'\n"
        "declared = load_pipeline('smoke', ['run.max_steps=1', 'exporters=[]', observers])\n"
        "run(declared, output_dir='run', quiet=True)\n"
        "time.sleep(1)\n"  # it asks in a thread
        "assert not asked, asked\n"
        "assert 'MLFLOW_DISABLE_TELEMETRY' not in os.environ\n"
    )
    quiet = {"MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "CI", "PYTEST_CURRENT_TEST"}
    environment = {name: value for name, value in os.environ.items() if name not in quiet}
    done = forked.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("name", "plain"),
    [("level_-1", "level_-1"), ("a[0]<b>", "a_0__b_"), ("x" * 300, "x" * 250)],
)
def test_names_are_such_as_mlflow_takes(name: str, plain: str) -> None:
    assert plain_name(name) == plain
