"""Scenes of writing that batteries interrupt: each begins with a run folder and does one thing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import small_run
from file_layer import Layer, Listener, Operation

from forge_kernel.errors import CheckpointError
from forge_kernel.runner import export, resume, run
from forge_kernel.storage.checkpoint_store import CheckpointReader, CheckpointStore, Snapshot
from forge_kernel.storage.hashes import sha256

STEPS = small_run.STEPS
END = STEPS + 2
CHANGES = frozenset({"write", "truncate", "fsync", "rename", "unlink", "mkdir", "rmdir"})


@dataclass(frozen=True)
class Stage:
    """What the scenes share.

    Args:
        base: a run folder after its steps, with an export, to be copied.
        end: the same run one save and one step later.
        snapshots: of its last steps, and of the one after.
    """

    base: Path
    end: Path
    snapshots: dict[int, Snapshot]


def staged(place: Path, *, every_step: bool = False) -> Stage:
    """Train once.

    Args:
        place: an empty folder.
        every_step: also know what the earlier steps hold, which are not kept.
    """
    pipeline = small_run.write_pipeline(place)
    base, end = place / "base", place / "end"
    run(pipeline, output_dir=base, quiet=True)
    shutil.copytree(base, end)
    resume(end, [f"run.max_steps={END}"], quiet=True)
    snapshots = {}
    for folder in (base, end):
        reader = CheckpointReader(folder / "checkpoints")
        snapshots.update({step: reader.load(reader.path(step)) for step in reader.steps()})
    if every_step:
        keeping = pipeline.read_text(encoding="utf-8").replace(
            "save_every: 1", "save_every: 1, keep_checkpoints: 99"
        )
        (place / "keeping.yaml").write_text(keeping, encoding="utf-8")
        run(place / "keeping.yaml", output_dir=place / "keeping", quiet=True)
        reader = CheckpointReader(place / "keeping" / "checkpoints")
        snapshots.update({step: reader.load(reader.path(step)) for step in reader.steps()})
    return Stage(base, end, snapshots)


def first_save(stage: Stage, folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    CheckpointStore(folder / "checkpoints").save(stage.snapshots[STEPS])


def overwriting(stage: Stage, folder: Path) -> None:
    CheckpointStore(folder / "checkpoints").save(stage.snapshots[STEPS])


def pruning(stage: Stage, folder: Path) -> None:
    CheckpointStore(folder / "checkpoints").save(stage.snapshots[STEPS + 1])


def pointing(stage: Stage, folder: Path) -> None:
    CheckpointStore(folder / "checkpoints").save(stage.snapshots[STEPS], ("best", "kept"))


def exporting(stage: Stage, folder: Path) -> None:
    del stage
    export(folder, "state_dict")


SCENES: dict[str, Callable[[Stage, Path], None]] = {
    "first save": first_save, "overwrite": overwriting, "prune": pruning,
    "pointer": pointing, "export": exporting,
}  # fmt: skip


def begun(stage: Stage, scene: str, folder: Path) -> Path:
    """A fresh copy of the run as the scene finds it."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(stage.base, folder)
    if scene == "first save":
        shutil.rmtree(folder / "checkpoints")
    return folder


class Counter(Listener):
    """Lists operations.

    Args:
        kinds: of those that count.
    """

    def __init__(self, kinds: frozenset[str]) -> None:
        self._kinds = kinds
        self.operations: list[Operation] = []

    def before(self, operation: Operation) -> None:
        if operation.kind in self._kinds:
            self.operations.append(operation)


def operations(stage: Stage, scene: str, folder: Path, kinds: frozenset[str]) -> list[Operation]:
    """What a scene does, undisturbed."""
    counter = Counter(kinds)
    begun(stage, scene, folder)
    with Layer(folder, counter):
        SCENES[scene](stage, folder)
    return counter.operations


def named(operation: Operation) -> str:
    """An operation without what differs from time to time."""
    path = re.sub(r"(partial-|replaced-|\.)[0-9a-f]{8}(?=/|$)", r"\1*", operation.path)
    return f"{operation.kind} {path}"


def unwanted(stage: Stage, folder: Path, *, least: int) -> str:
    """What a folder holds, or lacks, that it must not; "" for nothing.

    Args:
        stage: what was there before.
        folder: looked at by a reader.
        least: the step that must be there; 0: there need be none.
    """
    reader = CheckpointReader(folder / "checkpoints")
    for step in reader.steps():
        try:
            snapshot = reader.load(reader.path(step))
        except CheckpointError as error:
            return f"under its final name: {error}"
        if not small_run.same_weights(snapshot.model, stage.snapshots[step].model):
            return f"step {step} holds other weights"
    try:
        newest = reader.newest()[0].step
    except CheckpointError as error:
        return str(error) if least else ""
    if newest < least:
        return f"step {least} was there, {newest} is the newest"
    return export_problem(folder / "exports" / "state_dict")


def export_problem(folder: Path) -> str:
    """What is wrong with an export that stands under its name; "" for nothing."""
    if not folder.exists():
        return ""
    try:
        files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
        whole = all(sha256(folder / name) == known["sha256"] for name, known in files.items())
    except (OSError, ValueError, KeyError) as error:
        return f"the export is not whole: {error!r}"
    return "" if whole else "the export is mixed"


def leads_to_the_end(stage: Stage, folder: Path, output: Path) -> str:
    """Whether a resumption from here ends as it should, with nothing left over; "" if so."""

    def work() -> int:
        resume(folder, [f"run.max_steps={END}"], quiet=True)
        export(folder, "state_dict")
        return 0

    code = small_run.forked(work, output)
    if code:
        return f"resume ended with {code}: {output.read_text(encoding='utf-8')[-300:]}"
    weights = small_run.weights(folder)[1]
    if not small_run.same_weights(weights, small_run.weights(stage.end)[1]):
        return "other weights at the end"
    left = [path.name for path in folder.rglob(".*")]
    return f"left over: {left}" if left else ""
