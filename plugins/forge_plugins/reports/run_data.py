"""One run folder as data. What a file does not say stays None; what is wrong with it is noted."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml

from forge_kernel.api import MetricInfos
from forge_kernel.embedding import Catalog, RunFolder
from forge_plugins.reports.metrics_file import Curve, EmittedEvent, read_metrics
from forge_plugins.reports.strict_json import (
    count,
    metrics_by_name,
    number,
    strict_object,
    words,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

CONFIG: Final = "config.yaml"
VALIDATION: Final = "validation"
PHASE: Final = "phase"
ENDED: Final = frozenset({"completed", "stopped", "failed"})

_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast


@dataclass(frozen=True, slots=True)
class Export:
    """What an exporter wrote: path below the run folder, bytes on disk (None: not found)."""

    name: str
    path: str
    size: int | None


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of steps; `end` is None for the phase that the run is in."""

    name: str
    start: int
    end: int | None


@dataclass(frozen=True, slots=True)
class Metrics:
    """A metric in the summary: last values by kind of line, best of the validations."""

    training: float | None = None
    validation: float | None = None
    best: float | None = None
    best_step: int | None = None


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What a run folder says.

    Args:
        folder: name of the folder.
        name: the run's name in its configuration; the folder's where that is silent.
        config_text: `config.yaml` as written; `config` is its content.
        environment: `environment.json`.
        resources: `resources.json`, which only runs with that observer have.
        confusion: `confusion.json`, of runs that were validated by classes.
        state: `completed`, `stopped` or `failed`; for a run without an end the state that it last
            wrote; None where nothing says.
        steps: finished optimizer steps, `total_steps` those planned.
        seconds: of training, known at the end only.
        started: seconds since 1970, as is `heartbeat`, the last sign of life.
        final: last metrics by name, a validation's with the prefix `validation_`.
        best: best validation metrics by name.
        curves: from `metrics.jsonl`.
        events: from the same, in order; changes of the phase are among them.
        notes: what is missing or could not be read, as sentences.
    """

    folder: str
    name: str
    config_text: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] | None = None
    resources: Mapping[str, Any] | None = None
    confusion: Mapping[str, Any] | None = None
    state: str | None = None
    steps: int | None = None
    total_steps: int | None = None
    epochs: int | None = None
    seconds: float | None = None
    stop_reason: str | None = None
    error: str | None = None
    started: float | None = None
    heartbeat: float | None = None
    final: Mapping[str, float | None] = field(default_factory=dict)
    best: Mapping[str, float | None] = field(default_factory=dict)
    exports: tuple[Export, ...] = ()
    curves: tuple[Curve, ...] = ()
    events: tuple[EmittedEvent, ...] = ()
    notes: tuple[str, ...] = ()
    infos: MetricInfos = field(default_factory=MetricInfos)

    @property
    def ended(self) -> bool:
        """Whether the run has come to an end."""
        return self.state in ENDED

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases in order, by finished steps."""
        changes = [event for event in self.events if event.name == PHASE]
        ends: list[int | None] = [event.step for event in changes[1:]]
        return tuple(
            Phase(name, event.step, end)
            for event, end in zip(changes, [*ends, None], strict=False)
            if (name := words(event.facts.get("after"))) is not None
        )

    def curve(self, metric: str, kind: str) -> Curve | None:
        """The curve of a metric in lines of a kind, if there is one."""
        return next((c for c in self.curves if (c.metric, c.kind) == (metric, kind)), None)

    def metrics(self) -> dict[str, Metrics]:
        """The summary by metric, in the order of the files."""
        prefix = f"{VALIDATION}_"
        names = [name.removeprefix(prefix) for name in self.final]
        return {
            name: Metrics(
                self.final.get(name),
                self.final.get(prefix + name),
                self.best.get(name),
                self._step_of_best(name),
            )
            for name in dict.fromkeys([*names, *self.best])
        }

    def _step_of_best(self, name: str) -> int | None:
        """The first step at which a validation gave the best metric."""
        best, curve = self.best.get(name), self.curve(name, VALIDATION)
        if best is None or curve is None:
            return None
        return next((step for step, value in curve.points if value == best), None)


