"""kill -9 at random instants of a run, a resumption and an export; then resumed to the end."""

from __future__ import annotations

import os
import random
import select
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import small_run
from battery import Battery, Trial

from forge_kernel.errors import CheckpointError
from forge_kernel.runner import export, resume, run
from forge_kernel.storage.checkpoint_store import CheckpointStore, Snapshot

END = small_run.STEPS + 3


def course(pipeline: Path, folder: Path) -> int:
    """A run to its end, a resumption to a later one, a checkpoint written again, an export."""
    run(pipeline, output_dir=folder, quiet=True)
    resume(folder, [f"run.max_steps={END}"], quiet=True)
    store = CheckpointStore(folder / "checkpoints")
    store.save(store.newest()[0], ("best",))
    export(folder, "state_dict")
    return 0


def telling_saves(pipe: int) -> None:
    """From here on in this process each save that has returned writes its step into a pipe."""
    save = CheckpointStore.save

    def told(store: CheckpointStore, snapshot: Snapshot, tags: tuple[str, ...] = ()) -> Path:
        folder = save(store, snapshot, tags)
        os.write(pipe, snapshot.step.to_bytes(2, "big"))
        return folder

    CheckpointStore.save = told  # type: ignore[method-assign]


class Killed:
    """A course that is ended some time after its first save.

    Attributes:
        promised: the newest step whose save had returned.
        ended: it came to its end before.
    """

    def __init__(self, pipeline: Path, folder: Path, after: float, *, from_start: bool) -> None:
        read, write = os.pipe()

        def work() -> int:
            os.close(read)
            telling_saves(write)
            return course(pipeline, folder)

        process = small_run.Process(work)
        os.close(write)
        if not from_start:
            select.select([read], [], [], 60)
        time.sleep(after)
        process.kill()
        self.ended = process.wait() >= 0
        told = b""
        while part := os.read(read, 4096):
            told += part
        os.close(read)
        self.promised = int.from_bytes(told[-2:], "big")


def resumed(folder: Path, place: Path) -> int:
    """Resume to the end, and export."""

    def work() -> int:
        resume(folder, [f"run.max_steps={END}"], quiet=True)
        export(folder, "state_dict")
        return 0

    return small_run.forked(work, place / "output")


def problem(folder: Path, killed: Killed, reference: Path, place: Path) -> str:
    """What a kill has cost; "" for nothing."""
    try:
        step, _ = small_run.weights(folder)
    except CheckpointError as error:
        return str(error) if killed.promised else ""
    if step < killed.promised:
        return f"step {killed.promised} was saved, {step} is the newest"
    code = resumed(folder, place)
    if code:
        return f"resume ended with {code}: {(place / 'output').read_text()[-300:]}"
    end, weights = small_run.weights(folder)
    if end != END or not small_run.same_weights(weights, small_run.weights(reference)[1]):
        return f"other weights at step {end} than without the kill"
    if small_run.metrics(folder) != small_run.metrics(reference):
        return "metrics.jsonl is not that of the run without the kill"
    left = [path.name for path in folder.rglob(".*")]
    if left:
        return f"left over: {left}"
    export = "exports/state_dict/manifest.json"
    same = (folder / export).read_bytes() == (reference / export).read_bytes()
    return "" if same else "the export is another than without the kill"


def trials(draw: random.Random, count: int) -> Iterator[Trial]:
    """One in eight is killed at any moment from its start, the others after the first save."""
    small_run.loaded()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        pipeline = small_run.write_pipeline(place)
        began = time.monotonic()
        reference = place / "reference"
        assert small_run.forked(lambda: course(pipeline, reference)) == 0
        length = time.monotonic() - began
        for number in range(count):
            folder = place / f"run-{number}"
            from_start = draw.random() < 1 / 8
            share = draw.random()
            killed = Killed(pipeline, folder, length * 0.8 * share, from_start=from_start)
            moment = (
                f"{share:.3f} of the course after its {'start' if from_start else 'first save'}"
            )
            wrong = "" if killed.ended else problem(folder, killed, reference, place)
            yield Trial(f"killed at {moment}", wrong)


BATTERY = Battery(
    name="kills",
    promise="nothing that was saved is lost; resumed, the end is equal to the bit",
    ci=200,
    deep=2_000,
    trials=trials,
)
