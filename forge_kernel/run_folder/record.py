"""The run folder: what a run writes about itself, beside its checkpoints and exports."""

from __future__ import annotations

import datetime
import math
import os
import platform
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

from forge_kernel.config.yaml_file import write_yaml
from forge_kernel.contract.hookspecs import hookimpl
from forge_kernel.contract.plugin import Kind, PluginInfo
from forge_kernel.errors import ConfigError, Fault
from forge_kernel.run_folder.folder import CONFIG, LOG, RESULT, STATUS, RunFolder
from forge_kernel.run_folder.owner import LOCK, Owner
from forge_kernel.secrecy import without_secrets
from forge_kernel.storage.atomic_files import make_folder, write_bytes, write_json, write_text
from forge_kernel.storage.seal import sealed
from forge_kernel.training.loaders.in_memory import NoConfig

if TYPE_CHECKING:
    from forge_kernel.contract.result import RunResult
    from forge_kernel.contract.run import Run
    from forge_kernel.contract.values import Event, LogRecord, Step
    from forge_kernel.planning.plan import Plan

HEARTBEAT_SECONDS: Final = 1.0  # between signs of life while steps are taken
GATHER_SECONDS: Final = 0.25  # metrics of log lines that come faster are written together
FAST_STEP_SECONDS: Final = 0.05  # only where the next step's end is near
EVENTS_KEPT: Final = 20  # in `status.json`; `forge.log` has them all
_PACKAGES: Final = ("forge-kernel", "torch", "numpy", "pluggy", "safetensors")


def new_run_folder(name: str, output_dir: str | Path | None) -> Owner:
    """Make the folder of a new run, owned by this process.

    Args:
        name: the run's name.
        output_dir: the folder to use; `runs/<name>-<UTC time>-<id>` otherwise.

    Raises:
        ConfigError: the folder holds something already, or cannot be made.
    """
    if output_dir is None:
        now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
        folder = Path("runs") / f"{name}-{now}-{secrets.token_hex(2)}"
    else:
        folder = Path(output_dir)
    try:
        made = make_folder(folder)
        owner = Owner(folder)
        used = _is_used(folder)
        if not used:
            owner.acquire()
            used = _is_used(folder)  # by who was quicker
    except (OSError, ValueError) as error:
        raise ConfigError([Fault(f"cannot make the run folder {folder}: {error}")]) from error
    if used:
        owner.release(unused=True)
        hint = "name a new one, or continue it with: forge resume"
        message = f"the folder {folder} is not empty: a run never reuses one"
        raise ConfigError([Fault(message, hints=(hint,))])
    _clear(folder)
    owner.made_folders = tuple(made)
    return owner


@contextmanager
def discarded_if_refused(owner: Owner) -> Iterator[Callable[[], None]]:
    """Of a run that is refused no folder stays, nor one above that was made for it.

    Yields:
        What is called when the run is accepted: from then on its folder tells what happens.
    """
    accepted = threading.Event()
    try:
        yield accepted.set
    except BaseException:
        if not accepted.is_set():
            _discard(owner)
        raise


def _discard(owner: Owner) -> None:
    _clear(owner.folder)
    owner.release(unused=True)
    for folder in owner.made_folders:
        with suppress(OSError):  # somebody else's is in it
            folder.rmdir()


def _clear(folder: Path) -> None:
    """Remove what a run folder holds besides its lock."""
    for path in folder.iterdir():
        if path.name == LOCK:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _is_used(folder: Path) -> bool:
    """Whether there is anything in it but what a run left that failed before its first step.

    Its `status.json` says what that was: with anything else in it the folder stays as it is.
    """
    names = {path.name for path in folder.iterdir()} - {LOCK}
    status = RunFolder(folder).status()
    left = status.get("left") if status.get("state") == "failed" else None
    return bool(names - set(left)) if isinstance(left, list) else bool(names)


def write_config(folder: Path, data: Mapping[str, Any], live: tuple[str, ...]) -> None:
    """Write the filled configuration.

    Args:
        folder: the run folder.
        data: the pipeline, every default written out.
        live: what was handed in by the program, so that the file alone does not repeat the run.
    """
    head = "# The filled configuration of this run. Repeat it: forge run config.yaml\n"
    if live:
        head = (
            "# The filled configuration of this run. It was given live parts\n"
            f"# ({', '.join(live)}), so this file alone does not repeat it.\n"
        )
        data = {**data, "x-live": list(live)}
    write_text(folder / CONFIG, head + write_yaml(dict(data)))


def _git_revision() -> str | None:
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"],  # noqa: S607  the user's git is meant
            capture_output=True, text=True, timeout=5, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment(plan: Plan, run: Run) -> dict[str, Any]:
    """Versions, device, arithmetic, git revision, plugin origins."""
    import torch

    device = run.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {package: _version(package) for package in _PACKAGES},
        "device": str(device),
        "device_name": name or platform.machine(),
        "precision": run.settings.precision,
        "threads": torch.get_num_threads(),
        "git_revision": _git_revision(),
        "plugins": {entry.label: entry.origin for entry in plan.entries},
        "metrics": run.metrics.infos.to_data(),
        "command": [without_secrets(part) for part in sys.argv],
    }