def read_run(folder: Path) -> RunData:
    """Read a run folder, whether its run has ended or not.

    Files that are absent or damaged are told in `notes`; nothing is put in their place.

    Raises:
        OSError: a file is there and cannot be opened.
    """
    notes: list[str] = []
    config_text, config = _read_config(folder, notes)
    status = _read_json(folder / "status.json", notes)
    result = _current_result(folder, status, notes)
    about = result if result is not None else status or {}
    settings = config.get("run")
    name = words(settings.get("name")) if isinstance(settings, dict) else None
    folder_name = folder.resolve().name or str(folder)
    curves, events = read_metrics(folder / "metrics.jsonl", notes)
    environment = _read_json(folder / "environment.json", notes)
    return RunData(
        folder=folder_name,
        name=name or folder_name,
        config_text=config_text,
        config=config,
        environment=environment,
        infos=run_infos(environment or {}),
        resources=_read_optional(folder / "resources.json", notes),
        confusion=_read_optional(folder / "confusion.json", notes),
        state=words(about.get("outcome")) or words(about.get("state")),
        steps=count(about.get("steps", about.get("step"))),
        total_steps=count((status or {}).get("total_steps")),
        epochs=count(about.get("epochs", about.get("epoch"))),
        seconds=number(about.get("seconds")),
        stop_reason=words(about.get("stop_reason")),
        error=words(about.get("error")),
        started=number((status or {}).get("started")),
        heartbeat=number((status or {}).get("heartbeat")),
        final=metrics_by_name(about.get("final", about.get("metrics", about.get("figures")))),
        best=metrics_by_name(about.get("best")),
        exports=_exports(folder, about.get("exports")),
        curves=curves,
        events=events,
        notes=tuple(notes),
    )


def run_infos(environment: Mapping[str, Any]) -> MetricInfos:
    """What a run's metrics are: as it has written, or of an older one as installed plugins say."""
    if "metrics" in environment:
        return MetricInfos.from_data(environment["metrics"])
    return MetricInfos(Catalog.installed().metrics())


def joined_infos(runs: Iterable[RunData]) -> MetricInfos:
    """What the metrics of several runs are; what the first one says counts."""
    entries = [entry for run in runs for entry in run.infos.to_data()]
    return MetricInfos.from_data(entries)


def _read_text(file: Path, notes: list[str]) -> str | None:
    try:
        return RunFolder(file.parent).text(file.name)
    except FileNotFoundError:
        notes.append(f"{file.name} is absent.")
        return None


def _read_config(folder: Path, notes: list[str]) -> tuple[str | None, dict[str, Any]]:
    text = _read_text(folder / CONFIG, notes)
    if text is None:
        return None, {}
    try:
        config = yaml.load(text, _LOADER)  # noqa: S506  a safe loader
    except (yaml.YAMLError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        notes.append(f"{CONFIG} could not be read as a mapping.")
        return text, {}
    return text, config


def _read_json(file: Path, notes: list[str]) -> dict[str, Any] | None:
    """A JSON object, or None with a note."""
    text = _read_text(file, notes)
    if text is None:
        return None
    data = strict_object(text)
    if data is None:
        notes.append(f"{file.name} could not be read as a JSON object.")
    return data


def _read_optional(file: Path, notes: list[str]) -> dict[str, Any] | None:
    """A JSON object that need not be there."""
    return _read_json(file, notes) if file.is_file() else None


def _current_result(
    folder: Path, status: Mapping[str, Any] | None, notes: list[str]
) -> dict[str, Any] | None:
    """`result.json`, unless the run has been resumed since it was written."""
    file = folder / "result.json"
    if not file.exists():
        notes.append(f"{file.name} is absent: the run has not ended, or was cut off.")
        return None
    result = _read_json(file, notes)
    state = (status or {}).get("state")
    if result is not None and state is not None and state not in ENDED:
        notes.append(
            "The run has been resumed since result.json was written, or was cut off while it "
            "ended: result.json is left aside."
        )
        return None
    return result


# -- exports ------------------------------------------------------------------------------------


def _exports(folder: Path, data: Any) -> tuple[Export, ...]:
    """The exports that the result names, with their sizes on disk."""
    named = data.items() if isinstance(data, dict) else ()
    return tuple(
        Export(name, path, _size(folder, path)) for name, path in named if isinstance(path, str)
    )


def _size(folder: Path, path: str) -> int | None:
    """Bytes of a file or of all files below a folder; None for what is not in the run folder."""
    try:
        place = (folder / path).resolve()
        if not place.is_relative_to(folder.resolve()) or not place.exists():
            return None
        if place.is_file():
            return place.stat().st_size
        files = (Path(at) / name for at, _, names in os.walk(place) for name in names)
        return sum(file.lstat().st_size for file in files)
    except (OSError, ValueError):
        return None
