"""Metrics, settings and events in an MLflow store."""

from __future__ import annotations

import http.client
import json
import logging
import math
import os
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

import yaml
from msgspec import Meta

from forge_kernel.api import (
    Event,
    Kind,
    LogRecord,
    PluginError,
    PluginInfo,
    Run,
    RunResult,
    hookimpl,
)
from forge_plugins.observers.logger_names import LoggerNames, encodable

RECORD: Final = "mlflow.json"
"""File of the run folder that says which MLflow run it is."""

INSTALL: Final = "pip install 'forge-kernel[sinks]'"
_ANSWER_SECONDS: Final = 5
"""How long a server may take to answer."""
_AGAIN_SECONDS: Final = 60.0
"""After a failure, until the store is asked again; twice as long each time."""
_MOST_KEPT: Final = 200_000
"""Metrics that wait for a store that does not answer; older ones are given up."""
_PORTS: Final = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
_AT_IMPORT: Final = {"MLFLOW_DISABLE_TELEMETRY": "true"}
_IN_A_CALL: Final = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(_ANSWER_SECONDS),
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
}
"""Of MLflow's environment, where the user has not set it: its own bounds are minutes."""
_LOG: Final = logging.getLogger("forge_plugins.mlflow")
_FOREIGN: Final = re.compile(r"[^\w./: -]")  # what MLflow does not take in a name
_LONGEST_NAME: Final = 250
_LONGEST_VALUE: Final = 5000
_MOST: Final = {"metrics": 1000, "params": 100}  # in one batch, by MLflow's own bounds
_MOST_NODES: Final = 2000
_STATUS: Final = {"completed": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


@dataclass(frozen=True, kw_only=True)
class MlflowConfig:
    """Where the store is, and under what the run stands in it."""

    tracking_uri: Annotated[
        Annotated[str, Meta(min_length=1)] | None,
        Meta(
            description="an MLflow store, such as sqlite:///runs/mlflow.db for many runs or "
            "http://127.0.0.1:5000; null: mlflow.db in the run folder",
            extra_json_schema={"format": "path"},
        ),
    ] = None
    experiment: Annotated[str, Meta(min_length=1, description="that the run belongs to")] = "forge"
    flush_seconds: Annotated[
        float, Meta(ge=0, description="seconds between sends of what has gathered")
    ] = 5.0


class Mlflow:
    """Metrics, settings and events in an MLflow store.

    One MLflow run: settings as parameters, metrics as metrics, what plugins told as tags.

    Metrics are called `training/<metric>` and `validation/<metric>`; a metric that was not measured
    has no point. A resumed run goes on with its MLflow run: what it measures again is written only
    where it differs, since MLflow cannot forget. MLflow's own reports to its makers are left off
    where this plugin is the one that imports it. A server that does not answer at the start is
    refused within seconds; one that stops answering later is told of once, and gets what has
    gathered when it answers again.
    """

    info = PluginInfo(
        name="mlflow",
        kind=Kind.OBSERVERS,
        config=MlflowConfig,
        packages={"mlflow": INSTALL, "sqlalchemy": INSTALL},
    )

    def __init__(self, config: MlflowConfig) -> None:
        self.config = config
        self._client: Any = None
        self._run_id = ""
        self._names = LoggerNames("MLflow", plain_name)
        self._metrics: list[Any] = []
        self._tags: dict[str, str] = {}
        self._pause = 0.0  # seconds until a store that failed is asked again; 0: it answers
        self._known: dict[tuple[str, int], float] = {}  # from before a resume
        self._sent = 0.0

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Begin the MLflow run, or go on with it.

        Raises:
            PluginError: the store cannot be used.
        """
        if run.folder is None and self.config.tracking_uri is None:
            return
        with _environment(_AT_IMPORT):
            from mlflow.exceptions import MlflowException
            from mlflow.tracking import MlflowClient

        place = self.config.tracking_uri
        if place is None:
            assert run.folder is not None
            place = f"sqlite:///{(run.folder / 'mlflow.db').resolve()}"
        fault = no_answer(place)
        if fault is not None:
            raise PluginError(
                f"mlflow cannot use the store {shown_place(place)}: {fault}; start the server, "
                "mend observers.with.tracking_uri, or leave it out (mlflow.db in the run folder)"
            )
        try:
            with _silent(), _environment(_IN_A_CALL):
                self._client = MlflowClient(tracking_uri=place)
                self._open(run)
        except (MlflowException, OSError) as error:
            self._client = None
            raise PluginError(
                f"mlflow cannot use the store {shown_place(place)}: {error}"
            ) from error
        self._sent = time.monotonic()

    def _open(self, run: Run) -> None:
        if self._goes_on(run):
            return
        result = self._client.get_experiment_by_name(self.config.experiment)
        if result is None:
            files = None if run.folder is None else (run.folder / "mlflow").resolve().as_uri()
            experiment = self._client.create_experiment(self.config.experiment, files)
        else:
            experiment = result.experiment_id
        tags = {"forge.folder": "" if run.folder is None else run.folder.name}
        made = self._client.create_run(experiment, tags=tags, run_name=run.settings.name)
        self._run_id = made.info.run_id
        if run.folder is not None:
            about = {"run_id": self._run_id, "experiment_id": experiment}
            text = json.dumps(about, indent=1) + "\n"
            (run.folder / RECORD).write_text(text, encoding="utf-8")
        self._send_settings(run)

    def _goes_on(self, run: Run) -> bool:
        """Take up the MLflow run that the run folder tells of, if the store still has it."""
        from mlflow.exceptions import MlflowException

        if run.folder is None or not (run.folder / RECORD).is_file():
            return False
        self._run_id = json.loads((run.folder / RECORD).read_text(encoding="utf-8"))["run_id"]
        try:
            known = self._client.get_run(self._run_id)
        except MlflowException:
            return False
        self._client.update_run(self._run_id, status="RUNNING")
        for name in known.data.metrics:
            for point in self._client.get_metric_history(self._run_id, name):
                if point.step > run.progress.step:
                    self._known[name, point.step] = point.value
        return True

    def _send_settings(self, run: Run) -> None:
        """The filled configuration, as the run folder has it; of the loop alone without one."""
        from mlflow.entities import Param

        result = settings_of(run)
        params = [Param(name, value) for name, value in result.items()]
        for begin in range(0, len(params), _MOST["params"]):
            chosen = params[begin : begin + _MOST["params"]]
            self._client.log_batch(self._run_id, params=chosen, synchronous=True)

    def _take(
        self, run: Run, kind: str, step: int, when: float, metrics: Mapping[str, float | None]
    ) -> None:
        if self._client is None:
            return
        from mlflow.entities import Metric

        for metric, value in metrics.items():
            name = self._names.of(run, f"{kind}/{metric}")
            if value is None or not math.isfinite(value):
                continue
            if self._known.get((name, step)) != value:
                self._metrics.append(Metric(name, float(value), round(1000 * when), step))
        if time.monotonic() - self._sent >= max(self.config.flush_seconds, self._pause):
            self._send(run)

    def _send(self, run: Run) -> None:
        """Send what has gathered; what a store does not take now is kept for later."""
        from mlflow.exceptions import MlflowException

        try:
            with _environment(_IN_A_CALL):
                self._send_gathered()
        except (MlflowException, OSError) as error:
            del self._metrics[:-_MOST_KEPT]
            if not self._pause:
                run.emit_event(
                    "mlflow_fails",
                    f"MLflow's store takes nothing now ({_first_line(error)}): the run goes on, "
                    "and what gathers is sent when it answers again.",
                )
            self._pause = max(_AGAIN_SECONDS, 2.0 * self._pause)
        else:
            self._pause = 0.0
        self._sent = time.monotonic()

    def _send_gathered(self) -> None:
        from mlflow.entities import RunTag

        while self._metrics:
            chosen = self._metrics[: _MOST["metrics"]]
            self._client.log_batch(self._run_id, metrics=chosen, synchronous=True)
            del self._metrics[: len(chosen)]
        while self._tags:
            names = list(self._tags)[: _MOST["params"]]
            tags = [RunTag(name, self._tags[name]) for name in names]
            self._client.log_batch(self._run_id, tags=tags, synchronous=True)
            for name in names:
                del self._tags[name]

    @hookimpl
    def on_log(self, run: Run, record: LogRecord) -> None:
        """The metrics of training."""
        self._take(run, "training", record.step, record.time, record.metrics)

    @hookimpl
    def on_validation(self, run: Run, metrics: Mapping[str, float]) -> None:
        """The metrics of a validation."""
        self._take(run, "validation", run.progress.step, time.time(), metrics)

    @hookimpl
    def on_event(self, run: Run, event: Event) -> None:
        """What a plugin told: the latest of each name, as a tag."""
        if self._client is not None:
            message = encodable(f"step {event.step}: {event.message}")[:_LONGEST_VALUE]
            self._tags[self._names.of(run, f"event.{event.name}")] = message

    @hookimpl
    def on_checkpoint(self, run: Run, folder: Path) -> None:
        """A run that goes on from here finds all that was measured before."""
        del folder
        if self._client is not None and not self._pause:
            self._send(run)

    def _end(self, run: Run, outcome: str) -> None:
        if self._client is None:
            return
        self._send(run)
        lost = len(self._metrics)
        if lost:
            _LOG.warning("mlflow: %d metrics never reached the store, which did not answer", lost)
        else:
            self._end_there(outcome)
        self._client = None

    def _end_there(self, outcome: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            with _environment(_IN_A_CALL):
                self._client.set_terminated(self._run_id, _STATUS[outcome])
        except (MlflowException, OSError) as error:
            _LOG.warning("mlflow: the store was not told of the run's end: %s", _first_line(error))

    @hookimpl
    def on_run_end(self, run: Run, result: RunResult) -> None:
        """Send the rest, and how the run ended."""
        self._end(run, result.outcome)

    @hookimpl
    def on_error(self, run: Run, error: BaseException) -> None:
        """Send the rest, and that the run failed."""
        del error
        self._end(run, "failed")


def plain_name(text: str) -> str:
    """A name that MLflow takes: letters, digits, `_ - . / :` and spaces, as a path without gaps."""
    parts = [part for part in _FOREIGN.sub("_", text)[:_LONGEST_NAME].split("/") if part]
    return "/".join("_" * len(part) if part in (".", "..") else part for part in parts) or "_"


def no_answer(place: str) -> str | None:
    """Why a server is of no use, after some seconds at most; None: it answers, or is a file."""
    try:
        parts = urlsplit(place)
        scheme = parts.scheme.partition("+")[0]
        port = parts.port or _PORTS.get(scheme)
    except ValueError as error:
        return str(error)
    if not parts.hostname or port is None or scheme not in _PORTS:
        return None
    try:
        if scheme not in ("http", "https"):
            socket.create_connection((parts.hostname, port), _ANSWER_SECONDS).close()
            return None
        request = urllib.request.Request(place)  # noqa: S310  its scheme was looked at
        with suppress(urllib.error.HTTPError):  # which is an answer
            urllib.request.urlopen(request, timeout=_ANSWER_SECONDS).close()  # noqa: S310
    except (OSError, http.client.HTTPException) as error:
        return f"nothing answers there within {_ANSWER_SECONDS} seconds ({error})"
    return None


def shown_place(place: str) -> str:
    """A store's address without the password that it may hold."""
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", place)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def settings_of(run: Run) -> dict[str, str]:
    """The configuration as `optimizer.with.lr` -> value as JSON, at most some thousands of them."""
    data: Any = {"run": {"name": run.settings.name, "seed": run.seed}}
    if run.folder is not None:
        data = yaml.safe_load((run.folder / "config.yaml").read_text(encoding="utf-8"))
    open_: list[tuple[str, Any]] = [("", data)]
    result: dict[str, str] = {}
    for _ in range(_MOST_NODES):
        if not open_:
            break
        path, value = open_.pop()
        parts: list[tuple[Any, Any]] = []
        if isinstance(value, dict):
            parts = list(value.items())
        elif isinstance(value, list) and any(isinstance(inner, dict | list) for inner in value):
            parts = list(enumerate(value))
        if parts:
            start = f"{path}." if path else ""
            open_ += [(f"{start}{key}", inner) for key, inner in reversed(parts)]
        else:
            text = json.dumps(value, ensure_ascii=False, default=str)
            result[plain_name(path)] = text[:_LONGEST_VALUE]
    return result


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables that MLflow reads, where the user has not set them."""
    missing = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


@contextmanager
def _silent() -> Iterator[None]:
    """Without MLflow's lines about the tables that it makes."""
    loggers = [logging.getLogger(name) for name in ("mlflow", "mlflow.store.db.utils", "alembic")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
