"""Sinks: what other programs read of a run, read as they do."""

from __future__ import annotations

import csv
import json
import socket
import sys
import urllib.request
from pathlib import Path
from typing import Any

import forked
import pytest
from kernel_parts import make_plugin

from forge_kernel.api import Kind
from forge_kernel.errors import PluginError
from forge_kernel.planning.pipeline_file import load_pipeline
from forge_kernel.runner import resume, run

SMALL = ["run.max_steps=6", "run.validate_every=3", "run.log_every=2", "run.save_every=4"]


def trained(
    folder: Path, observer: str, *plugins: Any, settings: Any = None, **options: Any
) -> Any:
    chosen = json.dumps(settings or {})
    observers = f"observers=[{{use: {observer}, with: {chosen}}}, {{use: metrics_jsonl}}]"
    pipeline = load_pipeline("smoke", [*SMALL, observers])
    return run(pipeline, output_dir=folder, plugins=plugins, quiet=True, **options)


def lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def expected(folder: Path) -> dict[tuple[int, str, str], float]:
    """All metrics that were measured, by step, kind and name."""
    return {
        (line["step"], line["kind"], name): value
        for line in lines(folder)
        if line["kind"] != "event"
        for name, value in line.items()
        if name not in ("step", "time", "kind", "epoch") and value is not None
    }


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_csv_file_has_every_metric(tmp_path: Path) -> None:
    trained(tmp_path / "run", "csv")
    found = {
        (int(row["step"]), row["kind"], row["metric"]): float(row["value"])
        for row in rows(tmp_path / "run")
        if row["value"]
    }
    assert found == expected(tmp_path / "run")
    assert {"loss", "accuracy"} <= {name for _, _, name in found}


def test_a_resumed_run_continues_its_csv_file_without_a_row_twice(tmp_path: Path) -> None:
    class Stop:
        reached = False

        def is_set(self) -> bool:
            return self.reached

    stop = Stop()

    def on_step_end(self: Any, run: Any, step: Any) -> None:
        stop.reached = step.number == 5

    def stopper() -> Any:
        return make_plugin("stopper", Kind.OBSERVERS, on_step_end=on_step_end)

    trained(tmp_path / "run", "csv", stopper(), cancel=stop)
    with (tmp_path / "run/metrics.csv").open("a") as stream:
        stream.write("torn")
    resume(tmp_path / "run", plugins=[stopper()], quiet=True)
    places = [(row["step"], row["kind"], row["metric"]) for row in rows(tmp_path / "run")]
    assert len(set(places)) == len(places)
    assert {step for step, _, _ in places} == {"2", "3", "4", "6"}


@pytest.mark.parametrize("name", ["metrics.csv", "metrics.jsonl"])
def test_a_rollback_keeps_the_lines_that_led_to_it(tmp_path: Path, name: str) -> None:
    class Spoil:
        done = False

    def regularize(self: Any, run: Any, step: Any) -> Any:
        if step.number < 6 or Spoil.done:
            return None
        Spoil.done = True
        return next(iter(run.model.parameters())).sum() * float("nan")

    spoiler = make_plugin("spoiler", Kind.REGULARIZERS, regularize=regularize)
    folder = tmp_path / "run"
    choice = [
        "run.log_every=1",
        "run.non_finite=rollback",
        "observers=[{use: csv}, {use: metrics_jsonl}]",
    ]
    pipeline = load_pipeline("smoke", [*SMALL, *choice])
    done = run(pipeline, output_dir=folder, plugins=[spoiler], quiet=True)
    assert (done.steps, Spoil.done) == (6, True)
    before = (folder / name).read_text()
    resume(folder, settings=["run.max_steps=8"], plugins=[spoiler], quiet=True)
    after = (folder / name).read_text()
    assert after.startswith(before)
    assert len(after) > len(before)


def teller() -> Any:
    def on_step_end(self: Any, run: Any, step: Any) -> None:
        if step.number == 4:
            run.emit_event("grokked", "It came.", score=1)

    return make_plugin("teller", Kind.CALLBACKS, on_step_end=on_step_end)


