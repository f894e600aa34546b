"""kill -9 before each operation of the commit protocol, and in the middle of each write."""

from __future__ import annotations

import os
import random
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import small_run
import store_scenes as scenes
from battery import Battery, Trial
from file_layer import Layer, Listener, Operation


class Killer(Listener):
    """Ends the process at an operation.

    Args:
        folder: that the operations are below.
        number: of the operation, from 0.
        torn: half of a write is done before.
    """

    def __init__(self, folder: Path, number: int, *, torn: bool) -> None:
        self._folder, self._left, self._torn = folder, number, torn

    def before(self, operation: Operation) -> None:
        if operation.kind not in scenes.CHANGES:
            return
        self._left -= 1
        if self._left >= 0:
            return
        if self._torn:
            half = operation.content[: len(operation.content) // 2]
            descriptor = os.open(self._folder / operation.path, os.O_WRONLY)
            os.lseek(descriptor, operation.offset, os.SEEK_SET)
            os.writev(descriptor, [half])  # past the layer
        os.kill(os.getpid(), signal.SIGKILL)


def cases(stage: scenes.Stage, place: Path) -> list[tuple[str, int, bool, str]]:
    """Scene, number of the operation, whether it is torn, and its name."""
    result = []
    for scene in scenes.SCENES:
        for number, step in enumerate(
            scenes.operations(stage, scene, place / "dry", scenes.CHANGES)
        ):
            name = scenes.named(step)
            result.append((scene, number, False, f"{scene}: before {name}"))
            if step.kind == "write" and len(step.content) > 1:
                result.append((scene, number, True, f"{scene}: in {name}"))
    return result


def trials(draw: random.Random, count: int) -> Iterator[Trial]:
    """All cases, or as many of them as are asked for."""
    small_run.loaded()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        stage = scenes.staged(place)
        known = cases(stage, place)
        chosen = known if count >= len(known) else sorted(draw.sample(known, count))
        for scene, number, torn, said in chosen:
            folder = scenes.begun(stage, scene, place / "run")

            def work(
                scene: str = scene, number: int = number, torn: bool = torn, folder: Path = folder
            ) -> int:
                with Layer(folder, Killer(folder, number, torn=torn)):
                    scenes.SCENES[scene](stage, folder)
                return 0

            if small_run.forked(work, place / "output") != -signal.SIGKILL:
                yield Trial(said, "it was not killed there")
                continue
            first = scene == "first save"
            wrong = scenes.unwanted(stage, folder, least=0 if first else scenes.STEPS)
            if not wrong and (
                not first or (folder / "checkpoints" / f"step-{scenes.STEPS}").exists()
            ):
                wrong = scenes.leads_to_the_end(stage, folder, place / "output")
            yield Trial(said, wrong)


BATTERY = Battery(
    name="kill-points",
    promise="old or new, and from there to an equal end",
    ci=160,
    deep=1_000,
    trials=trials,
)
