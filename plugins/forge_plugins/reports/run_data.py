"""One run folder as data. What a file does not say stays None; what is wrong with it is noted."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml

from forge_kernel.api import MetricInfos
from forge_kernel.embedding import Catalog, RunFolder

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

CONFIG: Final = "config.yaml"
VALIDATION: Final = "validation"
PHASE: Final = "phase"
ENDED: Final = frozenset({"completed", "stopped", "failed"})
_KINDS: Final = {"log": "training"}
_NO_METRICS: Final = frozenset({"step", "time", "kind", "epoch"})
_LARGEST_STEP: Final = 2**53

_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast


@dataclass(frozen=True, slots=True)
class Curve:
    """One metric over the steps.

    Args:
        metric: its name in the file.
        kind: `training`, `validation`, or whatever else the file calls the kind of line.
        points: (step, value) with rising steps; None is "not measured".
    """

    metric: str
    kind: str
    points: tuple[tuple[int, float | None], ...]

    @property
    def measured(self) -> bool:
        """Whether any value is a number."""
        return any(value is not None for _, value in self.points)


@dataclass(frozen=True, slots=True)
class Export:
    """What an exporter wrote: path below the run folder, bytes on disk (None: not found)."""

    name: str
    path: str
    size: int | None


@dataclass(frozen=True, slots=True)
class EmittedEvent:
    """An event: finished steps, one word for programs, a sentence for people, plain facts."""

    step: int
    name: str
    message: str
    facts: Mapping[str, Any]


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
            if (name := _text(event.facts.get("after"))) is not None
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
    name = _text(settings.get("name")) if isinstance(settings, dict) else None
    folder_name = folder.resolve().name or str(folder)
    curves, events = _read_metrics(folder / "metrics.jsonl", notes)
    environment = _read_json(folder / "environment.json", notes)
    return RunData(
        folder=folder_name,
        name=name or folder_name,
        config_text=config_text,
        config=config,
        environment=environment,
        infos=run_infos(environment or {}),
        resources=_read_optional(folder / "resources.json", notes),
        state=_text(about.get("outcome")) or _text(about.get("state")),
        steps=_count(about.get("steps", about.get("step"))),
        total_steps=_count((status or {}).get("total_steps")),
        epochs=_count(about.get("epochs", about.get("epoch"))),
        seconds=_number(about.get("seconds")),
        stop_reason=_text(about.get("stop_reason")),
        error=_text(about.get("error")),
        started=_number((status or {}).get("started")),
        heartbeat=_number((status or {}).get("heartbeat")),
        final=_metrics(about.get("final", about.get("metrics", about.get("figures")))),
        best=_metrics(about.get("best")),
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
    data = _strict_object(text)
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


def _strict_object(text: str) -> dict[str, Any] | None:
    """A strict JSON object (no NaN, no number beyond range), or None."""
    try:
        data = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is beyond the range of numbers")
    return value


def _number(value: Any) -> float | None:
    """A finite number as it stands in the file, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) <= 1.7e308 else None


def _count(value: Any) -> int | None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole and 0 <= value < _LARGEST_STEP else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _metrics(data: Any) -> dict[str, float | None]:
    """Metrics by name; what is neither a number nor null is no metric."""
    if not isinstance(data, dict):
        return {}
    return {
        name: _number(value)
        for name, value in data.items()
        if value is None or _number(value) is not None
    }


# -- metrics.jsonl ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Record:
    step: int
    kind: str
    metrics: dict[str, float | None]
    event: EmittedEvent | None = None


def _read_metrics(
    file: Path, notes: list[str]
) -> tuple[tuple[Curve, ...], tuple[EmittedEvent, ...]]:
    if not file.is_file():
        notes.append(f"{file.name} is absent: there is nothing to draw.")
        return (), ()
    records: list[_Record] = []
    events: list[EmittedEvent] = []
    broken, replaced, torn = 0, 0, False
    for line, whole in _lines(file):
        record = _record(line)
        if record is None:
            broken += 1
            torn = not whole
            continue
        while events and events[-1].step > record.step:  # the run went back
            events.pop()
            replaced += 1
        if record.event is not None:
            events.append(record.event)
        else:
            replaced += _take_in(records, record)
    if broken:
        tail = "; the last one is cut short." if torn else "."
        notes.append(f"{_counted(broken)} of {file.name} could not be read{tail}")
    if replaced:
        notes.append(
            f"{_counted(replaced)} of {file.name} from before the run went back to an earlier "
            "step: not drawn."
        )
    return _curves(records), tuple(events)


def _lines(file: Path) -> Iterator[tuple[str, bool]]:
    """The lines that hold something, and whether each is ended."""
    with file.open(encoding="utf-8", errors="replace", newline="\n") as stream:
        for line in stream:
            if line.strip():
                yield line, line.endswith("\n")


def _counted(lines: int) -> str:
    return f"{lines:,} line{'' if lines == 1 else 's'}"


def _record(line: str) -> _Record | None:
    """A line's content, or None when it is no metrics line."""
    data = _strict_object(line)
    if data is None:
        return None
    step, kind = _count(data.get("step")), _text(data.get("kind"))
    if step is None or kind is None:
        return None
    if kind == "event":
        facts = data.get("facts")
        name, message = _text(data.get("event")) or "", _text(data.get("message")) or ""
        told = EmittedEvent(step, name, message, facts if isinstance(facts, dict) else {})
        return _Record(step, kind, {}, told)
    return _Record(
        step,
        _KINDS.get(kind, kind),
        _metrics({name: value for name, value in data.items() if name not in _NO_METRICS}),
    )


def _take_in(records: list[_Record], new: _Record) -> int:
    """Add a record; give the number of those that it makes void.

    A resumed run continues from a checkpoint, so its lines may start at an earlier step.
    """
    before = len(records)
    if records and records[-1].step > new.step:
        while records and records[-1].step >= new.step:
            records.pop()
    same = next(
        (
            index
            for index in range(len(records) - 1, -1, -1)
            if records[index].step < new.step or records[index].kind == new.kind
        ),
        None,
    )
    if same is not None and records[same].step == new.step:
        records.pop(same)
    void = before - len(records)
    records.append(new)
    return void


def _curves(records: Sequence[_Record]) -> tuple[Curve, ...]:
    points: dict[tuple[str, str], list[tuple[int, float | None]]] = {}
    for record in records:
        for metric, value in record.metrics.items():
            points.setdefault((metric, record.kind), []).append((record.step, value))
    return tuple(Curve(metric, kind, tuple(result)) for (metric, kind), result in points.items())


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
