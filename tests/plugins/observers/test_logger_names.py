"""A name that a sink does not take is mapped and told once; a store that is away ends no run."""

from __future__ import annotations

import csv
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_parts import StopAfter, make_plugin
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from forge_kernel import run
from forge_kernel.api import LazyModule, PluginError
from forge_kernel.config.pipeline import PipelineConfig
from forge_kernel.config.use import UseLoss, UseObserver, UseOptimizer
from forge_kernel.contract.plugin import Kind
from forge_kernel.contract.run_config import RunConfig
from forge_kernel.runner import resume
from forge_plugins.observers import mlflow_store
from forge_plugins.observers.logger_names import LoggerNames, one_line
from forge_plugins.observers.mlflow_store import no_answer, plain_name, shown_place

mlflow: Any = LazyModule("mlflow")  # five seconds that no other file's tests need

ODD = ("top//1", "two\nlines", "a:b|c", "[/x] 100 %", "ü\u2028x", "/from/root", "..", "half\ud800")


class Count:
    """A metric of metrics with odd names."""

    def __init__(self) -> None:
        self.goals = dict.fromkeys(ODD, "max")

    def reset(self) -> None:
        self.seen = 0

    def update(self, *_: Any) -> None:
        self.seen += 1

    def compute(self, _: Any) -> dict[str, float]:
        return {name: float(place) for place, name in enumerate(ODD)}


def metrics() -> Any:
    def make_metrics(self: Any, run: Any) -> list[Any]:
        return [Count()]

    def log_metrics(self: Any, run: Any, step: Any) -> dict[str, float]:
        return {name: float(place) for place, name in enumerate(ODD)}

    return make_plugin("odd", Kind.VALIDATORS, make_metrics=make_metrics, log_metrics=log_metrics)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def batches() -> Any:
    generator = torch.Generator().manual_seed(1)
    pairs = [
        (torch.randn(5, 4, generator=generator), torch.randint(3, (5,), generator=generator))
        for _ in range(4)
    ]
    return pairs, pairs


def pipeline(*observers: UseObserver, steps: int = 6, **settings: Any) -> PipelineConfig:
    return PipelineConfig(
        run=RunConfig(max_steps=steps, device="cpu", seed=0, log_every=1, **settings),
        optimizer=UseOptimizer("sgd", {"lr": 0.1}),
        loss=UseLoss("cross_entropy"),
        observers=observers,
    )


def told(folder: Path) -> list[str]:
    events = json.loads((folder / "status.json").read_text())["events"]
    return [event["message"] for event in events if event["event"] == "renamed"]


@pytest.mark.parametrize(
    "sink", ["mlflow", "tensorboard", "csv", "metrics_jsonl", "prometheus", "progress_bar"]
)
def test_a_run_with_odd_names_ends_as_any_other(sink: str, tmp_path: Path) -> None:
    """Planted fault: names as they come."""
    found = run(
        pipeline(UseObserver(sink, {})), model=network(), data=batches(), plugins=[metrics()],
        output_dir=tmp_path / "run",
    )  # fmt: skip
    assert found.outcome == "completed"


def test_csv_stays_one_row_a_line_so_that_a_resume_cuts_it_rightly(tmp_path: Path) -> None:
    stop = StopAfter(3)
    settings = pipeline(UseObserver("csv", {}))
    live: dict[str, Any] = {"model": network(), "data": batches(), "quiet": True}
    run(settings, plugins=[metrics(), stop], cancel=stop, output_dir=tmp_path / "run", **live)
    resume(tmp_path / "run", plugins=[metrics(), StopAfter(99)], **live)
    file = tmp_path / "run" / "metrics.csv"
    with file.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) + 1 == len(file.read_text(encoding="utf-8").splitlines())
    steps = [
        int(row["step"]) for row in rows if row["metric"] == "two_lines" and row["kind"] == "log"
    ]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_mlflow_has_every_metric_and_each_change_is_told_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(
        pipeline(UseObserver("mlflow", {})), model=network(), data=batches(),
        plugins=[metrics()], output_dir=folder, quiet=True,
    )  # fmt: skip
    client = mlflow.tracking.MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    [one] = client.search_runs([client.get_experiment_by_name("forge").experiment_id])
    values = {name: value for name, value in one.data.metrics.items() if "training" in name}
    assert {float(place) for place in range(len(ODD))} <= set(values.values())
    assert values["training/top/1"] == 0.0
    messages = told(folder)
    assert len(messages) == len(set(messages))
    assert sum("'training/top//1'" in message for message in messages) == 1