class RunRecord:
    """Keeps `status.json` and `forge.log` of a run; an observer that the runner adds."""

    info = PluginInfo(name="run_record", kind=Kind.OBSERVERS, config=NoConfig)

    def __init__(self) -> None:
        self.config = NoConfig()
        self._status: dict[str, Any] = {
            "state": "initializing",
            "step": 0,
            "total_steps": None,
            "epoch": 0,
            "phase": None,
            "metrics": {},
            "metrics_step": None,
            "events": [],
            "pid": os.getpid(),
            "host": platform.node(),
            "started": time.time(),
            "heartbeat": None,
        }
        self._due = 0.0
        self._written = self._stepped = -math.inf
        self._step_seconds = math.inf  # until a second step's end is known

    def open(self, folder: Path) -> None:
        """Begin to write into a run folder."""
        import structlog

        self._folder = folder
        self._stream: TextIO = (folder / LOG).open("a", encoding="utf-8")
        self._log = structlog.wrap_logger(
            structlog.WriteLogger(self._stream),
            processors=[
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.processors.format_exc_info,
                structlog.processors.JSONRenderer(default=str),
                lambda _, __, line: without_secrets(str(line)),
            ],
        )

    def event(self, name: str, *, level: str = "info", **facts: Any) -> None:
        """One line of `forge.log`."""
        getattr(self._log, level)(name, **facts)

    def state(self, state: str, run: Run | None = None) -> None:
        """Replace `status.json`."""
        self._status["state"] = state
        self._status["heartbeat"] = time.time()
        self._written = time.monotonic()
        self._due = self._written + HEARTBEAT_SECONDS
        if run is not None:
            self._status.update(
                step=run.progress.step, epoch=run.progress.epoch, total_steps=run.total_steps
            )
        self._write_status()

    def _write_status(self) -> None:
        write_bytes(self._folder / STATUS, sealed(self._status), durable=False)

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Training begins."""
        self.event("run_start", step=run.progress.step, device=str(run.device))
        self.state("training", run)

    @hookimpl
    def on_phase_change(self, run: Run, before: str | None, after: str | None) -> None:
        """A phase begins."""
        self._status["phase"] = after
        self.event("phase", step=run.progress.step + 1, before=before, after=after)
        self.state("training", run)

    @hookimpl
    def on_event(self, run: Run, event: Event) -> None:
        """What a plugin told."""
        self.event(event.name, step=event.step, message=event.message, facts=dict(event.facts))
        line = {"step": event.step, "time": time.time(), "event": event.name}
        events = self._status["events"]
        events.append({**line, "message": event.message})
        del events[:-EVENTS_KEPT]
        self.state("training", run)

    @hookimpl
    def on_step_end(self, run: Run, step: Step) -> None:
        """A sign of life when one is due."""
        now = time.monotonic()
        self._step_seconds, self._stepped = now - self._stepped, now
        if now >= self._due:
            self._status["phase"] = step.phase  # a resumed run hears of no change
            self.state("training", run)

    @hookimpl
    def on_log(self, run: Run, record: LogRecord) -> None:
        """Latest metrics."""
        self._status["metrics"].update(record.metrics)
        self._status["metrics_step"] = record.step
        soon = self._written + GATHER_SECONDS
        if self._step_seconds < FAST_STEP_SECONDS and time.monotonic() < soon:
            self._due = min(self._due, soon)
        else:
            self.state("training", run)

    @hookimpl
    def on_validation(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Latest metrics of a validation."""
        finite = {name: v if math.isfinite(v) else None for name, v in metrics.items()}
        self._status["metrics"].update({f"validation_{k}": v for k, v in finite.items()})
        self._status["metrics_step"] = run.progress.step
        self.event("validation", step=run.progress.step, metrics=finite)
        self.state("training", run)

    @hookimpl
    def on_checkpoint(self, run: Run, folder: Path) -> None:
        """A checkpoint is there."""
        self.event("checkpoint", step=run.progress.step, folder=folder.name)

    def end(self, run: Run, result: RunResult) -> None:
        """Write `result.json` and the last status."""
        write_json(self._folder / RESULT, result.to_data())
        level = "error" if result.outcome == "failed" else "info"
        self.event("run_end", level=level, outcome=result.outcome, reason=result.stop_reason)
        self.state(result.outcome, run)

    def close(self) -> None:
        """Close the log; of a run that failed before its first step, keep what it leaves."""
        self._stream.close()
        if self._status["state"] == "failed" and self._status["step"] == 0:
            self._status["left"] = sorted(path.name for path in self._folder.iterdir())
            self._write_status()
