"""Figures, settings and events in an MLflow store."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

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

RECORD: Final = "mlflow.json"
"""File of the run folder that says which MLflow run it is."""

INSTALL: Final = "pip install 'forge-kernel[sinks]'"
_QUIET: Final = "MLFLOW_DISABLE_TELEMETRY"
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
        float, Meta(ge=0, description="seconds after which a log line sends what has gathered")
    ] = 5.0


class Mlflow:
    """Figures, settings and events in an MLflow store.

    One MLflow run: settings as parameters, figures as metrics, what plugins told as tags.

    Metrics are called `training/<figure>` and `validation/<figure>`; a figure that was not measured
    has no point. A resumed run goes on with its MLflow run: what it measures again is written only
    where it differs, since MLflow cannot forget. MLflow's own reports to its makers are left off
    where this plugin is the one that imports it.
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
        self._metrics: list[Any] = []
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
        with _imported_quietly():
            from mlflow.exceptions import MlflowException
            from mlflow.tracking import MlflowClient

        place = self.config.tracking_uri
        if place is None:
            assert run.folder is not None
            place = f"sqlite:///{(run.folder / 'mlflow.db').resolve()}"
        try:
            with _silent():
                self._client = MlflowClient(tracking_uri=place)
                self._open(run)
        except (MlflowException, OSError) as error:
            self._client = None
            raise PluginError(f"mlflow cannot use the store {place}: {error}") from error
        self._sent = time.monotonic()

    def _open(self, run: Run) -> None:
        if self._goes_on(run):
            return
        found = self._client.get_experiment_by_name(self.config.experiment)
        if found is None:
            files = None if run.folder is None else (run.folder / "mlflow").resolve().as_uri()
            experiment = self._client.create_experiment(self.config.experiment, files)
        else:
            experiment = found.experiment_id
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

        found = settings_of(run)
        params = [Param(name, value) for name, value in found.items()]
        for begin in range(0, len(params), _MOST["params"]):
            chosen = params[begin : begin + _MOST["params"]]
            self._client.log_batch(self._run_id, params=chosen, synchronous=True)

    def _take(self, kind: str, step: int, when: float, figures: Mapping[str, float | None]) -> None:
        if self._client is None:
            return
        from mlflow.entities import Metric

        for figure, value in figures.items():
            name = plain_name(f"{kind}/{figure}")
            if value is None or not math.isfinite(value):
                continue
            if self._known.get((name, step)) != value:
                self._metrics.append(Metric(name, float(value), round(1000 * when), step))
        if time.monotonic() - self._sent >= self.config.flush_seconds:
            self._send()

    def _send(self) -> None:
        gathered, self._metrics = self._metrics, []
        for begin in range(0, len(gathered), _MOST["metrics"]):
            chosen = gathered[begin : begin + _MOST["metrics"]]
            self._client.log_batch(self._run_id, metrics=chosen, synchronous=True)
        self._sent = time.monotonic()

    @hookimpl
    def on_log(self, run: Run, record: LogRecord) -> None:
        """The figures of training."""
        del run
        self._take("training", record.step, record.time, record.figures)

    @hookimpl
    def on_validation(self, run: Run, figures: Mapping[str, float]) -> None:
        """The figures of a validation."""
        self._take("validation", run.progress.step, time.time(), figures)

    @hookimpl
    def on_event(self, run: Run, event: Event) -> None:
        """What a plugin told: the latest of each name, as a tag."""
        del run
        if self._client is not None:
            told = f"step {event.step}: {event.message}"[:_LONGEST_VALUE]
            self._client.set_tag(self._run_id, plain_name(f"event.{event.name}"), told)

    @hookimpl
    def on_checkpoint(self, run: Run, folder: Path) -> None:
        """A run that goes on from here finds all that was measured before."""
        del run, folder
        if self._client is not None:
            self._send()

    def _end(self, outcome: str) -> None:
        if self._client is not None:
            self._send()
            self._client.set_terminated(self._run_id, _STATUS[outcome])
            self._client = None

    @hookimpl
    def on_run_end(self, run: Run, result: RunResult) -> None:
        """Send the rest, and how the run ended."""
        del run
        self._end(result.outcome)

    @hookimpl
    def on_error(self, run: Run, error: BaseException) -> None:
        """Send the rest, and that the run failed."""
        del run, error
        self._end("failed")


def plain_name(text: str) -> str:
    """A name that MLflow takes: letters, digits, `_ - . / :` and spaces."""
    return _FOREIGN.sub("_", text)[:_LONGEST_NAME]


def settings_of(run: Run) -> dict[str, str]:
    """The configuration as `optimizer.with.lr` -> value as JSON, at most some thousands of them."""
    data: Any = {"run": {"name": run.settings.name, "seed": run.seed}}
    if run.folder is not None:
        data = yaml.safe_load((run.folder / "config.yaml").read_text(encoding="utf-8"))
    open_: list[tuple[str, Any]] = [("", data)]
    found: dict[str, str] = {}
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
            found[plain_name(path)] = text[:_LONGEST_VALUE]
    return found


@contextmanager
def _imported_quietly() -> Iterator[None]:
    """MLflow decides at its import whether it reports to its makers: not on our account."""
    before = os.environ.get(_QUIET)
    os.environ.setdefault(_QUIET, "true")
    try:
        yield
    finally:
        if before is None:
            del os.environ[_QUIET]


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