def test_tensorboard_reads_the_metrics_and_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained(tmp_path / "run", "tensorboard", teller(), settings={"flush_seconds": 3})
    reader = EventAccumulator(str(tmp_path / "run/tensorboard"))
    reader.Reload()
    found = {
        (event.step, tag): event.value
        for tag in reader.Tags()["scalars"]
        for event in reader.Scalars(tag)
    }
    kinds = {"log": "training", "validation": "validation"}
    wanted = {
        (step, f"{kinds[kind]}/{name}"): pytest.approx(value, rel=1e-6, abs=1e-30)
        for (step, kind, name), value in expected(tmp_path / "run").items()
    }
    assert found == wanted
    assert "event/grokked/text_summary" in reader.Tags()["tensors"]


def test_tensorboard_hears_how_soon_to_write(tmp_path: Path, monkeypatch: Any) -> None:
    writer = pytest.importorskip("torch.utils.tensorboard.writer")
    seen: list[Any] = []
    original = writer.FileWriter.__init__

    def noted(self: Any, *arguments: Any, **options: Any) -> None:
        seen.append(arguments[2] if len(arguments) > 2 else options.get("flush_secs"))
        original(self, *arguments, **options)

    monkeypatch.setattr(writer.FileWriter, "__init__", noted)
    trained(tmp_path / "run", "tensorboard", settings={"flush_seconds": 7})
    assert seen == [7]


def asked(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        return answer.read().decode()  # type: ignore[no-any-return]


def test_prometheus_is_answered_while_the_run_goes_on_and_not_after(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    ports: list[int] = []
    pages: list[str] = []

    def on_event(self: Any, run: Any, event: Any) -> None:
        ports.extend([event.facts["port"]] if event.name == "prometheus" else [])

    def on_batch(self: Any, run: Any, step: Any, batch: Any) -> None:
        if step.number == 6:
            pages.append(asked(ports[0]))

    reader = make_plugin("reader", Kind.OBSERVERS, on_event=on_event, on_batch=on_batch)
    trained(tmp_path / "run", "prometheus", teller(), reader)
    [page] = pages
    values = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    metrics = expected(tmp_path / "run")
    loss = float(values['forge_metric{kind="validation",metric="loss",run="smoke"}'])
    assert loss == pytest.approx(metrics[3, "validation", "loss"])
    assert float(values['forge_step{run="smoke"}']) == 4
    assert float(values['forge_events_total{event="grokked",run="smoke"}']) == 1
    with pytest.raises(OSError):
        asked(ports[0])


def test_prometheus_listens_where_it_is_told_and_refuses_a_taken_port(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = {"port": taken.getsockname()[1], "host": "127.0.0.1"}
        with pytest.raises(PluginError, match="cannot listen on 127.0.0.1 port"):
            trained(tmp_path / "run", "prometheus", settings=settings)
    with pytest.raises(PluginError, match=r"cannot listen on 192\.0\.2\.1 port 0"):
        trained(tmp_path / "far", "prometheus", settings={"host": "192.0.2.1"})


@pytest.mark.parametrize(
    ("observer", "package"),
    [
        ("tensorboard", "tensorboard"), ("prometheus", "prometheus_client"), ("mlflow", "mlflow"),
        ("mlflow", "sqlalchemy"),
    ],
)  # fmt: skip
def test_a_sink_without_its_package_is_refused_when_the_run_is_planned(
    tmp_path: Path, observer: str, package: str
) -> None:
    (tmp_path / "x.yaml").write_text(
        f"extends: {Path.cwd()}/pipelines/smoke.yaml\nobservers: [{{use: {observer}}}]\n"
    )
    code = (
        f"import sys; sys.modules[{package!r}] = None; sys.argv = ['forge', 'plan', 'x.yaml']\n"
        "from forge_kernel.cli import main; main()"
    )
    done = forked.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "x.yaml:2:13  observers[0]\n" in done.stderr
    assert f"observers.{observer} needs the package {package}, which is not" in done.stderr
    assert "pip install 'forge-kernel[sinks]'" in done.stderr
