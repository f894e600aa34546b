"""Metrics for Prometheus, which asks for them over HTTP."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final

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
from forge_plugins.observers.logger_names import LoggerNames

INSTALL: Final = "pip install 'forge-kernel[sinks]'"


@dataclass(frozen=True, kw_only=True)
class PrometheusConfig:
    """Where the metrics are offered."""

    port: Annotated[
        int,
        Meta(ge=0, le=65535, description="of the HTTP server; 0: a free port, which is printed"),
    ] = 0
    host: Annotated[
        str,
        Meta(
            min_length=1,
            description="address that the server listens on; other than loopback, everyone who "
            "reaches it can read the metrics",
            pattern=r"^[0-9A-Za-z.:-]+$",
        ),
    ] = "127.0.0.1"


class Prometheus:
    """Metrics for Prometheus, which asks for them over HTTP.

    Offers `/metrics` while the run goes on.

    `forge_metric{run, kind, metric}` are the latest metrics of training and validation (one that
    was not measured is absent), `forge_step{run}` the finished steps when they were taken,
    `forge_events_total{run, event}` counts what plugins told since the process began.
    """

    info = PluginInfo(
        name="prometheus",
        kind=Kind.OBSERVERS,
        config=PrometheusConfig,
        packages={"prometheus_client": INSTALL},
    )

    def __init__(self, config: PrometheusConfig) -> None:
        self.config = config
        self._names = LoggerNames("Prometheus")
        self._server: Any = None
        self._thread: Any = None

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Begin to listen, or say why that cannot be."""
        from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

        config = self.config
        registry = CollectorRegistry()  # its own: several runs fit in one process
        self._metric = Gauge(
            "forge_metric", "Latest metric", ["run", "kind", "metric"], registry=registry
        )
        self._step = Gauge("forge_step", "Finished optimizer steps", ["run"], registry=registry)
        self._events = Counter(
            "forge_events", "What plugins told", ["run", "event"], registry=registry
        )
        try:
            self._server, self._thread = start_http_server(
                config.port, addr=config.host, registry=registry
            )
        except OSError as error:
            raise PluginError(
                f"prometheus cannot listen on {config.host} port {config.port}: {error}; "
                "choose another port, or 0 for a free one"
            ) from error
        port = self._server.server_port
        message = f"Prometheus finds the metrics at http://{config.host}:{port}/metrics"
        run.emit_event("prometheus", message, host=config.host, port=port)

    def _take(self, run: Run, kind: str, metrics: Mapping[str, float | None]) -> None:
        name = run.settings.name
        self._step.labels(name).set(run.progress.step)
        for given, value in metrics.items():
            metric = self._names.of(run, given)
            if value is not None and math.isfinite(value):
                self._metric.labels(name, kind, metric).set(value)
            else:
                self._metric.labels(name, kind, metric)  # remove wants it to be there
                self._metric.remove(name, kind, metric)

    @hookimpl
    def on_log(self, run: Run, record: LogRecord) -> None:
        """The metrics of training."""
        self._take(run, "training", record.metrics)

    @hookimpl
    def on_validation(self, run: Run, metrics: Mapping[str, float]) -> None:
        """The metrics of a validation."""
        self._take(run, "validation", metrics)

    @hookimpl
    def on_event(self, run: Run, event: Event) -> None:
        """Count what a plugin told."""
        self._events.labels(run.settings.name, self._names.of(run, event.name)).inc()

    def _close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = self._thread = None

    @hookimpl
    def on_run_end(self, run: Run, result: RunResult) -> None:
        """Stop to listen."""
        del run, result
        self._close()

    @hookimpl
    def on_error(self, run: Run, error: BaseException) -> None:
        """Stop to listen."""
        del run, error
        self._close()