def test_tensorboard_has_every_metric(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(
        pipeline(UseObserver("tensorboard", {})), model=network(), data=batches(),
        plugins=[metrics()], output_dir=folder, quiet=True,
    )  # fmt: skip
    seen = EventAccumulator(str(folder / "tensorboard"))
    seen.Reload()
    assert "training/two_lines" in seen.Tags()["scalars"]
    assert "training/half_" in seen.Tags()["scalars"]


class _Run:
    def __init__(self) -> None:
        self.told: list[str] = []

    def emit_event(self, name: str, message: str, **facts: Any) -> None:
        self.told.append(message)


def test_two_names_never_become_one() -> None:
    names, listener = LoggerNames("sink"), _Run()
    found = [names.of(listener, name) for name in ("a\nb", "a_b", "a\tb", "a\nb", "plain")]  # type: ignore[arg-type]
    assert found[0] == found[3]
    assert len(set(found)) == 4
    assert found[-1] == "plain"
    assert len(listener.told) == 3


@pytest.mark.parametrize("name", [*ODD, "", "a/./b", "a/../b", "x" * 400, "a\\b", "%", "end/"])
def test_every_name_becomes_one_that_mlflow_takes(name: str) -> None:
    from mlflow.utils.validation import _validate_metric_name

    _validate_metric_name(plain_name(name))
    assert one_line(name).isprintable()


class _Server:
    """Takes connections; answers nothing, or with an error."""

    def __init__(self, *, answers: bool) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.place = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._open: list[socket.socket] = []
        self._answers = answers
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                taken, _ = self._socket.accept()
            except OSError:
                return
            self._open.append(taken)
            if self._answers:
                taken.recv(4096)
                taken.sendall(b"HTTP/1.1 401 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                taken.close()

    def close(self) -> None:
        self._socket.close()
        for taken in self._open:
            taken.close()


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    monkeypatch.setattr(mlflow_store, "_ANSWER_SECONDS", 0.3)
    server = _Server(answers=False)
    yield server
    server.close()


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.parametrize("scheme", ["http", "postgresql", "mysql+pymysql"])
def test_a_store_where_nothing_listens_is_refused_at_the_start(scheme: str, tmp_path: Path) -> None:
    """Planted fault: MLflow's own retries, which take minutes."""
    place = f"{scheme}://user:secret@127.0.0.1:{closed_port()}/x"
    with pytest.raises(PluginError, match="nothing answers there") as caught:
        run(
            pipeline(UseObserver("mlflow", {"tracking_uri": place})), model=network(),
            data=batches(), output_dir=tmp_path / "run", quiet=True,
        )  # fmt: skip
    assert "secret" not in str(caught.value)
    assert "user:***@" in str(caught.value)


def test_a_server_that_takes_the_call_and_says_nothing_is_refused(silent: _Server) -> None:
    assert "nothing answers there" in str(no_answer(silent.place))


def test_an_error_is_an_answer_and_files_are_not_asked() -> None:
    server = _Server(answers=True)
    assert no_answer(server.place) is None
    server.close()
    for place in ("sqlite:////x/y.db", "file:///x", "runs/mlflow", "databricks", "uc://host:1"):
        assert no_answer(place) is None
    assert shown_place("http://127.0.0.1:5000") == "http://127.0.0.1:5000"


def test_a_store_that_stops_answering_is_told_once_and_gets_everything_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted faults: the error ends the run; what was refused is dropped."""
    monkeypatch.setattr(mlflow_store, "_AGAIN_SECONDS", 1e-9)
    real, refused = mlflow.tracking.MlflowClient.log_batch, [0]

    def log_batch(self: Any, *arguments: Any, **options: Any) -> Any:
        if options.get("metrics") and refused[0] < 3:
            refused[0] += 1
            raise mlflow.exceptions.MlflowException("it is away")
        return real(self, *arguments, **options)

    monkeypatch.setattr(mlflow.tracking.MlflowClient, "log_batch", log_batch)
    folder = tmp_path / "run"
    found = run(
        pipeline(UseObserver("mlflow", {"flush_seconds": 0})), model=network(), data=batches(),
        output_dir=folder, quiet=True,
    )  # fmt: skip
    assert found.outcome == "completed"
    assert refused[0] == 3
    events = json.loads((folder / "status.json").read_text())["events"]
    assert sum(event["event"] == "mlflow_fails" for event in events) == 1
    monkeypatch.undo()
    client = mlflow.tracking.MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    [one] = client.search_runs([client.get_experiment_by_name("forge").experiment_id])
    history = client.get_metric_history(one.info.run_id, "training/loss")
    assert [point.step for point in history] == [1, 2, 3, 4, 5, 6]
    assert one.info.status == "FINISHED"


def test_a_store_that_never_comes_back_ends_no_run_and_the_loss_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def log_batch(self: Any, *_: Any, metrics: Any = None, **__: Any) -> None:
        if metrics:
            raise mlflow.exceptions.MlflowException("it is away")

    monkeypatch.setattr(mlflow.tracking.MlflowClient, "log_batch", log_batch)
    found = run(
        pipeline(UseObserver("mlflow", {"flush_seconds": 0})), model=network(), data=batches(),
        output_dir=tmp_path / "run", quiet=True,
    )  # fmt: skip
    assert found.outcome == "completed"
    assert "metrics never reached the store" in caplog.text
