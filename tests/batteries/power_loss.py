"""Power loss by replay: a run is recorded, and the disk rebuilt after each of its operations."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import small_run
from battery import Battery, Trial
from disk_replay import Disk, Recorder
from file_layer import Layer, Operation

from forge_kernel.errors import CheckpointError
from forge_kernel.run_folder.owner import Owner
from forge_kernel.runner import export, resume, run
from forge_kernel.storage.checkpoint_store import CheckpointStore, Snapshot
from forge_kernel.storage.hashes import sha256

PINS = ("best",)


@dataclass
class Promise:
    """What a program was told by a moment of the recording.

    Args:
        step: the newest step whose save has returned.
        exported: an export has returned.
    """

    step: int = 0
    exported: bool = False


@contextmanager
def saves_told(recorder: Recorder) -> Iterator[None]:
    """The recorder is told when a save has returned: from there on its step may not be lost."""
    save = CheckpointStore.save

    def told(store: CheckpointStore, snapshot: Snapshot, tags: tuple[str, ...] = ()) -> Path:
        folder = save(store, snapshot, tags)
        recorder.mark(("saved", snapshot.step))
        return folder

    CheckpointStore.save = told  # type: ignore[method-assign]
    try:
        yield
    finally:
        CheckpointStore.save = save  # type: ignore[method-assign]


def recorded(folder: Path) -> list[Any]:
    """A run, a resumption, checkpoints overwritten and pinned, and two exports, all in one list."""
    pipeline = small_run.write_pipeline(folder)
    root = folder / "root"
    root.mkdir()
    target = root / "deep" / "run"
    recorder = Recorder(root)
    with saves_told(recorder), Layer(root, recorder):
        run(pipeline, output_dir=target, quiet=True)
        recorder.mark(("exported", 0))
        resume(target, ["run.max_steps=8"], quiet=True)
        owner = Owner(target)
        owner.acquire()
        store = CheckpointStore(target / "checkpoints")
        snapshot, _, _ = store.newest()
        for mark in range(1, 4):
            trees = {**snapshot.trees, "mark": {"n": mark}}
            again = Snapshot(snapshot.step, snapshot.model, trees, snapshot.about)
            store.save(again, PINS if mark != 2 else ())
            recorder.mark(("again", mark))
        owner.close()
        export(target, "state_dict")
    return recorder.steps


def problem(root: Path, promise: Promise, least_mark: int) -> str:
    """What a state of the disk lacks of what was promised; "" for nothing."""
    folder = root / "deep" / "run"
    if not promise.step:
        return ""
    if not (folder / "config.yaml").is_file():
        return "config.yaml is gone"
    store = CheckpointStore(folder / "checkpoints")
    for moment in ("read", "cleared by its owner"):
        try:
            snapshot, _, _ = store.newest()
        except CheckpointError as error:
            return f"{moment}: {error}"
        mark = snapshot.trees.get("mark", {"n": 0})["n"]
        if snapshot.step < promise.step:
            return f"{moment}: step {snapshot.step} after step {promise.step} was saved"
        if mark < least_mark:
            return f"{moment}: version {mark} of the step after version {least_mark} was saved"
        store.clear_unfinished()
    lines = snapshot.trees["plugins"]["observers[0] metrics_jsonl"]["lines"]
    text = (folder / "metrics.jsonl").read_bytes().split(b"\n")[:-1] if lines else []
    if len(text) < lines or any(not _is_json(line) for line in text[:lines]):
        return f"metrics.jsonl lacks lines of the {lines} that the checkpoint counts"
    return _export_problem(folder / "exports" / "state_dict", promise.exported)


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _export_problem(folder: Path, promised: bool) -> str:
    if not folder.exists():
        moved = list(folder.parent.glob(f".{folder.name}.replaced-*")) if promised else [folder]
        return "" if moved else "the export is gone"
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        whole = all(sha256(folder / name) == known["sha256"] for name, known in files.items())
    except (OSError, ValueError, KeyError) as error:
        return f"the export is not whole: {error!r}"
    return "" if whole else "the export is mixed"


def states(steps: list[Any]) -> Iterator[tuple[int, Disk, Promise, int]]:
    """After each operation: its number, the disk, what was promised."""
    disk, promise, mark = Disk(), Promise(), 0
    for number, step in enumerate(steps):
        if isinstance(step, Operation):
            disk.apply(step)
        elif step[0] == "saved":
            promise.step = step[1]
        elif step[0] == "again":
            mark = step[1]
        elif step[0] == "exported":
            promise.exported = True
        yield number, disk, promise, mark


def trials(draw: random.Random, count: int) -> Iterator[Trial]:
    """Prefixes in their order, several states of each."""
    with tempfile.TemporaryDirectory() as place:
        steps = recorded(Path(place))
        share = count / len(steps)
        done = 0
        for number, disk, promise, mark in states(steps):
            wanted = int((number + 1) * share) - done
            for _ in range(wanted):
                done += 1
                target = Path(place) / "state"
                disk.lost(draw, target)
                step = steps[number]
                name = f"{step.kind} {step.path}" if isinstance(step, Operation) else str(step)
                yield Trial(f"after operation {number} ({name})", problem(target, promise, mark))
                shutil.rmtree(target)


BATTERY = Battery(
    name="power-loss",
    promise="what was saved is there, whole and of one version",
    ci=300,
    deep=5_000,
    trials=trials,
)
